"""The five lines of a ported script train as one process would, at every stage and cadence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwise.errors import ConfigError, StateError
from shardwise.utils import DummyOptim, DummyScheduler
from tests.accelerators import IN, accelerator_of, loader_of, loss_of, model_of, samples
from tests.world.engine_runs import STAGES, rank, world_size
from tests.worlds import World

BATCH = 4
LR = 0.05


def json_of(stage: int, **others: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto", **others}


def trained_alone(
    micro_batch: int, accumulation: int, clip: float | None = None, kind: type[Any] = torch.optim.AdamW
) -> dict[str, torch.Tensor]:
    """One process, bare torch: a step for each `accumulation` batches, the last one may have fewer."""
    model = model_of()
    optimizer = kind(model.parameters(), lr=LR)
    loader = loader_of(micro_batch)
    for number, batch in enumerate(loader, start=1):
        (loss_of(model, batch) / accumulation).backward()
        if number % accumulation == 0 or number == len(loader):
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def trained(
    config: dict[str, Any] | None,
    accumulation: int = 1,
    clip: float | None = None,
    kind: type[Any] = torch.optim.AdamW,
    **arguments: Any,
) -> dict[str, torch.Tensor]:
    """The loop of a script."""
    with accelerator_of(config, gradient_accumulation_steps=accumulation, **arguments) as accelerator:
        model = model_of()
        optimizer = kind(model.parameters(), lr=LR)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader_of(BATCH))
        assert accelerator.gradient_accumulation_steps == accumulation
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_of(model, batch)
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()


def equals_one_process(config: dict[str, Any] | None, accumulation: int, clip: float | None = None) -> None:
    expected = trained_alone(BATCH * world_size(), accumulation, clip)
    found = trained(config, accumulation, clip)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_together_train_as_one_process(world: World, stage: int, accumulation: int) -> None:
    # "auto" is the script's word; 48 samples leave the last step of 3 micro-batches short in a world of 2 and more.
    config = json_of(stage, gradient_accumulation_steps="auto")
    world.run(equals_one_process, config, accumulation)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_without_zero_it_is_data_parallelism(world: World) -> None:
    world.run(equals_one_process, None, 3)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_scripts_max_norm_counts(world2: World, stage: int) -> None:
    world2.run(equals_one_process, json_of(stage, gradient_accumulation_steps="auto"), 2, 0.05)


def zero_grad_first(config: dict[str, Any] | None) -> None:
    """A loop that forgets gradients before each backward pass keeps what a step has accumulated."""
    with accelerator_of(config, gradient_accumulation_steps=2) as accelerator:
        model = model_of()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader_of(BATCH))
        for batch in loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(loss_of(model, batch))
                optimizer.step()
        found = model.state_dict()
    for name, value in trained_alone(BATCH * world_size(), 2).items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5)


def test_zero_grad_at_the_top_of_the_loop_loses_nothing(world2: World) -> None:
    world2.run(zero_grad_first, None)


def precisions(mixed_precision: str, stage: int | None) -> None:
    # A small first loss scale: no step shall be skipped.
    config = None if stage is None else json_of(stage, gradient_accumulation_steps=1, fp16={"initial_scale_power": 8})
    # Adam would turn the rounding of small gradients into whole steps.
    found = trained(config, kind=torch.optim.SGD, mixed_precision=mixed_precision)
    expected = trained_alone(BATCH * world_size(), 1, kind=torch.optim.SGD)
    change = sum(float((value - found[name].float()).norm()) for name, value in expected.items())
    start = model_of().state_dict()
    whole = sum(float((value - start[name]).norm()) for name, value in expected.items())
    assert 0 < change < 0.1 * whole, "it trains in 16 bits, near what 32 bits give"
    assert {value.dtype for value in found.values()} == {
        torch.float32 if stage is None else {"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    }


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("stage", [None, 2])
@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_mixed_precision_trains(world: World, mixed_precision: str, stage: int | None) -> None:
    world.run(precisions, mixed_precision, stage)


# --- who brings the optimizer and the scheduler -----------------------------------------------------------------------

RECIPES: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
}


def rates_of(blocks: list[str], optimizer_is_dummy: bool, scheduler_kind: str) -> list[float]:
    """Learning rates of a run, step by step."""
    config = json_of(2, gradient_accumulation_steps=2, **{name: RECIPES[name] for name in blocks})
    with accelerator_of(config) as accelerator:
        model = model_of()
        optimizer: Any
        scheduler: Any
        if optimizer_is_dummy:
            optimizer = DummyOptim(model.parameters(), lr=LR, weight_decay=0.01)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        if scheduler_kind == "real":
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda tick: 1 / (1 + tick))
        elif scheduler_kind == "callable":
            scheduler = DummyScheduler(
                optimizer, lr_scheduler_callable=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t))
            )
        else:
            scheduler = DummyScheduler(optimizer, total_num_steps=6 * world_size(), warmup_num_steps=2)
        model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader_of(BATCH, 96))
        assert type(optimizer.optimizer).__name__ == ("AdamW" if optimizer_is_dummy else "SGD"), "never swapped"
        rates = []
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                rates.append(scheduler.get_last_lr()[0])
        return rates


def test_case_a_both_of_the_json(world2: World) -> None:
    rates, other = world2.run(rates_of, ["optimizer", "scheduler"], True, "json")
    assert rates == other and rates[0] < LR and max(rates) == pytest.approx(LR)
    assert rates[-1] < 0.5 * LR, "6 x 2 ticks of one process are 6 steps of two"


def test_case_b_both_of_the_script(world2: World) -> None:
    rates, _ = world2.run(rates_of, [], False, "real")
    assert rates == pytest.approx([LR / (1 + 2 * step) for step in range(1, len(rates) + 1)]), "a tick for each rank"


def test_case_c_the_scripts_optimizer_and_the_jsons_scheduler(world2: World) -> None:
    rates, _ = world2.run(rates_of, ["scheduler"], False, "json")
    assert max(rates) == pytest.approx(LR), "warmup_max_lr is the optimizer's lr"


def test_an_optimizer_of_the_json_with_a_scheduler_made_by_a_callable(world2: World) -> None:
    rates, _ = world2.run(rates_of, ["optimizer"], True, "callable")
    assert rates == pytest.approx([LR / (1 + step) for step in range(1, len(rates) + 1)]), "a tick for each step"


def refused(blocks: list[str], optimizer_is_dummy: bool, scheduler_kind: str, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rates_of(blocks, optimizer_is_dummy, scheduler_kind)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("blocks", "optimizer_is_dummy", "scheduler_kind", "words"),
    [
        (["optimizer", "scheduler"], False, "json", ("SGD", "DummyOptim")),
        ([], True, "json", ("DummyOptim", "optimizer")),
        (["scheduler"], False, "real", ("LambdaLR", "DummyScheduler")),
        ([], False, "json", ("DummyScheduler", "lr_scheduler_callable")),
    ],
)
def test_mixed_up_recipes_are_refused(
    world1: World, blocks: list[str], optimizer_is_dummy: bool, scheduler_kind: str, words: tuple[str, ...]
) -> None:
    world1.run(refused, blocks, optimizer_is_dummy, scheduler_kind, *words)


def case_d() -> None:
    with accelerator_of(json_of(2, optimizer=RECIPES["optimizer"])) as accelerator:
        model = model_of()
        dummy = DummyOptim(model.parameters())
        outside = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(outside, lambda _: 1.0)
        scheduler.optimizer = dummy  # type: ignore[assignment]
        with pytest.raises(ConfigError, match=r"DummyOptim.*LambdaLR.*DummyScheduler"):
            accelerator.prepare(model, dummy, scheduler, loader_of(BATCH))


def test_case_d_an_optimizer_of_the_json_under_the_scripts_scheduler_is_refused(world1: World) -> None:
    world1.run(case_d)


# --- bad input --------------------------------------------------------------------------------------------------------


def bad_input() -> None:
    with accelerator_of(json_of(2)) as accelerator:
        with pytest.raises(StateError, match="prepare"):
            accelerator.backward(torch.ones((), requires_grad=True))
        model, other = model_of(), model_of()
        with pytest.raises(ConfigError, match=r"none that is prepared|no model"):
            accelerator.prepare(model, torch.optim.SGD(other.parameters(), lr=LR), loader_of(BATCH))
        with pytest.raises(ConfigError, match=r"several models.*optimizer for each"):
            both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=LR)
            accelerator.prepare(model, other, both, loader_of(BATCH))
        with pytest.raises(ConfigError, match=r"train_micro_batch_size_per_gpu.*data loader"):
            accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
        with pytest.raises(ConfigError, match="two optimizers"):
            accelerator.prepare(
                model, *(torch.optim.SGD(model.parameters(), lr=LR) for _ in range(2)), loader_of(BATCH)
            )
        engine, optimizer, loader = accelerator.prepare(
            model, torch.optim.SGD(model.parameters(), lr=LR), loader_of(BATCH)
        )
        with pytest.raises(ConfigError, match="prepared already"):
            accelerator.prepare(engine)
        with pytest.raises(StateError, match="without a graph"):
            accelerator.backward(loss_of(engine, next(iter(loader))).detach())
        with pytest.raises(ConfigError, match="no prepared model"):
            accelerator.clip_grad_norm_(other.parameters(), 1.0)
        with pytest.raises(ConfigError, match="norm_type"):
            accelerator.clip_grad_norm_(engine.parameters(), 1.0, norm_type=1)
        assert optimizer.step_was_skipped is False


def test_bad_input_is_one_clear_error(world1: World) -> None:
    world1.run(bad_input)


def hidden_sizes() -> None:
    config = json_of(3)
    config["zero_optimization"]["reduce_bucket_size"] = "auto"
    with accelerator_of(config) as accelerator:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with pytest.raises(ConfigError, match=r"reduce_bucket_size.*hidden_size"):
            accelerator.prepare(model, optimizer, loader_of(BATCH))
        model.config = type("Config", (), {"hidden_sizes": [16, 64, 32]})()  # type: ignore[assignment]
        accelerator.prepare(model, optimizer, loader_of(BATCH))
        found = accelerator.deepspeed_config
        assert found is not None and found["zero_optimization"]["reduce_bucket_size"] == 64 * 64
        assert found["train_micro_batch_size_per_gpu"] == BATCH


def test_auto_sizes_come_from_the_models_config(world2: World) -> None:
    world2.run(hidden_sizes)


# --- several models ---------------------------------------------------------------------------------------------------


def a_gan(stage: int | None) -> dict[str, torch.Tensor]:
    """Two models, trained in turns, the one through the other."""
    config = None if stage is None else json_of(stage, train_micro_batch_size_per_gpu=BATCH)
    inputs = torch.stack([x for x, _ in samples(BATCH * world_size())])[rank() * BATCH : (rank() + 1) * BATCH]
    with accelerator_of(config) as accelerator:
        torch.manual_seed(3)
        maker, judge = torch.nn.Linear(IN, IN), torch.nn.Linear(IN, 1)
        optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for model in (maker, judge)]
        maker, judge, of_maker, of_judge = accelerator.prepare(maker, judge, *optimizers)
        for _ in range(3):
            accelerator.backward(judge(maker(inputs).detach()).square().mean())
            of_judge.step()
            of_judge.zero_grad()
            accelerator.backward(-judge(maker(inputs)).square().mean())
            of_maker.step()
            of_maker.zero_grad()
            of_judge.zero_grad()  # the pass left gradients there, too
        return {**maker.state_dict(prefix="maker."), **judge.state_dict(prefix="judge.")}


def gan_alone() -> dict[str, torch.Tensor]:
    inputs = torch.stack([x for x, _ in samples(BATCH * world_size())])
    torch.manual_seed(3)
    maker, judge = torch.nn.Linear(IN, IN), torch.nn.Linear(IN, 1)
    of_maker, of_judge = (torch.optim.SGD(model.parameters(), lr=LR) for model in (maker, judge))
    for _ in range(3):
        judge(maker(inputs).detach()).square().mean().backward()
        of_judge.step()
        of_judge.zero_grad()
        (-judge(maker(inputs)).square().mean()).backward()
        of_maker.step()
        of_maker.zero_grad()
        of_judge.zero_grad()
    return {**maker.state_dict(prefix="maker."), **judge.state_dict(prefix="judge.")}


def gan_equals_one_process(stage: int | None) -> None:
    found = a_gan(stage)
    for name, value in gan_alone().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("stage", [None, 1, 3])
def test_two_models_train_through_each_other(world: World, stage: int | None) -> None:
    world.run(gan_equals_one_process, stage)
