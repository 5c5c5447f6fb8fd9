"""torch's elastic agent, and what a run needs beside: a word at each restart, nothing left of the attempt before.

A restart is of all ranks: one that lives on would wait in a collective for those that are new. Machines count their
restarts alike, for ranks meet under that number.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

Failures = Mapping[int, ProcessFailure]
NobodyFailed: Failures = {}


class Agent(LocalElasticAgent):
    """Runs the ranks of this machine, and starts all of them anew as often as it may.

    Args:
        spec: the ranks, and how often they may be started anew.
        logs_specs: where they leave error files.
        grace_seconds: what they may take to end, once they were asked to.
        restarting: told of the failures before all ranks are started anew, and how often that was done before; of no
            failures, where it is because of another machine.
        end_leftovers: ends what the ranks of an attempt have left running.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs,
        grace_seconds: int,
        restarting: Callable[[Failures, int], None],
        end_leftovers: Callable[[], None],
    ) -> None:
        super().__init__(spec=spec, logs_specs=logs_specs, shutdown_timeout=grace_seconds)
        self._restarting = restarting
        self._end_leftovers = end_leftovers

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED and self._remaining_restarts > 0:
            self._restarting(result.failures, self._num_restarts)
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state is WorkerState.HEALTHY:  # another machine has asked for it
            self._restarting(NobodyFailed, self._num_restarts)
            self._remaining_restarts -= 1
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup, *others: Any) -> None:
        super()._stop_workers(worker_group, *others)
        self._end_leftovers()

    @property
    def _num_restarts(self) -> int:
        return int(self._worker_group.spec.max_restarts - self._remaining_restarts)
