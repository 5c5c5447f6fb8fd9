"""Several engines in one process: a GAN's two that alternate, and a teacher and a student in one backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests import models
from tests.models import CLASSES, Mlp
from tests.references import (
    Record,
    adamw_in_two_groups,
    assert_same,
    give_gradients,
    ordered_mean,
    take_gradients,
    whole_weights,
)
from tests.world.engine_runs import STAGES, config_of, open_engine, rank
from tests.worlds import World

STEPS = 3
Loss = Callable[[Any, Any, int, int], Tensor]


def build_pair() -> tuple[nn.Module, nn.Module]:
    """Two models, of which the second takes the first one's output."""
    torch.manual_seed(41)
    first, second = Mlp(), Mlp(width=29, hidden=31, depth=2)
    second.stem = nn.Linear(CLASSES, 29)
    return first, second


def critic_loss(generator: Any, critic: Any, step: int, of_rank: int) -> Tensor:
    """The critic learns on a true and a made sample; the generator only runs."""
    noise, truth = models.vectors(step, of_rank)
    with torch.no_grad():
        made = generator(noise)
    return F.softplus(-critic(truth)).mean() + F.softplus(critic(made)).mean()


def generator_loss(generator: Any, critic: Any, step: int, of_rank: int) -> Tensor:
    """The generator learns through the critic, whose own gradients are thrown away."""
    noise, _ = models.vectors(step + 500, of_rank)
    return F.softplus(-critic(generator(noise))).mean()


def gan_alone(world_size: int) -> tuple[list[float], Record, Record]:
    """The GAN with all ranks played in this process; losses of rank 0."""
    generator, critic = build_pair()
    optimizers = [adamw_in_two_groups(critic), adamw_in_two_groups(generator)]
    losses = []
    for step in range(STEPS):
        for model, optimizer, loss_of in zip(
            (critic, generator), optimizers, (critic_loss, generator_loss), strict=True
        ):
            of_rank = []
            for number in range(world_size):
                model.zero_grad()
                loss = loss_of(generator, critic, step, number)
                loss.backward()
                of_rank.append(take_gradients(model))
                if number == 0:
                    losses.append(loss.item())
            give_gradients(model, ordered_mean(of_rank))
            optimizer.step()
    return losses, Record(weights=whole_weights(generator)), Record(weights=whole_weights(critic))


def gan_with_engines(stage_of_generator: int, stage_of_critic: int) -> None:
    wanted_losses, wanted_generator, wanted_critic = gan_alone(dist.get_world_size())
    first, second = build_pair()
    losses = []
    with (
        open_engine(first, adamw_in_two_groups(first), config_of(stage_of_generator)) as generator,
        open_engine(second, adamw_in_two_groups(second), config_of(stage_of_critic)) as critic,
    ):
        for step in range(STEPS):
            loss = critic_loss(generator, critic, step, rank())
            critic.backward(loss)
            critic.step()
            losses.append(loss.item())
            loss = generator_loss(generator, critic, step, rank())
            generator.backward(loss)
            generator.step()
            critic.zero_grad()
            losses.append(loss.item())
        made = Record(weights=generator.state_dict()), Record(weights=critic.state_dict())
    if rank() == 0:
        assert losses == wanted_losses
    assert_same(made[0], wanted_generator, "generator")
    assert_same(made[1], wanted_critic, "critic")


def both_losses(student: Any, teacher: Any, step: int, of_rank: int) -> Tensor:
    """One number that both models learn from."""
    inputs, targets = models.vectors(step, of_rank)
    told = teacher(inputs)
    return F.mse_loss(student(inputs), told) + F.mse_loss(told, targets)


def frozen_teacher_loss(student: Any, teacher: Any, step: int, of_rank: int) -> Tensor:
    """The teacher runs without gradients."""
    inputs, _ = models.vectors(step, of_rank)
    with torch.no_grad():
        told = teacher(inputs)
    return F.mse_loss(student(inputs), told)


def build_teacher() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(42)
    return Mlp(width=23, hidden=29, depth=2), Mlp()


def teacher_alone(world_size: int, loss_of: Loss) -> tuple[Record, Record]:
    student, teacher = build_teacher()
    optimizers = [adamw_in_two_groups(student), adamw_in_two_groups(teacher)]
    for step in range(STEPS):
        of_rank: list[tuple[Any, Any]] = []
        for number in range(world_size):
            student.zero_grad()
            teacher.zero_grad()
            loss_of(student, teacher, step, number).backward()
            of_rank.append((take_gradients(student), take_gradients(teacher)))
        give_gradients(student, ordered_mean([pair[0] for pair in of_rank]))
        give_gradients(teacher, ordered_mean([pair[1] for pair in of_rank]))
        for optimizer in optimizers:
            optimizer.step()
    return Record(weights=whole_weights(student)), Record(weights=whole_weights(teacher))


def teacher_with_engines(stage_of_student: int, stage_of_teacher: int, loss_of: Loss) -> None:
    wanted_student, wanted_teacher = teacher_alone(dist.get_world_size(), loss_of)
    first, second = build_teacher()
    with (
        open_engine(first, adamw_in_two_groups(first), config_of(stage_of_student)) as student,
        open_engine(second, adamw_in_two_groups(second), config_of(stage_of_teacher)) as teacher,
    ):
        for step in range(STEPS):
            loss_of(student, teacher, step, rank()).backward()
            student.step()
            if loss_of is both_losses:
                teacher.step()
        made = Record(weights=student.state_dict()), Record(weights=teacher.state_dict())
    assert_same(made[0], wanted_student, "student")
    assert_same(made[1], wanted_teacher, "teacher")


def engine_beside_a_plain_model(stage: int) -> None:
    """A module without an engine keeps its own gradients in the same backward."""
    first, second = build_pair()
    _, untouched = build_pair()
    for parameter, copy in zip(second.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(parameter, copy)
    inputs, _ = models.vectors(0, rank())
    with open_engine(first, adamw_in_two_groups(first), config_of(stage)) as engine:
        hidden = engine(inputs)
        second(hidden).sum().backward()
        engine.step()
    untouched(hidden.detach()).sum().backward()
    for parameter, copy in zip(second.parameters(), untouched.parameters(), strict=True):
        assert parameter.grad is not None
        assert copy.grad is not None
        assert torch.equal(parameter.grad, copy.grad)


STAGE_PAIRS = [(0, 0), (1, 2), (2, 1), (3, 3), (3, 0)]


@pytest.mark.parametrize("stages", STAGE_PAIRS)
def test_a_gan(world2: World, stages: tuple[int, int]) -> None:
    world2.run(gan_with_engines, *stages)


@pytest.mark.parametrize("stages", STAGE_PAIRS)
def test_teacher_and_student_in_one_backward(world2: World, stages: tuple[int, int]) -> None:
    world2.run(teacher_with_engines, *stages, both_losses)


@pytest.mark.parametrize("stages", STAGE_PAIRS)
def test_a_teacher_that_only_runs(world2: World, stages: tuple[int, int]) -> None:
    world2.run(teacher_with_engines, *stages, frozen_teacher_loss)


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_beside_a_plain_model(world2: World, stage: int) -> None:
    world2.run(engine_beside_a_plain_model, stage)
