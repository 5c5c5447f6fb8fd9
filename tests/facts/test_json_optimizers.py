"""The optimizers that a config can name: which class, which defaults, which words for what cannot be."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from shardwise.errors import ConfigError
from shardwise.optim.json_optimizers import build_optimizer
from shardwise.optim.lamb import Lamb
from shardwise.optim.lion import Lion
from shardwise.optim.muon import Muon
from shardwise.optim.probe import probe_optimizer
from tests import models


def weights(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes or ((3, 5), (7,))]


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
        ("LAMB", {}, Lamb),
        ("Muon", {}, Muon),
    ],
    ids=str,
)
def test_a_name_gives_its_class(name, params, expected):
    assert type(build_optimizer(name, params, weights())) is expected


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
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    loaded[0].data.copy_(plain[0].data)
    train(first, plain)
    train(third, loaded)
    assert torch.equal(plain[0], loaded[0])


# --- Lamb -------------------------------------------------------------------------------------------------------------


def lamb_by_the_paper(weight, gradients, lr, beta1, beta2, eps, decay, bounds, bias_correction=True, inside=False):
    """Algorithm 2, line by line, in float64."""
    x = weight.double()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**t) if bias_correction else m
        v_hat = v / (1 - beta2**t) if bias_correction else v
        r = m_hat / ((v_hat + eps).sqrt() if inside else v_hat.sqrt() + eps)
        u = r + decay * x
        weight_norm, update_norm = float(x.norm()), float(u.norm())
        ratio = 1.0
        if weight_norm > 0 and update_norm > 0:
            ratio = min(max(weight_norm / update_norm, bounds[0]), bounds[1])
        x = x - lr * ratio * u
    return x


@pytest.mark.parametrize(
    ("params", "changed"),
    [
        ({}, {}),
        ({"bias_correction": False}, {"bias_correction": False}),
        ({"eps_inside_sqrt": True, "eps": 0.1}, {"inside": True, "eps": 0.1}),
        ({"weight_decay": 0.0}, {"decay": 0.0}),
        ({"min_coeff": 3.0}, {"bounds": (3.0, 10.0)}),
        ({"max_coeff": 0.3}, {"bounds": (0.01, 0.3)}),
    ],
    ids=str,
)
def test_lamb_follows_its_paper(params, changed):
    parameters = weights((6, 5), (7,), (1,), (4,), ())
    parameters[1].data.mul_(100.0)  # a ratio above the upper bound
    parameters[2].data.zero_()  # and one that is not defined
    before = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(5)]
    for step in gradients:
        step[3] = torch.zeros(4)
    optimizer = build_optimizer("Lamb", {"lr": 0.02, "betas": [0.9, 0.99], "weight_decay": 0.1, **params}, parameters)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    settings = {"lr": 0.02, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decay": 0.1, "bounds": (0.01, 10.0), **changed}
    for number, (weight, parameter) in enumerate(zip(before, parameters, strict=True)):
        expected = lamb_by_the_paper(weight, [step[number] for step in gradients], **settings)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(parameter.grad, gradients[-1][number])


def test_lamb_with_a_tensor_rate_and_a_saved_state():
    plain, tensor, loaded = (weights() for _ in range(3))
    first = Lamb(plain, lr=0.25)
    second = Lamb(tensor, lr=torch.tensor(0.25))
    train(first, plain)
    train(second, tensor)
    assert all(torch.equal(a, b) for a, b in zip(plain, tensor, strict=True))
    third = Lamb(loaded, lr=1.0)
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    copy_values(plain, loaded)
    train(first, plain)
    train(third, loaded)
    assert all(torch.equal(a, b) for a, b in zip(plain, loaded, strict=True))


def test_whole_tensor_rules_are_measured_as_such():
    for name in ("Lamb", "Muon"):
        assert not probe_optimizer(build_optimizer(name, {"lr": 0.1}, weights())).elementwise
    assert probe_optimizer(build_optimizer("Muon", {"lr": 0.1}, weights((7,)))).elementwise  # AdamW alone


# --- Muon -------------------------------------------------------------------------------------------------------------


def copy_values(source, target):
    for ours, theirs in zip(target, source, strict=True):
        ours.data.copy_(theirs.data)


def names_for_muon(optimizer, model):
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {of[id(p)] for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(11, 6)
        self.pos_embed = Parameter(torch.randn(4, 6))
        self.mix = nn.Conv1d(4, 4, 1)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.lm_head = nn.Linear(6, 11)

    def forward(self, ids):
        x = self.mix(self.words(ids) + self.pos_embed)
        return self.lm_head(x + self.down(torch.tanh(self.up(x))))


def test_muon_trains_embeddings_biases_and_matrices():
    model = Small()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer("Muon", {"lr": 0.01}, model.parameters(), model)
    ids = torch.randint(0, 11, (8, 4), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.25 * losses[0]
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_muon_is_torchs_muon_for_matrices_and_torchs_adamw_for_the_rest():
    ours, theirs = weights((6, 5), (7,), (4, 9), (2, 3, 2)), weights((6, 5), (7,), (4, 9), (2, 3, 2))
    params = {"lr": 0.5, "muon_lr": 0.03, "adam_lr": 0.01, "momentum": 0.8, "weight_decay": 0.2, "betas": [0.8, 0.9]}
    optimizer = build_optimizer("Muon", {**params, "eps": 1e-5, "ns_steps": 3}, ours)
    muon = torch.optim.Muon([theirs[0], theirs[2]], lr=0.03, momentum=0.8, weight_decay=0.2, ns_steps=3)
    adamw = torch.optim.AdamW([theirs[1], theirs[3]], lr=0.01, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.2, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        train(optimizer, ours, num_steps=1)
        scheduler.step()
        train(muon, theirs, num_steps=1)
        adamw.step()
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] *= 0.5
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_adamws_eps_is_not_muons():
    ours, theirs = weights((6, 5)), weights((6, 5))
    optimizer, reference = Muon(ours, lr=0.1, eps=1e-2), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    for parameter in (*ours, *theirs):  # so small that its norm is near the floor that torch gives it
        parameter.grad = 1e-8 * torch.ones(6, 5)
    optimizer.step()
    reference.step()
    assert torch.equal(ours[0], theirs[0])


def test_rates_are_the_jsons_own_where_none_is_given():
    rates = [group["lr"] for group in build_optimizer("Muon", {}, weights()).param_groups]
    assert rates == [0.02, 3e-4]
    assert [g["lr"] for g in build_optimizer("Muon", {"lr": 0.5, "muon_lr": 1}, weights()).param_groups] == [1, 0.5]
    first, second = weights((3, 5), (2, 2))
    groups = [{"params": [first], "lr": 0.25}, {"params": second}]
    assert [g["lr"] for g in build_optimizer("Muon", {"lr": 0.5}, groups).param_groups] == [0.25, 0.5]
    mixed = [{"params": weights(), "muon_lr": 0.25}]
    optimizer = build_optimizer("Muon", {"lr": 0.5}, mixed)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.5]
    assert not any("muon_lr" in group for group in optimizer.param_groups)


def test_the_model_tells_tables_from_maps():
    model = Small()
    assert names_for_muon(build_optimizer("Muon", {}, model.parameters(), model), model) == {"up.weight", "down.weight"}
    tied = models.build_gpt(tied=True)
    named = names_for_muon(build_optimizer("Muon", {}, tied.parameters(), tied), tied)
    assert "token.weight" not in named
    assert "blocks.0.attention.qkv.weight" in named


def test_flags_and_groups_decide_before_the_model():
    model = Small()
    for name, parameter in model.named_parameters():
        parameter.use_muon = name in ("words.weight", "up.weight")
    flagged = names_for_muon(build_optimizer("Muon", {}, model.parameters(), model), model)
    assert flagged == {"words.weight", "up.weight"}
    groups = [
        {"params": [model.down.weight, model.lm_head.weight], "use_muon": True},
        {"params": [model.up.weight, model.up.bias], "use_muon": False},
    ]
    grouped = names_for_muon(build_optimizer("Muon", {}, groups, model), model)
    assert grouped == {"down.weight", "lm_head.weight"}


def test_flags_on_some_matrices_only_are_refused():
    first, second, bias = weights((3, 5), (2, 2), (7,))
    first.use_muon = True
    with pytest.raises(ConfigError, match="1 matrices have not, the first of shape \\(2, 2\\)"):
        build_optimizer("Muon", {}, [first, second, bias])
    second.use_muon = False
    assert [len(g["params"]) for g in build_optimizer("Muon", {}, [first, second, bias]).param_groups] == [1, 2]


@pytest.mark.parametrize("use_muon", [True, "yes"], ids=str)
def test_what_is_no_matrix_cannot_be_muons(use_muon):
    (bias,) = weights((7,))
    with pytest.raises(ConfigError, match="use_muon"):
        build_optimizer("Muon", {}, [{"params": [bias], "use_muon": use_muon}])


def test_a_flag_on_a_vector_is_refused():
    matrix, bias = weights((3, 5), (7,))
    matrix.use_muon = bias.use_muon = True
    with pytest.raises(ConfigError, match="Muon steps matrices only"):
        build_optimizer("Muon", {}, [matrix, bias])


def test_groups_may_be_added_to_muon_one_kind_at_a_time():
    parameters = weights((3, 5), (7,), (4, 4), (2,))
    optimizer = build_optimizer("Muon", {"lr": 0.5, "muon_lr": 0.125}, parameters[:2])
    optimizer.add_param_group({"params": parameters[2]})
    optimizer.add_param_group({"params": parameters[3:], "lr": 0.25})
    assert [(g["use_muon"], g["lr"]) for g in optimizer.param_groups] == [
        (True, 0.125), (False, 0.5), (True, 0.125), (False, 0.25)
    ]  # fmt: skip
    before = [parameter.detach().clone() for parameter in parameters]
    train(optimizer, parameters)
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    with pytest.raises(ConfigError, match="add them as two groups"):
        optimizer.add_param_group({"params": weights()})
    assert len(optimizer.param_groups) == 4


@pytest.mark.parametrize("carry", ["state_dict", "pickle"])
def test_muon_goes_on_from_a_saved_state(carry):
    parameters, others = weights(), weights()
    first = build_optimizer("Muon", {"lr": 0.1}, parameters)
    train(first, parameters)
    if carry == "pickle":
        second = pickle.loads(pickle.dumps(first))
        others = [parameter for group in second.param_groups for parameter in group["params"]]
        copy_values(parameters, others)
    else:
        second = build_optimizer("Muon", {"lr": 7.0}, others)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        copy_values(parameters, others)
    assert [sorted(state) for state in second.state.values()] == [
        ["momentum_buffer"],
        ["exp_avg", "exp_avg_sq", "step"],
    ]
    train(first, parameters)
    train(second, others)
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("AdmW", {}, 'optimizer.type is "AdmW", which is no optimizer known here. Did you mean "AdamW"?'),
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
        ("Lamb", {"betas": [0.9]}, "expected two numbers from 0 to below 1"),
        ("Lamb", {"min_coeff": 2.0, "max_coeff": 1.0}, "expected 0 <= min_coeff <= max_coeff"),
        ("Lamb", {"max_grad_norm": 1.0}, 'set "gradient_clipping" at the top level'),
        ("Lamb", {"bias_correction": "no"}, 'bias_correction is "no", expected true or false'),
        ("Lamb", {"lr": "0.1"}, "The optimizer Lamb refuses its params"),
        ("Muon", {"ns_method": "gram"}, 'set it to "standard"'),
        ("Muon", {"ns_method": "svd"}, 'expected "standard"'),
        ("Muon", {"ns_steps": 100}, "expected a whole number from 1 to 99"),
        ("Muon", {"muon_lr": -1.0}, "The optimizer Muon refuses its params"),
        ("Muon", {"betas": [0.9, 2.0]}, "The optimizer Muon refuses its params"),
        ("Muon", {"adam_beta": 0.9}, 'has no parameter "adam_beta"'),
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


@pytest.mark.parametrize("name", ["Adam", "Lamb", "Muon"])
def test_no_parameters_at_all_are_refused(name):
    with pytest.raises(ConfigError, match="empty parameter list"):
        build_optimizer(name, {}, [])


@pytest.mark.parametrize("name", ["Adam", "Lamb", "Muon"])
def test_groups_without_tensors_are_refused(name):
    for groups in ([{"lr": 0.5}], [{"params": [1, 2]}]):
        with pytest.raises(ConfigError, match="refuses its params"):
            build_optimizer(name, {}, groups)
