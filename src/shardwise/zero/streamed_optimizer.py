"""The step where states rest off the device: a stream of windows through a few slabs of host memory.

::

    window    k - 1          k                       k + 1, k + 2, ...
              -> store       gradient, master and    store ->
                             moments are stepped

Each window's tensors exist all the time, for the optimizer knows its parameters by identity; they have memory only
while the window is in memory. Where the store is itself memory, nothing moves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from shardwise.errors import CheckpointError, ConfigError
from shardwise.optim.probe import OptimizerTraits
from shardwise.store.base import Transfer
from shardwise.zero.guard import guard
from shardwise.zero.offloaded_parameters import OffloadedParameters
from shardwise.zero.optimizer import Run, SavedStates, ShardedOptimizer, is_unused, others_beside, split_state
from shardwise.zero.rest import Rest
from shardwise.zero.shard_states import GRADIENT, MASTER, VALUES, Loaded, ShardStates
from shardwise.zero.unit import Segment, Unit
from shardwise.zero.window_stream import Visit, WindowStream


class StreamedOptimizer(ShardedOptimizer):
    """Steps ``inner`` over this rank's runs, of which some rest in stores.

    Args:
        inner: the user's optimizer.
        traits: what ``probe_optimizer`` measured.
        units: all units.
        max_run_numel: elements that one run may hold.
        depth: windows in memory at a time: one that is stepped, the others on their way in.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        traits: OptimizerTraits,
        units: Sequence[Unit],
        max_run_numel: int,
        depth: int,
    ) -> None:
        if not traits.streamable:
            raise ConfigError(
                f"{type(inner).__name__} gives other results when it steps its parameters one after the other, and "
                "offload_optimizer streams them. Set offload_optimizer.device to none, or take another optimizer."
            )
        self._streamed = [unit for unit in units if any(segment.states is not None for segment in unit.segments)]
        self._depth = depth
        self._kept: dict[torch.Tensor, frozenset[str]] = {}
        """The kinds of state that the store holds of each run."""
        super().__init__(inner, traits, units, max_run_numel, unit_by_unit=False)

    def _cut(self, segment: Segment) -> list[Run]:
        # Whole parameters need no further cut: windows end where parameters do.
        if segment.states is None or segment.gradients is None or not self._traits.elementwise:
            return super()._cut(segment)
        spans = [window.span for window in segment.states.windows]
        if segment.layout.world == 1:
            # As a rank alone steps whose states are on the device: fused kernels round the ends of tensors otherwise.
            spans = [piece.within_buffer for span in spans for piece in segment.layout.pieces(span)]
        return [
            self._run(segment, group, part)
            for span in spans
            for group, part in segment.layout.runs(span, self._max_run_numel)
        ]

    def _take_over_state(self) -> None:
        """What was made for the user's parameters (Adagrad makes it at once) moves to the runs, and on to the store."""
        super()._take_over_state()
        for run in (run for runs in self._runs.values() for run in runs):
            if run.segment.states is not None and run.tensor in self.inner.state:
                elementwise, _ = split_state(self.inner.state[run.tensor], run.tensor)
                for kind, value in elementwise.items():
                    run.segment.states.write(self._known(kind, run.segment.states), run.span, value.reshape(-1))
                    del self.inner.state[run.tensor][kind]
                self._kept[run.tensor] = frozenset(elementwise)

    def _known(self, kind: str, states: ShardStates) -> str:
        if kind not in states.plan.state_kinds:
            raise ConfigError(
                f"{type(self.inner).__name__} has made a state {kind!r} that it did not make when it was tried. "
                "offload_optimizer has no room for it: set its device to none."
            )
        return kind

    # ------------------------------------------------------------------------------------------------------ step

    def step(self, unused: frozenset[str], stepped: frozenset[Unit]) -> Iterator[list[Unit]]:
        """Step everything but the parameters named in ``unused``; yields units as they are done."""
        if unused:
            self._split_runs(unused)
        self._stepping = threading.get_ident()
        try:
            yield self._step_resident(unused)
            yield from self._step_streamed(unused, stepped)
        finally:
            self._stepping = None
            self._point_groups(run for runs in self._runs.values() for run in runs)

    def _step_resident(self, unused: frozenset[str]) -> list[Unit]:
        """What is in memory, at once; returns the units that have nothing else."""
        resident = [run for runs in self._runs.values() for run in runs if run.segment.states is None]
        used = [run for run in resident if not unused or not is_unused(run, unused)]
        self._point_groups(used)
        if used:
            self.inner.step()
        return [unit for unit in self._runs if unit not in self._streamed]

    def _step_streamed(self, unused: frozenset[str], stepped: frozenset[Unit]) -> Iterator[list[Unit]]:
        """Window by window; a unit is yielded on every rank, also where this rank has nothing to step of it."""
        units = [unit for unit in self._streamed if unit not in stepped]
        stream = WindowStream(units, partial(self._visits, unused=unused), self._depth, self._start_load)
        for unit in self._streamed:
            while (visit := stream.next_of(unit)) is not None:
                self._step_window(visit)
            yield [unit]

    def streams(self, unit: Unit) -> bool:
        """Whether some of its states rest off the device."""
        return unit in self._streamed

    def early_stream(self, order: Sequence[Unit]) -> WindowStream:
        """For ``step_early``, the windows of those of these units that are streamed; their gradients come elsewhere.

        A slab is left for those who bring gradients to the store meanwhile.
        """
        units = [unit for unit in order if self.streams(unit)]
        visits_of = partial(self._visits, unused=frozenset())
        return WindowStream(units, visits_of, max(1, self._depth - 1), partial(self._start_load, with_gradient=False))

    def step_early(self, unit: Unit, stream: WindowStream) -> None:
        """Step what of a unit rests off the device, before ``step``, in any thread; all its parameters are used."""
        self._stepping = threading.get_ident()
        try:
            stream.skip_to(unit)
            while (visit := stream.next_of(unit)) is not None:
                self._step_window(visit)
        finally:
            self._stepping = None

    def _visits(self, unit: Unit, unused: frozenset[str]) -> Iterator[Visit]:
        for segment in unit.segments:
            if segment.states is None or segment.gradients is None:
                continue
            own = [run for run in self._runs[unit] if run.segment.parameters is segment.parameters]
            for window in segment.states.windows:
                runs = [run for run in own if run.span.intersect(window.span).numel]
                used = [run for run in runs if not unused or not is_unused(run, unused)]
                if used:
                    yield Visit(unit, segment, segment.states, window, used)

    def _start_load(self, visit: Visit, with_gradient: bool = True) -> None:
        plan, home, gradients = visit.states.plan, visit.segment.parameters, visit.segment.gradients
        has_state = any(self._kept.get(run.tensor) for run in visit.runs)
        kinds = [kind for kind, _ in plan.kinds if has_state or kind not in plan.state_kinds]
        if not with_gradient or (gradients is not None and not gradients.is_in_store):
            kinds = [kind for kind in kinds if kind != GRADIENT]
        loaded = visit.states.start_load(visit.window, kinds)
        if plan.values is not None and not plan.holds(MASTER):
            assert isinstance(home, OffloadedParameters)
            loaded.also(home.start_read(visit.window.span, loaded.bytes(VALUES)))
        visit.loaded = loaded

    def _step_window(self, visit: Visit) -> None:
        plan, loaded = visit.states.plan, visit.loaded
        assert loaded is not None
        loaded.wait()
        gradient = self._gradient(visit, loaded)
        for run in visit.runs:
            self._bind(run, visit.states, loaded)
            if gradient is not None:
                place = run.span.shift(-visit.window.span.begin)
                run.tensor.grad = gradient[place.begin : place.end].view(run.tensor.shape)
        self._point_groups(visit.runs)
        self.inner.step()
        for run in visit.runs:
            self._unbind(run, visit.states, loaded)
        leaving = self._hand_over(visit, loaded)
        visit.states.start_keep(loaded, [kind for kind, _ in plan.kinds if kind != GRADIENT], leaving)

    @staticmethod
    def _gradient(visit: Visit, loaded: Loaded) -> torch.Tensor | None:
        """[window] what is stepped with; None where it is the tensors' own already."""
        if not visit.states.plan.holds(GRADIENT) or visit.segment.gradients is None:
            return None
        span = visit.window.span
        place = span.shift(-visit.segment.parameters.master_span.begin)
        return visit.segment.gradients.for_window(place, loaded.values(GRADIENT, span))

    def _hand_over(self, visit: Visit, loaded: Loaded) -> Sequence[Transfer]:
        """The stepped values, to where the parameters rest; nothing where they were stepped in their own memory."""
        plan, span = visit.states.plan, visit.window.span
        if plan.holds(MASTER):
            stepped = loaded.values(MASTER, span)
            if plan.values is not None:
                stepped = loaded.values(VALUES, span).copy_(stepped)
        elif plan.values is not None:
            stepped = loaded.values(VALUES, span)
        else:
            return ()
        return visit.segment.parameters.accept(span, stepped)

    def _bind(self, run: Run, states: ShardStates, loaded: Loaded) -> None:
        """Give the run's tensors memory."""
        tensor, plan = run.tensor, states.plan
        source = MASTER if plan.holds(MASTER) else VALUES if plan.values is not None else None
        if source is not None:
            tensor.data = loaded.values(source, run.span).view(tensor.shape)
        for kind in self._kept.get(tensor, ()):
            self.inner.state[tensor][kind] = loaded.values(kind, run.span).view(tensor.shape)

    def _unbind(self, run: Run, states: ShardStates, loaded: Loaded) -> None:
        """Take the memory away again; state that the step has made anew moves to its place in the window."""
        tensor, plan = run.tensor, states.plan
        elementwise, _ = split_state(self.inner.state[tensor], tensor)
        for kind, value in elementwise.items():
            place = loaded.values(self._known(kind, states), run.span).view(tensor.shape)
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)
            del self.inner.state[tensor][kind]
        self._kept[tensor] = frozenset(elementwise)
        if plan.holds(MASTER) or plan.values is not None:
            tensor.data = guard(tensor.shape, tensor.dtype, tensor.device)
        if plan.holds(GRADIENT):
            tensor.grad = guard(tensor.shape, tensor.dtype, tensor.device)

    def _split(self, run: Run, unused: frozenset[str]) -> list[Run]:
        parts = super()._split(run, unused)
        if run.tensor in self._kept and parts[0] is not run:
            kept = self._kept.pop(run.tensor)
            self._kept.update((part.tensor, kept) for part in parts)
        return parts

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _has_state(self, run: Run) -> bool:
        return super()._has_state(run) or run.tensor in self._kept

    def _elementwise_of(self, run: Run) -> Mapping[str, Rest]:
        states = run.segment.states
        if states is None:
            return super()._elementwise_of(run)
        kept = self._kept.get(run.tensor, frozenset())
        return {kind: states.rest(kind, run.span) for kind in states.plan.state_kinds if kind in kept}

    def _forget_states(self) -> None:
        super()._forget_states()
        self._kept.clear()

    def _read_state(self, run: Run, saved: SavedStates) -> Callable[[], None]:
        """Checked before anything changes, and brought to the store piece by piece."""
        if run.segment.states is None:
            return super()._read_state(run, saved)
        pieces = list(run.segment.layout.pieces(run.span))
        name = run.segment.names[pieces[0].slot]
        others = others_beside(saved.others(name), run.tensor, self.inner.param_groups[run.group])
        kinds = list(saved.kinds(name))
        unknown = [kind for kind in kinds if kind not in run.segment.states.plan.state_kinds]
        if unknown:
            raise CheckpointError(
                f"the checkpoint holds the state {unknown[0]!r} of {name!r}, for which offload_optimizer has no room: "
                f"{type(self.inner).__name__} with the present settings does not make it."
            )

        states, names = run.segment.states, run.segment.names
        for kind in kinds:
            for piece in pieces:
                saved.check_state(kind, names[piece.slot], piece.within_parameter)

        def install() -> None:
            self.inner.state[run.tensor] = others
            self._kept[run.tensor] = frozenset(kinds)
            for kind in kinds:
                for piece in pieces:
                    values = torch.empty(piece.within_buffer.numel, dtype=states.plan.dtype(kind))
                    saved.read_state_now(kind, names[piece.slot], piece.within_parameter, values)
                    states.write(kind, piece.within_buffer, values)

        return install

    # --------------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Let the inner optimizer go."""
        super().close()
        self._kept.clear()
