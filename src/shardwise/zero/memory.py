"""What a rank holds, counted from its tensors, beside what the formula says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.comm.base import Communicator
from shardwise.precision import master_dtype
from shardwise.zero.offloading import Offloading
from shardwise.zero.sharding import StateBytes, state_bytes, sum_bytes
from shardwise.zero.step import Step
from shardwise.zero.unit import Unit


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes of this rank at the moment of the report."""

    parameters_bytes: int
    """Parameters at rest: whole, or this rank's shards."""
    gradients_bytes: int
    """Gradients at rest."""
    optimizer_bytes: int
    """The optimizer's own state, and masters that are apart from the parameters."""
    buffers_bytes: int
    """Whole parameters and gradient buffers that are live now, and gradient buffers kept for the next pass."""
    host_bytes: int
    """Host memory of states off the device, and of what they pass through."""
    nvme_bytes: int
    """Bytes of this rank's files."""
    predicted_bytes: int
    """Model states at rest by the formula of ``state_bytes``; equals ``states_bytes``."""
    num_parameters: int
    """Elements of the model's parameters, alignment not counted."""
    secondary_bytes: int = 0
    """Shards over the node that hpZ keeps between steps, and errors that are fed back to quantised gradients."""
    checkpoint_bytes: int = 0
    """Host memory that saves beside training copy to, kept from one to the next."""

    @property
    def states_bytes(self) -> int:
        """Model states at rest."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        """Model states, secondary shards, buffers and copies for saves; files apart."""
        kept = self.secondary_bytes + self.checkpoint_bytes
        return self.states_bytes + self.buffers_bytes + self.host_bytes + kept

    def __str__(self) -> str:
        rows = [
            ("parameters", self.parameters_bytes),
            ("gradients", self.gradients_bytes),
            ("optimizer", self.optimizer_bytes),
            ("model states", self.states_bytes),
            ("  by formula", self.predicted_bytes),
            *([("secondary", self.secondary_bytes)] if self.secondary_bytes else []),
            ("buffers", self.buffers_bytes),
            *([("host memory", self.host_bytes)] if self.host_bytes else []),
            *([("copy for saves", self.checkpoint_bytes)] if self.checkpoint_bytes else []),
            ("total", self.total_bytes),
            *([("files", self.nvme_bytes)] if self.nvme_bytes else []),
        ]
        per_parameter = max(1, self.num_parameters)
        return "\n".join(f"{name:<14}{size:>16,d} B {size / per_parameter:>8.2f} B/parameter" for name, size in rows)


def report_memory(
    comm: Communicator, units: Sequence[Unit], step: Step | None, offloading: Offloading, checkpoint_bytes: int = 0
) -> MemoryReport:
    """Count what is allocated, and compute what should be."""
    segments = [segment for unit in units for segment in unit.segments]
    counted = [segment.resting_bytes() for segment in segments]
    predicted = sum_bytes(
        state_bytes(
            segment.layout,
            comm.rank,
            segment.sharding,
            segment.dtype.itemsize,
            master_dtype(segment.dtype).itemsize,
            segment.trainable,
            segment.gradients is not None,
            segment.places,
            None if segment.codes is None else segment.codes.numel,
        )
        for segment in segments
    )
    local_gradients = step.local_gradient_bytes() if step is not None else 0
    state = step.state_bytes() if step is not None else 0
    predicted_state = step.predicted_state_bytes() if step is not None else 0
    predicted += StateBytes(0, local_gradients, predicted_state)
    return MemoryReport(
        parameters_bytes=sum(parameters for parameters, _, _ in counted),
        gradients_bytes=sum(gradients for _, gradients, _ in counted) + local_gradients,
        optimizer_bytes=sum(masters for _, _, masters in counted) + state,
        buffers_bytes=sum(unit.live_bytes() for unit in units) + comm.pooled_bytes() + comm.scratch_bytes(),
        host_bytes=offloading.host_bytes,
        nvme_bytes=offloading.nvme_bytes,
        predicted_bytes=predicted.total,
        num_parameters=sum(slot.numel for segment in segments for slot in segment.layout.slots),
        secondary_bytes=comm.secondary_bytes(),
        checkpoint_bytes=checkpoint_bytes,
    )
