"""Whatever a file, a flag or a DeepSpeed JSON holds, it is resolved or it is one ConfigError; nothing else comes out.

Strategies are built from the schemas, so that a new key is tried as soon as it is declared.
"""

import json
from typing import Any

from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from shardwise.config.catalog import keys_of
from shardwise.config.run.file import checked_run, file_mentions, flag_mentions, setting_names
from shardwise.config.run.handover import pack, unpack
from shardwise.config.run.precedence import resolve
from shardwise.config.run.resolved import IN_JSON, Resolved
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.run.schema import PluginConfig, RunConfig
from shardwise.config.run.yaml_text import parse_yaml, read_scalar
from shardwise.config.schema import EngineConfig
from shardwise.config.source import parse
from shardwise.errors import ConfigError
from tests.facts.runs import asked_of

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

ODD = [None, True, False, 0, 1, 2, 3, -1, 2.0, 1e8, 0.0, 0.5, 10**30, 1e300, float("inf"), float("nan"), "\ud800", ""]
ODD += [
    "auto",
    "none",
    "None",
    "no",
    "yes",
    "true",
    "cpu",
    "nvme",
    "fp16",
    "bf16",
    "DEEPSPEED",
    "NO",
    "A,B",
    "pdsh",
    "/a",
]
ODD += [[], {}, [1, "a"], [[]], {"enabled": True}, {"enabled": False}, {"a": {"b": [None]}}, {"device": "cpu"}]
scalars = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=6)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths_of(root):
    return [path for key in keys_of(root) for path in [key.path, *((*key.path[:-1], alias) for alias in key.aliases)]]


def placed(path: tuple[str, ...], value: Any, data: dict[str, Any]) -> None:
    """Put a value at a path, and leave it where something else stands in the way."""
    for part in path[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            return
    data[path[-1]] = value


@st.composite
def blocks(draw, root, values=anything):
    """Data in the shape of a schema: some of its keys, at their places, with any values."""
    data: dict[str, Any] = {}
    for path in draw(st.lists(st.sampled_from(paths_of(root)), max_size=8)):
        placed(path if draw(st.integers(0, 9)) else path[:1], draw(values), data)
    return data


# Values that are right more often than not, so that resolving is reached and not only checking.
right = {
    "zero_stage": [0, 1, 2, 3],
    "gradient_accumulation_steps": [1, 4, None],
    "gradient_clipping": [0, 0.5, 1.0, None],
    "offload_optimizer_device": ["none", "cpu", "nvme"],
    "offload_optimizer_nvme_path": ["/a", None],
    "offload_param_device": ["none", "cpu", "nvme"],
    "offload_param_nvme_path": ["/a", "none"],
    "zero3_init_flag": [True, False, None],
    "zero3_save_16bit_model": [True, False],
    "deepspeed_moe_layer_cls_names": ["A", "A,B", []],
    "num_nodes_simulated": [1, 2, None],
    "mixed_precision": ["no", "fp16", "bf16"],
    "num_processes": [1, 2, 4, None],
    "num_machines": [1, 2],
    "machine_rank": [0, 1],
    "distributed_type": ["DEEPSPEED", "DEEPSPEED", "NO", "MULTI_CPU", None],
    "use_cpu": [True, False],
    "downcast_bf16": ["no", [1], {"a": [1]}, None],
    "dynamo_backend": ["NO", None],
    "fsdp_config": [{}, None],
    "commands": [[], None],
}
settings_said = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in right.items()})
at_json_keys = st.fixed_dictionaries(
    {},
    optional={path: st.sampled_from([*right[name], "auto"]) for name, path in IN_JSON.items()}
    | {(dtype, "enabled"): st.sampled_from([True, False, "auto"]) for dtype in ("fp16", "bf16")},
)


@st.composite
def right_jsons(draw):
    data: dict[str, Any] = {}
    for path, value in draw(at_json_keys).items():
        placed(path, [value] if path[-1] == "classes" and isinstance(value, str) and value != "auto" else value, data)
    if draw(st.booleans()):
        data.setdefault("zero_optimization", draw(st.sampled_from([{}, True, False, None, {"stage": 2}])))
    return data


def yaml_of(said: dict[str, Any]) -> str:
    """A YAML; JSON's flow style is YAML too."""
    section = {name: value for name, value in said.items() if name in PluginConfig.model_fields}
    top = {name: value for name, value in said.items() if name not in section}
    rows = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in top.items()]
    if section:
        rows += [
            "deepspeed_config:",
            *(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in section.items()),
        ]
    return "\n".join(rows)


def outcome_of(make) -> Resolved | str:
    """What comes out: the settings, or the text of a ConfigError; any other exception fails the test."""
    try:
        return resolve(make())
    except ConfigError as error:
        assert type(error) is ConfigError
        assert str(error).strip()
        return str(error)


def plain(outcome: Resolved | str) -> str:
    """An outcome as text: NaN equals itself there, and 1 is not True."""
    return repr(outcome)


def test_the_right_values_are_those_of_the_schema():
    names = set(setting_names())
    assert set(right) <= names
    assert set(IN_JSON) <= set(right)


# --- the DeepSpeed JSON -----------------------------------------------------------------------------------------------


@quick
@given(blocks(EngineConfig), settings_said, st.booleans())
@example({"zero_optimization": True, "bf16": None}, {"zero_stage": 1, "mixed_precision": "bf16"}, True)
@example({"zero_optimization": {"offload_param": None}}, {"offload_param_device": "cpu"}, False)
@example({"zero_optimization": {"stage": "auto"}, "fp16": {"enabled": "auto", "min_loss_scale": 1e300}}, {}, True)
def test_any_json_in_the_shape_of_the_schema(data, said, by_flags):
    words = {"flags": said} if by_flags else {"yaml": yaml_of(said)}
    text = json.dumps(data)
    outcome = outcome_of(lambda: asked_of(ds_config=text, **words))
    if isinstance(outcome, Resolved):
        assert json.dumps(data) == text, "the user's own data is left as it is"
        assert set(outcome.origins) == set(leaves_of(outcome.ds_config))


def leaves_of(data, path=()):
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from leaves_of(value, (*path, key))
        else:
            yield (*path, key)


@quick
@given(anything)
def test_any_json_at_all(data):
    outcome_of(lambda: asked_of(ds_config=json.dumps(data)))


@quick
@given(st.text(alphabet=st.sampled_from('{}[]":,\\ \n#/*e-+.0123456789truefalsnulNaInfy\t\0é'), max_size=60))
def test_any_text_of_a_json(text):
    outcome_of(lambda: Asked(json=parse(text, "ds.json")))


# --- the YAML ---------------------------------------------------------------------------------------------------------


def file_of(text: str) -> Asked:
    mentions = file_mentions(checked_run(parse_yaml(text, "run.yaml")))
    return Asked({name: (said,) for name, said in mentions.items()}, None, "run.yaml")


PIECES = ["num_processes", "deepspeed_config", "zero_stage", "fsdp_config", "<<", "commands", "downcast_bf16"]
PIECES += [": ", ":", "\n", "\n  ", "\n    ", "- ", "? ", "&a ", "*a", "!!int ", "!!str ", "!!timestamp ", "!!binary "]
PIECES += ["!!set ", "!!omap ", "!x ", "{", "}", "[", "]", ",", "'", '"', "#", "|", ">", "|-\n", "%YAML 1.1\n", "---\n"]
PIECES += ["...\n", "\t", "~", "null", "true", "no", "1", "2", "1e8", "0x1", ".nan", ".inf", "2024-10-30", "12:30:45"]
PIECES += ["9" * 40, "9" * 5000, "=", "@", "`", "\\", "\0", "\x85", "\u2028", "\ufeff", "é", "😀", "\ud800"]


@settings(quick, max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join) | st.text(max_size=40))
@example("1: a\ntrue: b")
@example("? &a [*a]\n: *a")
@example("a: !!timestamp x")
@example("a: !!bool x")
@example("a: &a {b: *a}")
@example("num_processes: " + "9" * 5000)
@example("downcast_bf16: !!timestamp 2024-10-30")
def test_any_text_of_a_yaml(text):
    outcome_of(lambda: file_of(text))


@quick
@given(blocks(RunConfig))
def test_any_yaml_in_the_shape_of_the_schema(data):
    outcome_of(lambda: file_of(json.dumps(data)))


# --- flags ------------------------------------------------------------------------------------------------------------

names = st.sampled_from([*setting_names(), "fp16"])


@quick
@given(st.dictionaries(names | st.text(max_size=8), st.text(max_size=8) | st.sampled_from([str(odd) for odd in ODD])))
def test_any_text_of_flags(flags):
    outcome_of(lambda: Asked().stronger(flag_mentions(flags)))
    outcome_of(lambda: Asked().stronger(flag_mentions({name: read_scalar(text) for name, text in flags.items()})))


@quick
@given(st.dictionaries(names, anything))
def test_any_value_of_flags(flags):
    outcome_of(lambda: Asked().stronger(flag_mentions(flags)))


# --- the hand-over ----------------------------------------------------------------------------------------------------


@settings(quick, max_examples=300)
@given(settings_said, settings_said, right_jsons() | st.none(), settings_said)
@example({"downcast_bf16": [1]}, {}, None, {})
@example({"deepspeed_moe_layer_cls_names": "A,B"}, {}, {"zero_optimization": {"stage": 1}}, {})
def test_what_is_packed_is_resolved_as_if_it_never_was(yaml, flags, data, code):
    """Also together with what the script adds later."""
    typed = flag_mentions({name: value for name, value in code.items() if name in PluginConfig.model_fields})
    later = {name: Said(said.value, Origin.CODE, "the script") for name, said in typed.items()}
    try:
        asked = asked_of(yaml_of(yaml), data, flags)
    except ConfigError:
        assume(False)
    again = unpack(pack(asked))
    assert plain(outcome_of(lambda: again)) == plain(outcome_of(lambda: asked))
    assert plain(outcome_of(lambda: again.stronger(later))) == plain(outcome_of(lambda: asked.stronger(later)))
    assert pack(again) == pack(asked)


def test_faults_of_a_json_are_handed_over():
    """A launcher may pack before it resolves."""
    asked = asked_of(ds_config='{"zero_optimization": {"stage": 1,\n"stage": 2}}')
    assert "found twice, on lines 1 and 2" in outcome_of(lambda: asked)
    assert outcome_of(lambda: unpack(pack(asked))) == outcome_of(lambda: asked)


def test_infinity_and_nan_travel():
    asked = asked_of(ds_config={"zero_optimization": {"stage": 1}, "steps_per_print": float("inf")})
    assert unpack(pack(asked)).json.data == asked.json.data
