"""ZeRO++: collectives in two hops, of which the one across nodes carries as little as can be.

World of W ranks on N nodes of s ranks each; M elements of a buffer, of which every rank owns n = M/W.

**All-gather.** Across nodes first, among the ranks that have the same place on their nodes, then inside each node::

    encode(shard) -> [N, n] across nodes -> [N, s, n] inside the node -> decode

What the first hop brings is a shard of the buffer over the node. hpZ keeps it, as the *secondary shard*, until the
parameters change: all gathers between two steps but the first stay inside the node. qwZ sends (and keeps) codes.

**Reduce-scatter** (qgZ)::

    encode(gradient) -> all-to-all inside the node -> decode, add in fp32 -> encode -> all-to-all across nodes
                     -> decode, add in fp32

Rows travel to the place of their owner first and to its node second, so every rank ends with its own shard, and a value
is rounded twice however many ranks there are. A hop of one rank is left out.

Wang et al., "ZeRO++: Extremely Efficient Collective Communication for Giant Model Training" (2023), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardwise.comm.base import CollectiveId, Communicator, Cuts, Pending
from shardwise.comm.hops import Hop
from shardwise.comm.relay import Relay
from shardwise.comm.steps import Steps, begin
from shardwise.comm.traffic import wire_of
from shardwise.quantize import Quantizer
from shardwise.store.beside import Beside


@dataclass(frozen=True, slots=True)
class TwoHopSettings:
    """What travels how."""

    weights: Quantizer | None = None
    """qwZ: of gathered parameters."""
    gradients: Quantizer | None = None
    """qgZ: of reduced gradients."""
    keeps_secondary: bool = False
    """hpZ."""
    gathers: bool = False
    """Gather in two hops though nothing is quantised or kept."""
    feeds_error_back: bool = False
    """What quantisation took from a gradient is added to the next one."""
    factor: float = 1.0
    """What the sum of gradients over ranks is multiplied by."""

    @property
    def gathers_in_two_hops(self) -> bool:
        """Whether the gathers are other than those of the transport below."""
        return self.gathers or self.keeps_secondary or self.weights is not None


class TwoHop(Relay):
    """Even cuts in two hops; everything else by the transport below."""

    def __init__(self, inner: Communicator, inside: Hop, across: Hop, settings: TwoHopSettings) -> None:
        super().__init__(inner)
        assert not inner.one_sided_gathers
        self.rounds_gathers = settings.weights is not None
        self._inside = inside
        self._across = across
        self._settings = settings
        self._beside = Beside(inner.device)
        self._secondary: dict[str, torch.Tensor] = {}
        """By unit: [N, n] in the compute dtype, or [N, bytes] of codes; valid while the parameters are."""
        self._leftover: dict[str, torch.Tensor] = {}
        """By unit and hop: what the last encoding took away, where errors are fed back."""

    # -------------------------------------------------------------------------------------------------- all-gather

    def _all_gather(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        if not self._settings.gathers_in_two_hops:
            return self._inner._all_gather(identity, output, shard)
        return begin(self._gather_steps(identity, output, shard), self._beside)

    def _all_gather_exactly(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        if self._settings.weights is None:
            return self._all_gather(identity, output, shard)
        return self._inner._all_gather(identity, output, shard)

    def _gather_steps(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Steps:
        quantizer = self._settings.weights if output.is_floating_point() else None
        wire = wire_of(output.dtype) if quantizer is None else quantizer.format.name
        numel, by_rank = shard.numel(), output.view(self.size, -1)
        if quantizer is None:
            rows = by_rank
        else:
            rows = output.new_empty(self.size, quantizer.wire_bytes(numel), dtype=torch.uint8)
        near = self._secondary.get(identity.unit)
        if near is None:
            near = rows.new_empty(self._across.size, rows.shape[1])
            mine = near[self._across.place]
            if quantizer is None:
                mine.copy_(shard)
            else:
                # In the dtype that parameters compute in, which is what rests of them where a store holds the masters.
                quantizer.encode(shard.to(output.dtype)[None], mine[None])
            yield [self._across.gather(identity, near, mine, "all-gather", wire)]
            if self._settings.keeps_secondary:
                self._secondary[identity.unit] = near
        of_nodes = rows.view(self._across.size, self._inside.size, -1)
        yield [
            self._inside.gather(identity, of_node, mine, "all-gather", wire)
            for of_node, mine in zip(of_nodes, near, strict=True)
        ]
        if quantizer is not None:
            quantizer.decode(rows, by_rank)

    def publish(self) -> None:
        """Parameters may have changed: what was kept of them is outdated."""
        self._secondary.clear()
        self._inner.publish()

    # ---------------------------------------------------------------------------------------------- reduce-scatter

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        quantizer = self._settings.gradients
        if quantizer is None:
            return self._inner._reduce_scatter(identity, buffer, cuts, shard, accumulate)
        return begin(self._reduce_steps(identity, quantizer, buffer, shard, accumulate), self._beside)

    def _reduce_steps(
        self, identity: CollectiveId, quantizer: Quantizer, buffer: torch.Tensor, shard: torch.Tensor, accumulate: bool
    ) -> Steps:
        wire = quantizer.format.name
        near, far = self._inside.size, self._across.size
        total = buffer.view(self.size, -1)
        if near > 1:
            codes = self._encode(quantizer, total, f"{identity.unit} inside")
            sent = codes.view(far, near, -1).transpose(0, 1).reshape(near, -1)
            received = torch.empty_like(sent)
            yield [self._inside.scatter(identity, received, sent, "reduce-scatter", wire)]
            total = self._sum(quantizer, received.view(near, far, -1), shard.numel())
        if far > 1:
            sent = self._encode(quantizer, total, f"{identity.unit} across")
            received = torch.empty_like(sent)
            yield [self._across.scatter(identity, received, sent, "reduce-scatter", wire)]
            total = self._sum(quantizer, received.view(far, 1, -1), shard.numel())
        mean = total.view(-1).mul_(self._settings.factor)
        if accumulate:
            shard.add_(mean)
        else:
            shard.copy_(mean)

    def _encode(self, quantizer: Quantizer, values: torch.Tensor, place: str) -> torch.Tensor:
        """[rows, bytes] of ``values`` [rows, n], which may be changed."""
        codes = values.new_empty(values.shape[0], quantizer.wire_bytes(values.shape[1]), dtype=torch.uint8)
        if not self._settings.feeds_error_back:
            quantizer.encode(values, codes)
            return codes
        leftover = self._leftover.get(place)
        if leftover is None:
            leftover = self._leftover[place] = torch.zeros_like(values)
        values.add_(leftover)
        quantizer.encode(values, codes)
        quantizer.decode(codes, leftover)
        torch.sub(values, leftover, out=leftover)
        # A step that overflowed is skipped, and nothing of it may come back.
        leftover.nan_to_num_(0.0, 0.0, 0.0)
        return codes

    def _sum(self, quantizer: Quantizer, codes: torch.Tensor, numel: int) -> torch.Tensor:
        """[rows, n] fp32: the values of ``codes`` [k, rows, bytes], added one after the other."""
        total = torch.empty(codes.shape[1], numel, dtype=torch.float32, device=codes.device)
        for row in range(codes.shape[1]):
            quantizer.sum_decoded(codes[:, row], total[row])
        return total

    # ------------------------------------------------------------------------------------------------------ memory

    def secondary_bytes(self) -> int:
        """Bytes of secondary shards and of errors that are fed back."""
        return sum(t.nbytes for kept in (self._secondary, self._leftover) for t in kept.values())

    def close(self) -> None:
        """Free what is kept, then the transport."""
        self._secondary.clear()
        self._leftover.clear()
        self._inner.close()
