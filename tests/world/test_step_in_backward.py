"""Steps beside backward change no bit, save the gradient's way through the file, and never pass for whole ones."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import shardwise
from shardwise.config import load_config
from shardwise.errors import ConfigError, StateError, StorageError
from shardwise.utils import GradientAccumulationPlugin
from shardwise.zero.access import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_set_full_grad,
)
from shardwise.zero.gathered import GatheredParameters
from shardwise.zero.streamed_optimizer import StreamedOptimizer
from tests import models
from tests.accelerators import accelerator_of, loader_of, loss_of, model_of
from tests.checkpoints import optimizer_parts
from tests.models import Block
from tests.references import GPT, MLP, WIDE, Recipe, assert_same
from tests.scripts import run_on_ranks
from tests.slow_store import Disk, SlowStore
from tests.world import test_offload_schedule as paper
from tests.world.engine_runs import Config, config_of, open_engine, rank, train_with_engine
from tests.world.offload_runs import host_memory_apart, zero_block
from tests.world.test_recovery import MishapError, build_fragile
from tests.world.test_unused_parameters import parts_unused_on_some_ranks, same_branch_on_all_ranks, with_choice
from tests.worlds import World

ALL = ("cpu", "nvme")


@contextmanager
def stepped_early() -> Iterator[list[str]]:
    """The names of the units that are stepped beside backward."""
    names: list[str] = []
    step = StreamedOptimizer.step_early

    def noted(self, unit, stream):
        step(self, unit, stream)
        names.append(unit.name)

    with mock.patch.object(StreamedOptimizer, "step_early", noted):
        yield names


def early_config(
    stage: int, parameter: str, optimizer: str, directory: Path, window: int = 5000, **settings: object
) -> Config:
    zero = {**zero_block(parameter, optimizer, directory), "sub_group_size": window}
    return config_of(stage, zero=zero, shardwise={"step_in_backward": True}, **settings)


# --- bits -------------------------------------------------------------------------------------------------------------


def changes_no_bit(recipe: Recipe, configs: dict[str, Config]) -> None:
    for name, config in configs.items():
        with host_memory_apart():
            expected = train_with_engine(recipe, {**config, "shardwise": {}})
            with stepped_early() as units:
                found = train_with_engine(recipe, config)
        assert_same(found, expected, name)
        assert found.norms == expected.norms, name
        assert units, f"{name}: nothing was stepped beside backward"


def compare(world: World, recipe: Recipe, configs: dict[str, Config]) -> None:
    world.run(changes_no_bit, recipe, configs)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_places_and_stages(world: World, tmp_path: Path) -> None:
    pairs = [*((stage, "none", place) for stage in (1, 2, 3) for place in ALL), (3, "nvme", "nvme"), (3, "cpu", "nvme")]
    if world.size > 1:
        pairs = pairs[1::2]
    configs = {str(pair): early_config(*pair, tmp_path, accumulation=2) for pair in pairs}
    configs["part of them"] = early_config(3, "nvme", "nvme", tmp_path, accumulation=2)
    configs["part of them"]["zero_optimization"]["offload_optimizer"]["ratio"] = 0.5
    compare(world, dataclasses.replace(MLP, accumulation=2), configs)
    assert not list(tmp_path.glob("*/*")), "files were left behind"


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_wide_odd_shapes(world: World, tmp_path: Path) -> None:
    recipe = dataclasses.replace(WIDE, steps=3, accumulation=2)
    compare(world, recipe, {"files": early_config(3, "nvme", "nvme", tmp_path, window=200_000, accumulation=2)})


def test_units_of_which_a_rank_has_nothing(world2: World, tmp_path: Path) -> None:
    recipe = dataclasses.replace(MLP, model=models.build_crumbs, steps=4)
    compare(world2, recipe, {"files": early_config(2, "none", "nvme", tmp_path)})


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_sixteen_bits_and_tied_parameters(world: World, tmp_path: Path) -> None:
    narrow = {"bf16": {"enabled": True}}
    configs = {
        "-".join(map(str, case)): early_config(*case, tmp_path, **narrow)
        for case in ((1, "none", "nvme"), (2, "none", "cpu"), (3, "nvme", "nvme"))
    }
    compare(world, dataclasses.replace(GPT, steps=4), configs)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_parameters_and_branches_without_a_gradient(world: World, tmp_path: Path) -> None:
    configs = {f"stage {stage}": early_config(stage, "none", "nvme", tmp_path) for stage in (2, 3)}
    for model, batch in (
        (models.build_optional, parts_unused_on_some_ranks),
        (models.build_branches, same_branch_on_all_ranks),
    ):
        recipe = dataclasses.replace(MLP, model=model, batch=batch, loss=with_choice, steps=6)
        compare(world, recipe, configs)


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant", "one_region"])
def test_recomputation(world2: World, checkpointing: models.Checkpointing, tmp_path: Path) -> None:
    recipe = dataclasses.replace(GPT, model=functools.partial(models.build_gpt, checkpointing=checkpointing))
    compare(world2, recipe, {"files": early_config(3, "nvme", "nvme", tmp_path)})


def weights_of_steps_of_two_passes(config: Config) -> dict[str, Tensor]:
    model = MLP.model()
    with open_engine(model, MLP.optimizer(model), config) as engine:
        for step in range(3):
            first, last = (MLP.loss(engine, MLP.batch(index, rank())) for index in (step, step + 5))
            with engine.no_sync():
                engine.backward(first)
            engine.backward(last)
            engine.step()
        whole: dict[str, Tensor] = engine.state_dict()
    return whole


def passes_under_no_sync_add_up(config: Config) -> None:
    plain = weights_of_steps_of_two_passes({**config, "shardwise": {}})
    with stepped_early() as units:
        early = weights_of_steps_of_two_passes(config)
    assert units
    assert all(torch.equal(value, plain[name]) for name, value in early.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_several_passes_of_one_step(world2: World, stage: int, tmp_path: Path) -> None:
    world2.run(passes_under_no_sync_add_up, early_config(stage, "none", "nvme", tmp_path))


# --- what is saved ----------------------------------------------------------------------------------------------------


def traffic_of_a_step(config: Config) -> tuple[int, int, int, int]:
    """Bytes read and written, and of the gradient in the windows: with what rounds it up to pages, and without."""
    recipe = MLP
    model = recipe.model()
    with open_engine(model, recipe.optimizer(model), config) as engine:
        for index in range(2):  # the first one makes the optimizer's state
            before = engine._offloading._state_store.traffic
            engine.backward(recipe.loss(engine, recipe.batch(index, rank())))
            engine.step()
            engine._offloading.settle()
        moved = engine._offloading._state_store.traffic.since(before)
        plans = [(s.states.plan, w.span.numel) for s in engine._segments if s.states for w in s.states.windows]
    pages = sum(plan.begin("exp_avg", numel) for plan, numel in plans)
    return moved.bytes_read, moved.bytes_written, pages, sum(4 * numel for _, numel in plans)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_the_gradient_does_not_pass_through_the_file(world: World, tmp_path: Path) -> None:
    config = early_config(2, "none", "nvme", tmp_path)
    plain = world.run(traffic_of_a_step, {**config, "shardwise": {}})
    early = world.run(traffic_of_a_step, config)
    for (read, written, pages, gradient), (early_read, early_written, *_) in zip(plain, early, strict=True):
        assert read - early_read == pages
        assert written - early_written == gradient
        assert early_read == early_written  # masters are in memory, moments pass both ways


class AtOnce:
    """A worker that does each job when it is handed over, in the same thread: time on paper is exact."""

    def __init__(self, name: str, around: object) -> None:
        pass

    def put(self, job: Callable[[], None]) -> None:
        with torch.no_grad():
            job()

    def wait_until(self, holds: Callable[[], bool]) -> None:
        assert holds()

    def finish(self) -> None:
        pass

    drop = close = finish


def hides_the_step(directory: str) -> None:
    case = paper.Case(read_seconds=0.6, write_seconds=0.6)
    expected, _ = paper.train(case.build(), case.config(), Disk())
    disk = case.disk()
    optimizer_step, inside, outside = shardwise.Engine.step, 0, 0

    def counted(engine: Any) -> None:
        nonlocal inside, outside
        outside = len(disk.log) - inside
        optimizer_step(engine)
        inside = len(disk.log) - outside

    config = early_config(3, "nvme", "nvme", Path(directory), window=paper.WINDOW)
    with (
        mock.patch("shardwise.zero.offloading.SwapFile", lambda path, io: SlowStore(disk)),
        mock.patch("shardwise.zero.early_steps.Worker", AtOnce),
        mock.patch.object(shardwise.Engine, "step", counted),
    ):
        found, spent = paper.train(case.build(), config, disk)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert inside == 0, "step() has something left to read, to write or to compute"
    assert all(phases["step"].elapsed == 0.0 for phases in spent)
    # A pass waits for its first layer, which waits for the last window's write, and for no other window.
    for phases in spent[1:]:
        waited = sum(phases[phase].elapsed - phases[phase].work for phase in ("forward", "backward"))
        assert waited <= 2 * 0.6 + 0.01, phases


def test_the_steps_transfers_are_hidden(world1: World, tmp_path: Path) -> None:
    world1.run(hides_the_step, str(tmp_path))


def landings_are_counted(config: Config) -> None:
    recipe = MLP
    reports = []
    for each in ({**config, "shardwise": {}}, config):
        model = recipe.model()
        with open_engine(model, recipe.optimizer(model), each) as engine:
            reports.append(engine.memory_report().host_bytes)
            largest = max(sum(s.layout.shard(engine._comm.rank).numel for s in u.segments) for u in engine._units)
    pages = -(-4 * largest // 4096) * 4096
    assert reports[1] - reports[0] == 2 * pages


def test_memory_for_gradients_is_that_of_two_units(world2: World, tmp_path: Path) -> None:
    world2.run(landings_are_counted, early_config(2, "none", "nvme", tmp_path))


# --- what is refused in between ---------------------------------------------------------------------------------------


def refusals(engine: Any, optimizer: Any, other_loss: torch.Tensor, directory: str) -> dict[str, Callable[[], object]]:
    """What a script may not do between the backward pass that has begun a step and step()."""
    parameter = next(iter(engine.module.parameters()))
    return {
        "backward": lambda: engine.backward(other_loss),
        "forward": lambda: engine(MLP.batch(0, 0)[0]),
        "clip norm": lambda: engine.clip_grad_norm_(1.0),
        "clip value": lambda: engine.clip_grad_value_(1.0),
        "zero_grad": engine.zero_grad,
        "zero_grad of the optimizer": optimizer.zero_grad,
        "gradient": lambda: safe_get_full_grad(parameter),
        "local gradient": lambda: safe_get_local_grad(parameter),
        "set gradient": lambda: safe_set_full_grad(parameter, torch.zeros(parameter.shape)),
        "value": lambda: safe_get_full_fp32_param(parameter),
        "state": lambda: safe_get_full_optimizer_state(parameter, "exp_avg"),
        "gathered": lambda: engine.gathered_parameters().__enter__(),
        "GatheredParameters": lambda: GatheredParameters(parameter).__enter__(),
        "state_dict": engine.state_dict,
        "load_state_dict": lambda: engine.load_state_dict({}),
        "save": lambda: engine.save_checkpoint(directory),
        "load": lambda: engine.load_checkpoint(directory),
        "weights": lambda: engine.save_16bit_model(directory),
        "gather": engine.gather_state_dict,
        "group": engine.take_in_new_groups,
    }


def is_refused_in_between(config: Config, directory: str) -> None:
    expected = train_with_engine(dataclasses.replace(MLP, steps=2), {**config, "shardwise": {}})
    model = MLP.model()
    inner = MLP.optimizer(model)
    engine, optimizer, _, _ = shardwise.initialize(model=model, optimizer=inner, config=config)
    with engine:
        for step in range(2):
            loss, other = (MLP.loss(engine, MLP.batch(index, rank())) for index in (step, step + 7))
            engine.backward(loss)
            for name, refused in refusals(engine, optimizer, other, directory).items():
                with pytest.raises(StateError, match="step_in_backward"):
                    refused()
                    raise AssertionError(f"{name} was not refused")
            with pytest.raises(StateError, match="passed to initialize"):
                inner.step()
            engine.set_gradient_accumulation_boundary(False)
            with pytest.raises(StateError, match="where no step ends"):
                engine.step()
            engine.set_gradient_accumulation_boundary(None)
            before = inner.param_groups[1]["lr"]
            inner.param_groups[1]["lr"] = 1.0
            with pytest.raises(StateError, match="'lr' of the optimizer's group 1 was"):
                engine.step()
            inner.param_groups[1]["lr"] = before
            engine.step()
        weights = engine.state_dict()
    assert all(torch.equal(value, expected.weights[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("world", "place"), [(1, (1, "none", "nvme")), (2, (2, "none", "nvme")), (2, (3, "nvme", "nvme"))],
    indirect=["world"], ids=str,
)  # fmt: skip
def test_nothing_comes_between_backward_and_step(world: World, place: tuple[int, str, str], tmp_path: Path) -> None:
    world.run(is_refused_in_between, early_config(*place, tmp_path), str(tmp_path / "saved"))


class LooksBack(Block):
    """In its backward pass it runs a block whose gradients have all come."""

    later: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if out.requires_grad and self.later is not None:
            out.register_hook(self._look)
        return out

    def _look(self, gradient: Tensor) -> None:
        assert self.later is not None
        with torch.no_grad():
            self.later(torch.zeros(1, 37))


def a_unit_is_needed_again(config: Config) -> None:
    torch.manual_seed(0)
    model = models.Mlp(make_block=LooksBack)
    with open_engine(model, MLP.optimizer(model), config) as engine:
        object.__setattr__(model.blocks[0], "later", model.blocks[2])  # it is no part of the block
        engine.backward(MLP.loss(engine, MLP.batch(0, rank())))


def test_a_unit_that_is_needed_after_its_step_has_begun(world2: World, tmp_path: Path) -> None:
    for failure in world2.run_expecting_errors(a_unit_is_needed_again, early_config(3, "nvme", "nvme", tmp_path)):
        assert failure is not None
        assert failure.type_name == "StateError"
        assert "'blocks.2' was needed after all its gradients had come" in failure.message


# --- what goes wrong --------------------------------------------------------------------------------------------------


def goes_on_from_a_checkpoint(config: Config, directory: str) -> None:
    model: Any = build_fragile()
    with open_engine(model, MLP.optimizer(model), config) as engine:

        def train(index: int) -> None:
            engine.backward(MLP.loss(engine, MLP.batch(index, rank())))
            engine.step()

        def load_half() -> None:
            engine.load_checkpoint(directory, load_module_only=True)
            engine.state_dict()

        train(0)
        engine.save_checkpoint(directory)
        train(1)
        wanted = engine.state_dict()
        uses: list[Callable[[], object]] = [
            engine.step,
            engine.zero_grad,
            lambda: engine(MLP.batch(2, 0)[0]),
            load_half,
        ]
        for use in (None, *uses):
            model.blocks[0].fails_in = "backward"
            with stepped_early() as units:
                with pytest.raises(MishapError):
                    engine.backward(MLP.loss(engine, MLP.batch(5, rank())))
                engine._early._worker.finish()
            model.blocks[0].fails_in = ""
            assert "blocks.2" in units
            for _ in range(0 if use is None else 2):
                with pytest.raises(StateError, match=r"some units are stepped, others are not\. Load a checkpoint"):
                    use()
            engine.load_checkpoint(directory)
            train(1)
            assert all(torch.equal(value, wanted[name]) for name, value in engine.state_dict().items())


@pytest.mark.parametrize(
    ("world", "place"), [(1, (2, "none", "nvme")), (2, (3, "nvme", "nvme")), (2, (3, "none", "nvme"))],
    indirect=["world"], ids=str,
)  # fmt: skip
def test_a_pass_that_is_given_up(world: World, place: tuple[int, str, str], tmp_path: Path) -> None:
    world.run(goes_on_from_a_checkpoint, early_config(*place, tmp_path), str(tmp_path / "saved"))


def a_failing_disk_is_told(config: Config) -> None:
    stores: list[SlowStore] = []

    def make(path: Path, io: object) -> SlowStore:
        stores.append(SlowStore(Disk()))
        return stores[-1]

    told_by = set()
    for after in (0, 1, 6, 11):
        model = MLP.model()
        with (
            mock.patch("shardwise.zero.offloading.SwapFile", make),
            open_engine(model, MLP.optimizer(model), config) as engine,
        ):
            losses = [MLP.loss(engine, MLP.batch(index, rank())) for index in range(2)]
            stores[-1].fail_after = after
            moment = "backward"
            with pytest.raises(StorageError, match="as it was told to"):
                engine.backward(losses[0])
                moment = "step"
                with contextlib.suppress(StorageError):
                    engine.memory_report()  # it waits for the step's thread, too, and takes no failure away
                engine.step()
            told_by.add(moment)
            with pytest.raises(StateError, match="Load a checkpoint"):
                engine(MLP.batch(2, 0)[0])
    assert "step" in told_by


def test_a_disk_that_fails(world1: World, tmp_path: Path) -> None:
    world1.run(a_failing_disk_is_told, early_config(2, "none", "nvme", tmp_path, window=1000))


SCRIPT = """
import os, signal, sys, threading
import torch, shardwise
from tests import models

class Interrupts(models.Block):
    def forward(self, x):
        out = super().forward(x)
        out.register_hook(lambda _: os.kill(os.getpid(), signal.SIGINT) if interrupts else None)
        return out

interrupts = False
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.manual_seed(0)
model = models.Mlp(make_block=Interrupts)
engine, *_ = shardwise.initialize(
    model=model, optimizer=torch.optim.AdamW(model.parameters()),
    config={"train_micro_batch_size_per_gpu": 3, "shardwise": {"step_in_backward": True},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": sys.argv[1]}}})
for step in range(2):
    loss = models.regression(engine, models.vectors(step, 0))
    interrupts = step == 1
    if interrupts:
        print("interrupting", any(thread.name == "shardwise-step" for thread in threading.enumerate()), flush=True)
    engine.backward(loss)
    engine.step()
print("not interrupted")
"""


def test_an_interrupt_ends_the_script(tmp_path: Path) -> None:
    """Neither a thread nor a file outlives it."""
    (ended,) = run_on_ranks(1, SCRIPT, str(tmp_path))
    assert ended.stdout == "interrupting True\n", ended.stderr
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt"), ended.stderr
    assert ended.returncode != 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- beside others ----------------------------------------------------------------------------------------------------


def readers_are_waited_for(config: Config) -> None:
    with host_memory_apart():
        model = MLP.model()
        with open_engine(model, MLP.optimizer(model), config) as engine:
            engine.backward(MLP.loss(engine, MLP.batch(0, rank())))
            engine.step()
            reads, before = threading.Event(), optimizer_parts(engine)
            engine._step.readers.add(reads)
            engine.backward(MLP.loss(engine, MLP.batch(1, rank())))
            for (*_, now), (*_, then) in zip(optimizer_parts(engine), before, strict=True):
                assert torch.equal(now, then)
            reads.set()
            engine.step()
            changed = [
                not torch.equal(now, then)
                for (*_, now), (*_, then) in zip(optimizer_parts(engine), before, strict=True)
            ]
            assert all(changed)


def test_who_reads_the_states_is_waited_for(world1: World, tmp_path: Path) -> None:
    world1.run(readers_are_waited_for, early_config(2, "none", "cpu", tmp_path))


def trains_with_the_front(config: Config | None, directory: str) -> list[torch.Tensor]:
    with accelerator_of(config) as accelerator:
        model = model_of()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader_of(4))
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if accelerator.sync_gradients and accelerator.deepspeed_plugin.get_value("step_in_backward"):
                    for refused in (
                        lambda: accelerator.clip_grad_norm_(model.parameters(), 1.0),
                        lambda: accelerator.save_state(directory),
                        lambda: accelerator.load_state(directory),
                        lambda: accelerator.get_state_dict(model),
                    ):
                        with pytest.raises(StateError, match="step_in_backward"):
                            refused()
                optimizer.step()
                optimizer.zero_grad()
        return [value for value in accelerator.get_state_dict(model).values()]


def fronts_agree(config: Config, directory: str) -> None:
    plain = trains_with_the_front({**config, "shardwise": {}}, directory)
    with stepped_early() as units:
        early = trains_with_the_front(config, directory)
    assert units
    assert all(map(torch.equal, early, plain))


def test_the_front(world2: World, tmp_path: Path) -> None:
    config = early_config(3, "none", "nvme", tmp_path / "files", accumulation=2)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    del config["train_micro_batch_size_per_gpu"]
    world2.run(fronts_agree, config, str(tmp_path / "saved"))


def averaging_each_batch_is_refused(config: Config) -> None:
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    with accelerator_of(config, gradient_accumulation_plugin=plugin) as accelerator:
        model = model_of()
        with pytest.raises(ConfigError, match="sync_each_batch=True"):
            accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader_of(4))


def test_a_boundary_that_ends_no_step_is_refused(world1: World, tmp_path: Path) -> None:
    config = early_config(2, "none", "nvme", tmp_path, accumulation=2)
    del config["train_micro_batch_size_per_gpu"]
    world1.run(averaging_each_batch_is_refused, config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_optimization": {"stage": 2}}, "offload_optimizer.device is none"),
        ({"gradient_clipping": 1.0}, "found true with gradient_clipping"),
        ({"fp16": {"enabled": True}}, "found true with fp16"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "found true with fp16"),
    ],
)
def test_what_needs_all_gradients_first_is_refused(settings: Config, words: str) -> None:
    offloaded = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    config = {"zero_optimization": offloaded, "shardwise": {"step_in_backward": True}}
    load_config(config)
    with pytest.raises(ConfigError, match=words):
        load_config({**config, **settings})
