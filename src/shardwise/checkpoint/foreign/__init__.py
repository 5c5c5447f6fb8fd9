"""Checkpoints of others: read without their code, and written for them.

``unpickler`` and ``torch_file`` read what ``torch.save`` writes and can run nothing; ``deepspeed_files`` and
``universal`` say what lies where in a directory of DeepSpeed's; ``source`` makes of it what a load reads, ``convert``
a checkpoint of ours. ``dcp`` and ``pretrained`` go the other way. docs/moving-checkpoints.md is for users.
"""
