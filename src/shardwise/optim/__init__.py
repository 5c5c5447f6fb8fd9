"""Optimizers and schedulers that a config can name, and what the engine must know of an optimizer."""
