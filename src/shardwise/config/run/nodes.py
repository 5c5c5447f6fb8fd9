"""Settings that must divide the number of ranks: known to a launcher before it starts one."""

from collections.abc import Iterator

from shardwise.config.messages import Path, dotted
from shardwise.config.run.nested import get
from shardwise.config.run.resolved import IN_JSON, Resolved
from shardwise.errors import ConfigError
from shardwise.topology import divisors

_HPZ = ("zero_optimization", "zero_hpz_partition_size")
_MICS = ("zero_optimization", "mics_shard_size")


def check_nodes(resolved: Resolved, num_processes: int) -> None:
    """Raises ConfigError where `num_processes`, over all machines, cannot be cut into nodes as the JSON asks."""
    faults = [
        *_fault(resolved, IN_JSON["num_nodes_simulated"], num_processes, ""),
        *_fault(resolved, _HPZ, num_processes, ", best the number of processes on a node"),
        *_fault(resolved, _MICS, num_processes, ", best the number of processes on a node"),
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def _fault(resolved: Resolved, path: Path, num_processes: int, advice: str) -> Iterator[str]:
    value = get(resolved.ds_config, path)
    if isinstance(value, int | float) and value > 1 and num_processes % value:
        yield (
            f"{dotted(path)} is {resolved.origins[path]}, which does not divide {num_processes} processes. "
            f"Expected {' or '.join(map(str, divisors(num_processes)))}{advice}."
        )
