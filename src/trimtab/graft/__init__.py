"""Floor 6: putting adapters into a model and taking them out."""
