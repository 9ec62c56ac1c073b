"""Floor 2: what a frozen layer, a method and a config are. Knows no method, no adapter file and no transformers."""
