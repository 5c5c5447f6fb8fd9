"""What this machine has to run on."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The processors that ranks may use."""

    num_cores: int
    num_gpus: int


def this_machine() -> Machine:
    """Counts the cores this process may run on and the GPUs that torch can see.

    Both respect limits set from outside: an affinity mask, `CUDA_VISIBLE_DEVICES`.
    """
    import torch  # a second of start-up, which `--help` must not pay

    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(num_cores=num_cores, num_gpus=torch.cuda.device_count())
