"""What this machine has to run on."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The processors that ranks may use."""

    num_cores: int
    num_gpus: int
    visible_gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES lists them; empty: it is not set

    @property
    def gpu_names(self) -> tuple[str, ...]:
        """What `gpu_ids` may choose from: the names that CUDA_VISIBLE_DEVICES would hold."""
        return self.visible_gpus or tuple(map(str, range(self.num_gpus)))


def this_machine() -> Machine:
    """Counts the cores this process may run on and the GPUs that torch can see.

    Both respect limits set from outside: an affinity mask, `CUDA_VISIBLE_DEVICES`.
    """
    import torch  # a second of start-up, which `--help` must not pay

    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    visible = tuple(name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip())
    return Machine(num_cores=num_cores, num_gpus=torch.cuda.device_count(), visible_gpus=visible)
