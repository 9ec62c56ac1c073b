"""Floor 1: how a frozen weight is held: plain, quantised, kept elsewhere. Read, written, exchanged."""
