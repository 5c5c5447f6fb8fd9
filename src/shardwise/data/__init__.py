"""How every rank gets its own part of the data: samplers, loaders, and the exact place to go on from.

``share`` is the arithmetic, without torch; ``samplers`` puts it into torch's samplers and datasets; ``loader`` and
``dispatcher`` are the two ways to read (every rank for itself, or rank 0 for all); ``position`` is what a checkpoint
keeps of a loader; ``prepare`` turns a user's loader into one of ours.
"""
