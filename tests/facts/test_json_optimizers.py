"""The optimizers that a config can name: which class, which defaults, which words for what cannot be."""

import pytest
import torch
from torch.nn import Parameter

from shardwise.errors import ConfigError
from shardwise.optim.json_optimizers import build_optimizer
from shardwise.optim.lion import Lion


def weights(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in shapes or ((3, 5), (7,))]


def train(optimizer, parameters, num_steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("Adam", {}, torch.optim.AdamW),
        ("adamw", {}, torch.optim.AdamW),
        ("Adam", {"adam_w_mode": False}, torch.optim.Adam),
        ("AdamW", {"torch_adam": True, "adam_w_mode": True}, torch.optim.AdamW),
        ("SGD", {"momentum": 0.9}, torch.optim.SGD),
        ("adagrad", {}, torch.optim.Adagrad),
        ("RMSprop", {}, torch.optim.RMSprop),
        ("NAdam", {}, torch.optim.NAdam),
        ("Lion", {}, Lion),
    ],
    ids=str,
)
def test_a_name_gives_its_class(name, params, expected):
    assert type(build_optimizer(name, params, weights())) is expected


def test_muon_takes_matrices_alone():
    assert type(build_optimizer("Muon", {"momentum": 0.9}, weights((3, 5)))) is torch.optim.Muon
    with pytest.raises(ConfigError, match="The optimizer Muon refuses its params"):
        build_optimizer("Muon", {}, weights())


def test_parameters_reach_the_optimizer():
    params = {"lr": 0.25, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.125, "bias_correction": True}
    (group,) = build_optimizer("Adam", params, weights()).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.25, (0.8, 0.95), 1e-6, 0.125)


@pytest.mark.parametrize(("params", "expected"), [({}, 0.0), ({"torch_adam": True}, 0.01)], ids=str)
def test_adam_decays_no_weight_unless_asked_or_torchs_own(params, expected):
    assert build_optimizer("AdamW", params, weights()).param_groups[0]["weight_decay"] == expected


def test_groups_keep_their_own_values():
    first, second = weights()
    optimizer = build_optimizer("Adam", {"lr": 0.5}, [{"params": [first], "lr": 0.25}, {"params": second}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_parameters_may_come_from_generators():
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer("Adam", {}, model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 2
    optimizer = build_optimizer("Adam", {}, iter([{"params": model.parameters()}]))
    assert len(optimizer.param_groups[0]["params"]) == 2
    optimizer = build_optimizer("Adam", {}, model.named_parameters())
    assert optimizer.param_groups[0]["fused"] is True


def test_the_params_of_the_config_are_not_changed():
    params = {"lr": 0.5, "adam_w_mode": True, "betas": [0.9, 0.99]}
    build_optimizer("Adam", params, weights())
    assert params == {"lr": 0.5, "adam_w_mode": True, "betas": [0.9, 0.99]}


# --- fused steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_step_is_fused_and_runs(name, dtype):
    parameters = weights(dtype=dtype)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = build_optimizer(name, {"lr": 0.1}, parameters)
    assert optimizer.param_groups[0]["fused"] is True
    train(optimizer, parameters)
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


@pytest.mark.parametrize("params", [{"fused": False}, {"foreach": True}, {"fused": None}], ids=str)
def test_the_users_word_on_the_step_stands(params):
    assert not build_optimizer("AdamW", params, weights()).param_groups[0]["fused"]


def test_a_step_is_not_fused_where_torch_has_none():
    assert not build_optimizer("AdamW", {}, [Parameter(torch.zeros(2, device="meta"))]).param_groups[0]["fused"]
    assert not build_optimizer("AdamW", {}, weights(dtype=torch.complex64)).param_groups[0]["fused"]


# --- Lion -------------------------------------------------------------------------------------------------------------


def test_lion_follows_its_two_lines():
    (parameter,) = weights((4, 3))
    lr, beta1, beta2, decay = 0.01, 0.9, 0.99, 0.1
    optimizer = Lion([parameter], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    expected, momentum = parameter.detach().clone().double(), torch.zeros(4, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        gradient = torch.randn(4, 3, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        direction = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
        expected = expected * (1 - lr * decay) - lr * direction
        momentum = beta2 * momentum + (1 - beta2) * gradient
        assert torch.equal(parameter.grad, gradient)
    torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=0)


def test_lion_gives_the_same_bits_on_a_whole_and_on_its_slices():
    whole = Parameter(weights((1021,))[0].detach().clone())
    slices = [Parameter(piece.clone()) for piece in whole.detach().split(341)]
    on_whole = Lion([whole], lr=0.01, weight_decay=0.1)
    on_slices = Lion(slices, lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        whole.grad = torch.randn(1021, generator=generator)
        for piece, gradient in zip(slices, whole.grad.split(341), strict=True):
            piece.grad = gradient.clone()
        on_whole.step()
        on_slices.step()
    assert torch.equal(whole.detach(), torch.cat([piece.detach() for piece in slices]))


def test_lion_with_a_tensor_rate_and_a_saved_state():
    plain, tensor, loaded = (weights((4, 3)) for _ in range(3))
    first = Lion(plain, lr=0.25)
    second = Lion(tensor, lr=torch.tensor(0.25))
    train(first, plain)
    train(second, tensor)
    assert torch.equal(plain[0], tensor[0])
    third = Lion(loaded, lr=1.0)
    third.load_state_dict(first.state_dict())
    loaded[0].data.copy_(plain[0].data)
    train(first, plain)
    train(third, loaded)
    assert torch.equal(plain[0], loaded[0])


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("AdmW", {}, 'optimizer.type is "AdmW", which is no optimizer known here. Did you mean "AdamW"?'),
        ("Lamb", {}, "which is not available: its trust ratio needs the norms of whole tensors"),
        ("OneBitAdam", {}, "which is not available: "),
        ("MuAdamW", {}, "it belongs to the package mup"),
        ("Adam", {"learning_rate": 1}, 'The optimizer AdamW has no parameter "learning_rate"'),
        ("AdamW", {"weight_decya": 1}, 'Did you mean "weight_decay"?'),
        ("SGD", {"adam_w_mode": True}, 'has no parameter "adam_w_mode"'),
        ("Adam", {"max_grad_norm": 1.0}, 'set "gradient_clipping" at the top level'),
        ("Adam", {"bias_correction": False}, "bias_correction is false, but torch's Adam always corrects"),
        ("Adam", {"adam_w_mode": "yes"}, 'adam_w_mode is "yes", expected true or false'),
        ("Adam", {"amsgrad": True}, 'Set "torch_adam": true beside it'),
        ("Adam", {"lr": -1.0}, "The optimizer AdamW refuses its params"),
        ("Adam", {"lr": "0.1"}, "The optimizer AdamW refuses its params"),
        ("Lion", {"betas": [0.9, 1.0]}, "expected two numbers from 0 to below 1"),
    ],
    ids=str,
)
def test_a_wrong_optimizer_is_a_config_error(name, params, words):
    with pytest.raises(ConfigError) as caught:
        build_optimizer(name, params, weights())
    assert words in str(caught.value)


def test_amsgrad_is_torchs_own():
    optimizer = build_optimizer("Adam", {"amsgrad": True, "torch_adam": True}, weights())
    assert optimizer.param_groups[0]["amsgrad"] is True


def test_no_parameters_at_all_are_refused():
    with pytest.raises(ConfigError, match="empty parameter list"):
        build_optimizer("Adam", {}, [])
