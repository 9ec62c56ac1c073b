"""Floor 7: PEFT's face: PeftModel, its tuner, its task classes, state dicts and status."""
