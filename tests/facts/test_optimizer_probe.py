"""The probe tells which optimizers may be cut and which may be streamed, and leaves the probed one as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from shardwise.errors import ConfigError
from shardwise.optim.lion import Lion
from shardwise.optim.probe import OptimizerTraits, probe_optimizer
from tests.optimizers import Lamb

CUT_AND_STREAMED = OptimizerTraits(elementwise=True, streamable=True)
WHOLE_AND_STREAMED = OptimizerTraits(elementwise=False, streamable=True)
CUT_TOGETHER = OptimizerTraits(elementwise=True, streamable=False)
WHOLE_TOGETHER = OptimizerTraits(elementwise=False, streamable=False)
REFUSED = None

# What the rule of each optimizer of torch implies. A rule with sums over a tensor (Adafactor's factored moments and
# clipped update, Muon's orthogonalisation) needs the tensor whole; all others treat each element alone. Counters and
# products of coefficients live with each parameter everywhere, so a call may take a part of the parameters.
EXPECTED: dict[str, OptimizerTraits | None] = {
    "ASGD": CUT_AND_STREAMED,
    "Adadelta": CUT_AND_STREAMED,
    "Adafactor": WHOLE_AND_STREAMED,
    "Adagrad": CUT_AND_STREAMED,
    "Adam": CUT_AND_STREAMED,
    "AdamW": CUT_AND_STREAMED,
    "Adamax": CUT_AND_STREAMED,
    "LBFGS": REFUSED,  # evaluates the loss again and again
    "Muon": WHOLE_AND_STREAMED,
    "NAdam": CUT_AND_STREAMED,
    "RAdam": CUT_AND_STREAMED,
    "RMSprop": CUT_AND_STREAMED,
    "Rprop": CUT_AND_STREAMED,
    "SGD": CUT_AND_STREAMED,
    "SparseAdam": REFUSED,  # takes no dense gradient
}


def weights(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes or ((6, 5), (4,))]


class StepOfAll(Optimizer):
    """Elementwise, with one counter a group: a second call in a step would count twice."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "num_steps": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["num_steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"] / group["num_steps"])


class NormOfAll(Optimizer):
    """Divides by the norm over all parameters: needs them whole and together."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            norm = torch.stack([parameter.grad.norm() for parameter in moved]).max()
            for parameter in moved:
                parameter.sub_(group["lr"] * parameter.grad / norm)


class LambOrSgd(Lamb):
    """Two rules in one optimizer, chosen by a key of the group, as Muon with an auxiliary Adam is built."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        every = self.param_groups
        for group in every:
            if group["rule"] == "lamb" and any(parameter.ndim < 2 for parameter in group["params"]):
                raise ValueError("the rule lamb takes matrices only")
            if group["rule"] == "sgd":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.add_(parameter.grad, alpha=-group["lr"])
        self.param_groups = [group for group in every if group["rule"] == "lamb"]
        super().step()
        self.param_groups = every


class WithAttributes(torch.optim.SGD):
    """Keeps something of its own beside groups and state."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.sign = -1.0
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.num_steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=self.sign * group["lr"])


# -- classes


def test_the_table_names_every_optimizer_of_torch() -> None:
    classes = (getattr(torch.optim, name) for name in dir(torch.optim))
    found = {c.__name__ for c in classes if isinstance(c, type) and issubclass(c, Optimizer)}
    assert found - {"Optimizer"} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_optimizer_of_torch(name: str) -> None:
    expected = EXPECTED[name]
    for shapes in [[(6, 5), (4, 3)]] if name == "Muon" else [[(6, 5), (4, 3)], [(6, 5), (4,)]]:
        optimizer = getattr(torch.optim, name)(weights(*shapes))
        if expected is None:
            with pytest.raises(ConfigError, match=f"{name} cannot be moved onto shards"):
                probe_optimizer(optimizer)
        else:
            assert probe_optimizer(optimizer) == expected


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("AdamW", {"amsgrad": True, "weight_decay": 0.5}),
        ("AdamW", {"fused": True}),
        ("AdamW", {"foreach": True}),
        ("AdamW", {"foreach": False, "maximize": True}),
        ("AdamW", {"capturable": True, "lr": torch.tensor(1e-3)}),
        ("Adagrad", {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
        ("RMSprop", {"momentum": 0.9, "centered": True}),
    ],
    ids=str,
)
def test_settings_change_no_trait(name: str, settings: dict[str, Any]) -> None:
    assert probe_optimizer(getattr(torch.optim, name)(weights(), **settings)) == CUT_AND_STREAMED


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [(Lion, CUT_AND_STREAMED), (Lamb, WHOLE_AND_STREAMED), (StepOfAll, CUT_TOGETHER), (NormOfAll, WHOLE_TOGETHER)],
)
def test_other_optimizers(optimizer: Callable[..., Optimizer], expected: OptimizerTraits) -> None:
    assert probe_optimizer(optimizer(weights())) == expected


@pytest.mark.parametrize("order", ["sgd first", "lamb first"])
def test_groups_with_rules_of_their_own_are_all_heard(order: str) -> None:
    matrix, vector = weights()
    groups = [{"params": [vector], "rule": "sgd"}, {"params": [matrix], "rule": "lamb"}]
    optimizer = LambOrSgd(groups if order == "sgd first" else groups[::-1])
    assert probe_optimizer(optimizer) == WHOLE_AND_STREAMED


def test_an_optimizer_with_attributes_of_its_own() -> None:
    optimizer = WithAttributes(weights())
    assert probe_optimizer(optimizer) == CUT_AND_STREAMED
    assert optimizer.num_steps == 0


def test_one_that_moves_nothing_is_refused() -> None:
    class Idle(torch.optim.SGD):
        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            """Steps tensors that it keeps elsewhere."""

    with pytest.raises(ConfigError, match="Idle cannot be moved onto shards: stepping a copy of it changed nothing"):
        probe_optimizer(Idle(weights()))


# -- learning rates


@pytest.mark.parametrize("lr", [0.0, 1e-12, 1e-3, torch.tensor(0.0), torch.tensor(1e-3)], ids=str)
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [(torch.optim.AdamW, CUT_AND_STREAMED), (Lamb, WHOLE_AND_STREAMED), (NormOfAll, WHOLE_TOGETHER)],
)
def test_a_warm_up_hides_nothing(
    optimizer: Callable[..., Optimizer], expected: OptimizerTraits, lr: float | torch.Tensor
) -> None:
    """A schedule may have lowered the rate to nothing, or nearly so, by the time of the probe."""
    assert probe_optimizer(optimizer(weights(), lr=lr)) == expected


# -- nothing is changed


@pytest.mark.parametrize("name", [name for name, expected in EXPECTED.items() if expected is not None])
@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_the_probed_optimizer_is_unchanged(name: str, stepped: bool) -> None:
    parameters = weights((6, 5), (4, 3))
    groups = [{"params": parameters[:1], "lr": 0.25}, {"params": parameters[1:]}]
    optimizer = getattr(torch.optim, name)(groups, lr=0.5)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if stepped:
        optimizer.step()
    values = [parameter.detach().clone() for parameter in parameters]
    before = copy.deepcopy(optimizer.state_dict())
    random_state = torch.get_rng_state()

    probe_optimizer(optimizer)

    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert [group["params"] for group in optimizer.param_groups] == [parameters[:1], parameters[1:]]
    assert set(optimizer.state) <= set(parameters), "state of tensors that are not the optimizer's"
    assert after["state"].keys() == before["state"].keys()
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    for parameter, value in zip(parameters, values, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_neither_a_scheduler_nor_hooks_notice_the_probe() -> None:
    parameters = weights()
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    values = [parameter.detach().clone() for parameter in parameters]
    assert probe_optimizer(optimizer) == CUT_AND_STREAMED
    assert calls == []
    assert scheduler.get_last_lr() == [0.1]
    assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))
