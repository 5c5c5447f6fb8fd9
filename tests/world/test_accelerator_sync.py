"""The fear: gradients are averaged on a micro-batch on which they should not be, or not on one on which they should.

Who steps by the prepared optimizer sees what travelled, counted in bytes; who has prepared no optimizer sees
``parameter.grad``, as with torch's own data parallelism.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardwise.accelerator import Accelerator
from shardwise.errors import ConfigError
from shardwise.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, GradientAccumulationPlugin
from tests.accelerators import accelerator_of, loader_of, loss_of, model_of
from tests.world.engine_runs import rank, world_size
from tests.worlds import World

BATCH = 4
NUM_BATCHES = 5  # of each rank; the fifth ends the loader in the middle of a step


def loader() -> Any:
    return loader_of(BATCH, BATCH * NUM_BATCHES * world_size())


def reduced_bytes(engine: Any) -> int:
    """That came in by reductions of gradients so far."""
    return sum(number for name, number in engine._comm.traffic.received_bytes.items() if "reduce" in name)


# --- with an optimizer: what travels ----------------------------------------------------------------------------------


def batches_that_reduce(stage: int | None, plugin: dict[str, Any]) -> list[bool]:
    """For each micro-batch, whether gradients travelled in it, from the third epoch on: the first ones learn."""
    config = None if stage is None else {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": BATCH}
    with accelerator_of(config, gradient_accumulation_plugin=GradientAccumulationPlugin(**plugin)) as accelerator:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, optimizer, batches = accelerator.prepare(model, optimizer, loader())
        for _ in range(3):
            found = []
            for batch in batches:
                before = reduced_bytes(engine)
                with accelerator.accumulate(engine):
                    accelerator.backward(loss_of(engine, batch))
                    optimizer.step()
                    optimizer.zero_grad()
                found.append(reduced_bytes(engine) > before)
        return found


@pytest.mark.parametrize("stage", [None, 1])
def test_gradients_travel_on_the_micro_batches_that_step(world2: World, stage: int | None) -> None:
    expected = [False, True, False, True, True]
    assert world2.run(batches_that_reduce, stage, {"num_steps": 2}) == [expected] * 2


@pytest.mark.parametrize("stage", [2, 3])
def test_sharded_gradients_travel_when_they_are_made(world2: World, stage: int) -> None:
    """There is no room for whole ones to wait in."""
    assert world2.run(batches_that_reduce, stage, {"num_steps": 2}) == [[True] * 5] * 2


def test_the_end_of_a_loader_need_not_end_a_step(world2: World) -> None:
    # 15 micro-batches of three epochs: the last epoch's are the 11th to the 15th
    expected = [False, True, False, True, False]
    found = world2.run(batches_that_reduce, None, {"num_steps": 2, "sync_with_dataloader": False})
    assert found == [expected] * 2


def test_every_micro_batch_may_be_averaged(world2: World) -> None:
    found = world2.run(batches_that_reduce, None, {"num_steps": 2, "sync_each_batch": True})
    assert found == [[True] * 5] * 2


def bytes_of_a_step(hook: str) -> int:
    handlers = [DistributedDataParallelKwargs(comm_hook=hook)]
    with accelerator_of(kwargs_handlers=handlers) as accelerator:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, optimizer, batches = accelerator.prepare(model, optimizer, loader())
        for batch in batches:
            accelerator.backward(loss_of(engine, batch))
            optimizer.step()
            optimizer.zero_grad()
        assert all(bool(torch.isfinite(parameter).all()) for parameter in engine.parameters())
        return reduced_bytes(engine)


@pytest.mark.parametrize("hook", ["fp16", "bf16"])
def test_a_hook_of_16_bits_halves_what_travels(world2: World, hook: str) -> None:
    whole, halved = (world2.run(bytes_of_a_step, each)[0] for each in ("no", hook))
    assert 0 < halved <= 0.51 * whole


# --- without: parameter.grad ------------------------------------------------------------------------------------------


def whole_batch(accelerator: Accelerator, batch: Any) -> Any:
    return tuple(accelerator.gather(batch))


def is_averaged(accelerator: Accelerator, model: nn.Module, reference: nn.Module, share: float = 1.0) -> bool:
    """Whether each gradient is that of the same model trained on the batches of all ranks; on all ranks or on none."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    same = [torch.allclose(a.grad, b.grad * share, atol=1e-6) for a, b in pairs if a.grad is not None]  # type: ignore[operator]
    assert len(same) == len(list(model.parameters()))
    verdicts = accelerator.gather(torch.tensor([all(same)])).tolist()
    assert len(set(verdicts)) == 1, verdicts
    return bool(verdicts[0])


def grads_under_accumulate(plugin: dict[str, Any], loading: dict[str, Any]) -> list[bool]:
    steps = GradientAccumulationPlugin(num_steps=2, **plugin)
    with accelerator_of(
        gradient_accumulation_plugin=steps, dataloader_config=DataLoaderConfiguration(**loading)
    ) as accelerator:
        reference = model_of()
        engine, batches = accelerator.prepare(model_of(), loader_of(4, 4 * NUM_BATCHES))
        found = []
        for batch in batches:
            (loss_of(reference, whole_batch(accelerator, batch)) / 2).backward()
            with accelerator.accumulate(engine):
                accelerator.backward(loss_of(engine, batch))
            found.append(is_averaged(accelerator, engine, reference))
            if accelerator.sync_gradients:
                engine.zero_grad()
                reference.zero_grad()
        return found


@pytest.mark.parametrize("loading", [{"split_batches": True}, {"split_batches": True, "dispatch_batches": True}])
def test_a_model_without_optimizer_has_averaged_gradients_where_a_step_would_be(
    world2: World, loading: dict[str, Any]
) -> None:
    assert world2.run(grads_under_accumulate, {}, loading) == [[False, True, False, True, True]] * 2
    assert world2.run(grads_under_accumulate, {"sync_each_batch": True}, loading) == [[True] * 5] * 2


def grads_by_hand() -> None:
    with accelerator_of() as accelerator:
        reference = model_of()
        engine, batches = accelerator.prepare(model_of(), loader())
        first, second, third, *_ = batches
        with accelerator.no_sync(engine):
            accelerator.backward(loss_of(engine, first))
            loss_of(reference, whole_batch(accelerator, first)).backward()
            assert not is_averaged(accelerator, engine, reference)
            kept = loss_of(engine, second)
        loss_of(engine, third).backward()  # without the accelerator's help
        loss_of(reference, whole_batch(accelerator, third)).backward()
        assert is_averaged(accelerator, engine, reference), "the next pass outside averages what was kept, too"
        with accelerator.no_sync(engine), accelerator.trigger_sync_in_backward(engine):
            accelerator.backward(kept)
            loss_of(reference, whole_batch(accelerator, second)).backward()
        assert is_averaged(accelerator, engine, reference)
        with engine.no_sync():
            accelerator.backward(loss_of(engine, first))
            loss_of(reference, whole_batch(accelerator, first)).backward()
            assert not is_averaged(accelerator, engine, reference)


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
def test_no_sync_keeps_gradients_and_trigger_sync_averages_them(world: World) -> None:
    world.run(grads_by_hand if world.size > 1 else nothing_travels)


def nothing_travels() -> None:
    with accelerator_of() as accelerator:
        reference = model_of()
        engine, batches = accelerator.prepare(model_of(), loader())
        for batch in batches:
            with accelerator.no_sync(engine):
                accelerator.backward(loss_of(engine, batch))
            loss_of(reference, batch).backward()
            assert is_averaged(accelerator, engine, reference)


def an_optimizer_of_the_script(stage: int) -> None:
    """The script steps by an optimizer that it did not prepare; parts of the model are used by one rank alone."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.odd, self.even, self.never = nn.Linear(37, 5), nn.Linear(37, 5), nn.Linear(37, 5)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = (self.odd if rank() % 2 else self.even)(inputs)
            return found

    config = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": BATCH}
    with accelerator_of(config if stage else None) as accelerator:
        model = Branches()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = accelerator.prepare(model)  # with a loader beside it this would be inference
        batches = accelerator.prepare(loader())
        for batch in batches:
            accelerator.backward(loss_of(engine, batch))
            assert model.never.weight.grad is None
            optimizer.step()
            engine.zero_grad()
            assert model.odd.weight.grad is None
        for parameter in model.parameters():
            gathered = accelerator.gather(parameter.detach()[None].clone())
            assert all(torch.equal(gathered[0], each) for each in gathered), "ranks drift apart"
        assert not torch.equal(model.odd.weight, Branches().odd.weight), "it trains on the ranks that did not use it"


@pytest.mark.parametrize("stage", [0, 1])
def test_ranks_that_step_by_hand_stay_together(world2: World, stage: int) -> None:
    world2.run(an_optimizer_of_the_script, stage)


# --- loops of uneven length -------------------------------------------------------------------------------------------


def evaluate_unevenly(stage: int) -> int:
    config = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": BATCH}
    with accelerator_of(config, dataloader_config=DataLoaderConfiguration(even_batches=False)) as accelerator:
        model = model_of()
        expected = [loss_of(model, batch).item() for batch in loader_of(BATCH, 3 * BATCH)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, optimizer, batches = accelerator.prepare(model, optimizer, loader_of(BATCH, 3 * BATCH))
        engine.eval()
        with torch.no_grad():
            found = [loss_of(engine, batch).item() for batch in batches]
        accelerator.wait_for_everyone()
        assert found == pytest.approx(expected[accelerator.process_index :: accelerator.num_processes], abs=1e-6)
        engine.train()
        accelerator.backward(loss_of(engine, next(iter(loader()))))
        optimizer.step()  # training goes on
        return len(found)


@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_may_evaluate_different_numbers_of_batches(world2: World, stage: int) -> None:
    assert world2.run(evaluate_unevenly, stage) == [2, 1]


def join_unevenly() -> None:
    with accelerator_of() as accelerator:
        engine = accelerator.prepare(model_of())
        with accelerator.join_uneven_inputs([engine]), accelerator.join_uneven_inputs([engine], even_batches=True):
            pass
        with accelerator.join_uneven_inputs([object()], even_batches=False):
            pass
        with (
            pytest.raises(ConfigError, match="step together"),
            accelerator.join_uneven_inputs([engine], even_batches=False),
        ):
            pass
        accelerator.even_batches = False
        with pytest.raises(ConfigError, match="step together"), accelerator.join_uneven_inputs([engine]):
            pass
        dist.barrier()


def test_training_on_uneven_loaders_is_refused(world2: World) -> None:
    world2.run(join_unevenly)
