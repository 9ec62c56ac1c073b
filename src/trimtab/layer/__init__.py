"""Floor 5: what stands in the model where a frozen layer stood."""
