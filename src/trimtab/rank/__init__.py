"""Floor 8: the ranks of adapters, and what else can be read off their factors alone."""
