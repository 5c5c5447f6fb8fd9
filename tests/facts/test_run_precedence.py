"""Of everything that is said about a setting the right word wins, with its place: code, flag, YAML, default; and the
DeepSpeed JSON alone decides what it says concretely.

One table of settings is crossed with who speaks and with what the JSON holds; the reference is `outcome_of`, a few
lines that know no setting.
"""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from shardwise.config.run.said import Origin
from shardwise.config.run.schema import PluginConfig
from tests.facts.runs import JSON_NAME, YAML_NAME, error_of, in_code, line_of, resolved_of

ERROR = "ConfigError"
SILENT = object()


@dataclass(frozen=True)
class Setting:
    """Values that a setting is given: one by everybody who agrees, another by who contradicts, a third by nobody."""

    name: str
    value: Any
    other: Any
    default: Any
    path: tuple[str, ...] | None = None  # of its key in the JSON
    json_default: Any = SILENT  # what a JSON without the key means, where it differs from `default`
    waits: bool = False  # whether "auto" stays for prepare where nobody speaks

    @property
    def unheard(self) -> Any:
        """What holds where neither anybody nor the JSON says anything."""
        return self.default if self.json_default is SILENT else self.json_default


ZERO = "zero_optimization"
SETTINGS = [
    Setting("zero_stage", 3, 1, 2, (ZERO, "stage"), json_default=0),
    Setting("gradient_accumulation_steps", 4, 8, None, ("gradient_accumulation_steps",), waits=True),
    Setting("gradient_clipping", 0.5, 2.0, None, ("gradient_clipping",), json_default=0.0, waits=True),
    Setting("offload_optimizer_device", "cpu", "nvme", "none", (ZERO, "offload_optimizer", "device")),
    Setting("offload_optimizer_nvme_path", "/a", "/b", None, (ZERO, "offload_optimizer", "nvme_path")),
    Setting("offload_param_device", "nvme", "cpu", "none", (ZERO, "offload_param", "device")),
    Setting("offload_param_nvme_path", "/a", "/b", None, (ZERO, "offload_param", "nvme_path")),
    Setting("zero3_save_16bit_model", True, False, False, (ZERO, "stage3_gather_16bit_weights_on_model_save")),
    Setting("deepspeed_moe_layer_cls_names", ("A", "B"), ("C",), (), (ZERO, "leaf_module", "classes")),
    Setting("num_nodes_simulated", 2, 4, None, ("shardwise", "simulated_nodes")),
    Setting("zero3_init_flag", True, False, None),
    Setting("deepspeed_config_file", "a.json", "b.json", None),
    Setting("deepspeed_hostfile", "/hosts", "/others", None),
    Setting("deepspeed_exclusion_filter", "worker-1:0", "worker-2", None),
    Setting("deepspeed_inclusion_filter", "worker-1:1", "worker-3", None),
    Setting("deepspeed_multinode_launcher", "pdsh", "ssh", None),
    Setting("mixed_precision", "bf16", "fp16", "no", ("mixed_precision",)),
]
BY_NAME = {setting.name: setting for setting in SETTINGS}
IN_JSON = [setting for setting in SETTINGS if setting.path is not None]

# Who says what: "v" the setting's value, "o" the other one.
SPEAKERS = ["", "file:v", "flag:v", "code:v", "flag:v file:o", "code:v file:o", "flag:v code:v", "flag:v code:o"]
SPEAKERS += ["flag:v code:v file:v", "flag:v code:v file:o", "flag:o code:v file:v", "flag:o file:o", "code:o file:v"]


def spoken(setting: Setting, speakers: str) -> dict[str, Any]:
    words = (word.split(":") for word in speakers.split())
    return {who: setting.value if what == "v" else setting.other for who, what in words}


def texts_of(setting: Setting, said: dict[str, Any]) -> dict[str, Any]:
    texts: dict[str, Any] = {}
    if "file" in said:
        texts["yaml"] = yaml_of(setting, said["file"])
    if "flag" in said:
        value = said["flag"]
        texts["flags"] = {setting.name: ",".join(value) if isinstance(value, tuple) else value}
    if "code" in said:
        texts["code"] = {setting.name: said["code"]}
    return texts


def word_of(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else json.dumps(value)


def yaml_of(setting: Setting, value: Any) -> str:
    """A YAML of several lines, so that a wrong line would show."""
    word = word_of(value)
    if setting.name in PluginConfig.model_fields:
        return f"num_machines: 1\n\ndeepspeed_config:\n  {setting.name}: {word}\nuse_cpu: false\n"
    return f"num_machines: 1\n{setting.name}: {word}\nuse_cpu: false\n"


def json_of(setting: Setting, value: Any) -> dict[str, Any]:
    """A DeepSpeed JSON that holds `value` at the setting's key, or does not hold the key."""
    data: dict[str, Any] = {"train_batch_size": 8, ZERO: {"overlap_comm": True}}
    if value is SILENT:
        return data
    if setting.name == "mixed_precision":
        return data | ({"bf16": {"enabled": "auto"}} if value == "auto" else {value: {"enabled": True}})
    assert setting.path is not None
    block = data
    for part in setting.path[:-1]:
        block = block.setdefault(part, {})
    block[setting.path[-1]] = list(value) if isinstance(value, tuple) else value
    return data


def place_of(setting: Setting, who: str, texts: dict[str, Any]) -> str:
    if who == "code":
        return in_code(setting.name, None).place
    if who == "flag":
        return f"--{setting.name}"
    if who == "file":
        return f"{YAML_NAME}, line {line_of(texts['yaml'], setting.name + ':')}"
    key = setting.value if setting.name == "mixed_precision" else None
    text = json.dumps(json_of(setting, setting.value), indent=2)
    if key is not None:
        return f"{JSON_NAME}, line {line_of(text, json.dumps(key)) + 1}"  # bf16.enabled
    assert setting.path is not None
    return f"{JSON_NAME}, line {line_of(text, json.dumps(setting.path[-1]))}"


def outcome_of(setting: Setting, said: dict[str, Any], in_json: Any) -> tuple[Any, str] | str:
    """The reference: the value and who said it, or ERROR."""
    if code_against_flag(said):
        return ERROR
    if in_json is not None and in_json is not SILENT and in_json != "auto":
        return ERROR if any(value != in_json for value in said.values()) else (in_json, "json")
    for who in ("code", "flag", "file"):
        if who in said:
            return said[who], who
    return (setting.unheard if in_json is SILENT else setting.default), "default"


def code_against_flag(said: dict[str, Any]) -> bool:
    return "code" in said and "flag" in said and said["code"] != said["flag"]


def value_in(data: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        data = data.get(part, SILENT) if isinstance(data, dict) else SILENT
    return data


def precision_in(data: dict[str, Any]) -> str:
    on = [dtype for dtype in ("fp16", "bf16") if data[dtype]["enabled"]]
    assert len(on) <= 1
    return on[0] if on else "no"


def as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_the_table_holds_every_setting_of_zero():
    assert BY_NAME.keys() == {*PluginConfig.model_fields, "mixed_precision"}
    assert {setting.name: PluginConfig.model_fields[setting.name].default for setting in SETTINGS[:-1]} == {
        setting.name: setting.default for setting in SETTINGS[:-1]
    }


@pytest.mark.parametrize("speakers", SPEAKERS)
@pytest.mark.parametrize("name", BY_NAME)
def test_without_a_json(name, speakers):
    setting = BY_NAME[name]
    said = spoken(setting, speakers)
    texts = texts_of(setting, said)
    kind = {"distributed_type": "DEEPSPEED"}
    texts["flags"] = texts.get("flags", {}) | kind
    outcome = outcome_of(setting, said, None)
    if outcome == ERROR:
        row = f"\n  {name}: {shown(said['flag'])} (--{name}) but {shown(said['code'])} (DeepSpeedPlugin({name}=…))\n"
        assert row in error_of(**texts)
        return
    resolved = resolved_of(**texts)
    value, who = outcome
    winner = resolved.values[name]
    assert (winner.value, winner.origin) == (value, Origin(who))
    assert winner.place == ("default" if who == "default" else place_of(setting, who, texts))
    if setting.path is None:
        return
    if name == "mixed_precision":
        assert precision_in(resolved.ds_config) == value
        assert resolved.origins["bf16", "enabled"].place == winner.place
        return
    written = value_in(resolved.ds_config, setting.path)
    if who == "default":
        instead = {"gradient_accumulation_steps": "auto", "gradient_clipping": 0.0}
        instead |= dict.fromkeys(("deepspeed_moe_layer_cls_names", "num_nodes_simulated"), SILENT)
        assert written == instead.get(name, as_json(value))
    else:
        assert written == as_json(value)
        assert resolved.origins[setting.path].place == winner.place
        assert resolved.origins[setting.path].origin is winner.origin


@pytest.mark.parametrize("speakers", SPEAKERS)
@pytest.mark.parametrize("in_json", ["agrees", "auto", "silent"])
@pytest.mark.parametrize("setting", IN_JSON, ids=lambda setting: setting.name)
def test_beside_a_json(setting, in_json, speakers):
    name = setting.name
    held = {"agrees": setting.value, "auto": "auto", "silent": SILENT}[in_json]
    said = spoken(setting, speakers)
    data = json_of(setting, held)
    texts = texts_of(setting, said) | {"ds_config": data}
    outcome = outcome_of(setting, said, held)
    if outcome == ERROR:
        text = error_of(**texts)
        quarrel = {"code", "flag"} if code_against_flag(said) else {*said, "json"}
        for who in quarrel:
            assert f"{shown((said | {'json': held})[who])} ({place_of(setting, who, texts)})" in text
        return
    resolved = resolved_of(**texts)
    value, who = outcome
    winner = resolved.values[name]
    assert (winner.value, winner.origin) == (value, Origin(who))
    if who == "json":
        assert winner.place == place_of(setting, "json", texts)
    elif who != "default":
        assert winner.place == place_of(setting, who, texts)
    twice = [text for text in resolved.warnings if text.startswith("said twice")]
    assert len(twice) == (1 if who == "json" and said else 0)
    for speaker in said if who == "json" else ():
        assert place_of(setting, speaker, texts) in twice[0]
    if name == "mixed_precision":
        assert precision_in(resolved.ds_config) == value
        assert resolved.origins["bf16", "enabled"].place == winner.place
        return
    assert setting.path is not None
    written = value_in(resolved.ds_config, setting.path)
    if who == "default":
        unheard = SILENT if held is SILENT else "auto" if setting.waits else as_json(value)
        assert written == unheard
    else:
        assert written == as_json(value)
        assert resolved.origins[setting.path].place == winner.place


@pytest.mark.parametrize("name", [setting.name for setting in SETTINGS if setting.path is None])
@pytest.mark.parametrize("speakers", SPEAKERS)
def test_what_a_json_has_no_key_for_is_decided_beside_it(name, speakers):
    setting = BY_NAME[name]
    said = spoken(setting, speakers)
    texts = texts_of(setting, said) | {"ds_config": {ZERO: {"stage": 1}}}
    outcome = outcome_of(setting, said, None)
    if outcome == ERROR:
        assert f"--{name}" in error_of(**texts)
        return
    winner = resolved_of(**texts).values[name]
    assert (winner.value, winner.origin) == (outcome[0], Origin(outcome[1]))


def test_a_json_that_nobody_speaks_beside_keeps_all_its_own():
    data = {"train_batch_size": 8, ZERO: {"stage": 1, "reduce_bucket_size": 5e8}, "optimizer": {"type": "SGD"}}
    resolved = resolved_of(ds_config=data)
    added = {"steps_per_print": float("inf"), "fp16": {"enabled": False}, "bf16": {"enabled": False}}
    assert resolved.ds_config == data | added
    assert {said.origin for path, said in resolved.origins.items() if path[0] in data} == {Origin.JSON}


def test_every_contradiction_of_a_run_is_listed_at_once():
    yaml = "deepspeed_config:\n"
    data: dict[str, Any] = {"bf16": {"enabled": True}}
    for setting in IN_JSON[:-1]:
        yaml += f"  {setting.name}: {word_of(setting.other)}\n"
        block = data
        for part in setting.path[:-1]:
            block = block.setdefault(part, {})
        block[setting.path[-1]] = as_json(setting.value)
    text = error_of(yaml + "mixed_precision: fp16\n", data)
    rows = [row.split(":")[0].strip() for row in text.splitlines() if " but " in row]
    assert sorted(rows) == sorted(setting.name for setting in IN_JSON)


def shown(value: Any) -> str:
    return json.dumps(value)
