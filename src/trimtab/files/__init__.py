"""Floor 4: adapters on disk. Knows configs and tensors by name, no model."""
