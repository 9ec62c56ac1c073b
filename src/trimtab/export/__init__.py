"""Floor 8: adapters and models for other programs."""
