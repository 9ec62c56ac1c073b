"""Floor 8: the rank r. What an adapter uses of it, cutting it down or to another form, how much a task asks for."""
