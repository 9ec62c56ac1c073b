"""Floor 3: adapters meet a model."""
