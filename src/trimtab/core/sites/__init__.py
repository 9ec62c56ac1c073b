"""Floor 2: one file a kind of layer, beside the plain ones in `core/site.py`, whose table names them all."""
