"""The environment variables that ranks get from the launcher, beside those of torch's elastic agent.

The launcher is the one place that sets any; what runs below it is told by arguments.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shardwise.launch.job import Device, Job

# On the CPU a unit's buffer is freed after use and asked for again one unit later. By default glibc maps a large block
# afresh each time, so every page of it faults again: filling and freeing two blocks of 28 MiB cost 14,300 faults and
# 19 ms, and 3 ms without a fault under these settings. They keep such blocks in the heap (32 MiB is the
# highest threshold that every glibc accepts) and keep up to 1 GiB of freed heap instead of giving it back.
HEAP_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # bytes
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),  # bytes
}


# Names the file with everything that was asked for; `handed_over` reads it on a rank.
RUN_VARIABLE = "SHARDWISE_RUN"


def rank_environment(job: Job, inherited: Mapping[str, str], asked_file: Path) -> dict[str, str]:
    """The variables to set for the ranks of `job`; the others they inherit as they are.

    What the user has set stays, except where an option of the launcher says otherwise.
    """
    chosen = {RUN_VARIABLE: str(asked_file)}
    if job.threads_were_asked_for or "OMP_NUM_THREADS" not in inherited:
        chosen["OMP_NUM_THREADS"] = str(job.num_threads_per_process)
    if job.device is Device.CPU:
        chosen["CUDA_VISIBLE_DEVICES"] = ""  # torch then finds no GPU, in every library that asks it
        tuned_by_user = "glibc.malloc" in inherited.get("GLIBC_TUNABLES", "")
        if not tuned_by_user and not any(name in inherited for name in HEAP_SETTINGS):
            chosen |= HEAP_SETTINGS
    elif job.gpu_ids:
        chosen["CUDA_VISIBLE_DEVICES"] = ",".join(job.gpu_ids)
    if job.meeting.num_machines > 1 and job.meeting.backend == "c10d":
        # Else torch's agents keep one store for the ranks of all attempts, which a machine that comes later misses.
        chosen["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return chosen


@contextmanager
def exported(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets `variables` in this process, so that its children inherit them, and takes them back at the end."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
