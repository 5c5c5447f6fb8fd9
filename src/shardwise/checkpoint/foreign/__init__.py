"""Checkpoints of others, read without their code.

``unpickler`` and ``torch_file`` read what ``torch.save`` writes and can run nothing; ``deepspeed_files``,
``model_states`` and ``universal`` say what lies where in a directory of DeepSpeed's; ``source`` makes of it what a load
reads, and ``open`` says which it is. docs/moving-checkpoints.md is for users.
"""
