"""A run's file is read as people mean it: words stay words, and what is no YAML is pointed at.

The reference for plain files is yaml.safe_load; where YAML 1.1 surprises (`no`, `1e8`, `010`, `1:30`), the table says
what is meant.
"""

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.run.file import checked_run, file_mentions, read_run_file
from shardwise.config.run.yaml_text import parse_yaml, read_scalar
from shardwise.errors import ConfigError


def values_of(text: str):
    return {name: said.value for name, said in file_mentions(checked_run(parse_yaml(text, "run.yaml"))).items()}


def error_in(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        values_of(text)
    return str(caught.value)


def error_of_file(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_run_file(path)
    return str(caught.value)


# --- words and numbers ------------------------------------------------------------------------------------------------

WORDS = {
    "no": "no",
    "'no'": "no",
    "No": "No",
    "yes": "yes",
    "on": "on",
    "off": "off",
    "n": "n",
    "true": True,
    "True": True,
    "FALSE": False,
    "'true'": "true",
    "null": None,
    "~": None,
    "": None,
    "none": "none",
    "2": 2,
    "'2'": "2",
    "+2": 2,
    "-2": -2,
    "010": 10,
    "0x10": "0x10",
    "1_000": "1_000",
    "1:30": "1:30",
    "1e8": 1e8,
    "5e-4": 5e-4,
    "1.": 1.0,
    ".5": 0.5,
    ".inf": math.inf,
    "-.Inf": -math.inf,
    "2024-10-30": "2024-10-30",
    "0,1": "0,1",
    "=": "=",
    "<<": "<<",
}


@pytest.mark.parametrize("word", WORDS, ids=repr)
def test_a_word_is_what_it_looks_like(word):
    data = parse_yaml(f"key: {word}\n", "run.yaml").data
    assert data == {"key": WORDS[word]}
    assert type(data["key"]) is type(WORDS[word])
    if word:
        assert read_scalar(word) == WORDS[word]  # a flag reads words in the same way


def test_nan_is_a_number():
    assert math.isnan(parse_yaml("key: .nan", "run.yaml").data["key"])


@pytest.mark.parametrize(
    "text", ["", "a: b", "[1, 2]", "# only a remark", "9" * 5000, "!!int x", "\0", "'open", "!a b"]
)
def test_a_flag_that_is_no_scalar_stays_its_text(text):
    assert read_scalar(text) == text


@given(st.text(max_size=20))
def test_any_text_of_a_flag_is_read(text):
    assert isinstance(read_scalar(text), str | int | float | None)


# A dumper of YAML 1.1 leaves 08 and 1e8 without quotes, since they are text there; people mean numbers.
_texts = st.text().filter(lambda text: not re.fullmatch(r"[-+.]*[0-9][-+.0-9eE]*", text))
_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=12,
)


@given(_plain, st.sampled_from([None, True, False]))
def test_what_a_dumper_writes_is_read_back(value, flow):
    assert parse_yaml(yaml.safe_dump(value, default_flow_style=flow), "run.yaml").data == value


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["no", "'no'", '"no"', "false"])
def test_mixed_precision_no_in_every_spelling(word):
    assert values_of(f"mixed_precision: {word}") == {"mixed_precision": "no"}


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("no", False), ("true", True), ("'False'", False), ("'1'", True)]
)
def test_switches_in_every_spelling(word, value):
    assert values_of(f"use_cpu: {word}") == {"use_cpu": value}
    assert values_of(f"deepspeed_config:\n  zero3_init_flag: {word}") == {"zero3_init_flag": value}


@pytest.mark.parametrize("word", ["none", "None", "null", "~", ""])
def test_no_device_and_no_path_in_every_spelling(word):
    path = values_of(f"deepspeed_config:\n  offload_param_nvme_path: {word}")
    assert path == {"offload_param_nvme_path": None}
    if word != "None":
        device = values_of(f"deepspeed_config:\n  offload_param_device: {word}")
        assert device == {"offload_param_device": "none"}


@pytest.mark.parametrize(("word", "value"), [("0", "0"), ("0,1", "0,1"), ("all", "all"), ("", None), ("'2'", "2")])
def test_gpu_ids_are_text(word, value):
    assert values_of(f"gpu_ids: {word}") == {"gpu_ids": value}


@pytest.mark.parametrize("word", ["A,B", "'A, B'", "[A, B]", "\n  - A\n  - B"])
def test_a_comma_list_in_every_spelling(word):
    found = values_of(f"deepspeed_config:\n  deepspeed_moe_layer_cls_names: {word}")
    assert found == {"deepspeed_moe_layer_cls_names": ("A", "B")}


def test_a_whole_number_may_be_written_with_an_exponent():
    (value,) = values_of("num_processes: 1e1").values()
    assert (value, type(value)) == (10, int)


def test_a_number_in_quotes_is_text():
    assert 'line 1, num_processes: found "2", expected a whole number' in error_in('num_processes: "2"')


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "null", "{}", "--- {}\n...\n"])
def test_an_empty_file_says_nothing(text):
    assert values_of(text) == {}


def test_empty_values_and_blocks():
    assert values_of("main_process_ip:\nnum_processes:\ndeepspeed_config:\nfsdp_config:\n") == {
        "main_process_ip": None,
        "num_processes": None,
        "fsdp_config": None,
    }
    assert "line 2, num_machines: found null, expected a whole number" in error_in("use_cpu: no\nnum_machines:")


def test_comments_and_odd_layout():
    text = """
# who runs
num_processes:   4   # ranks

'use_cpu' : yes
? debug
: true
deepspeed_config: {zero_stage: 3,
   offload_param_device: cpu}   # one line
"""
    mentions = file_mentions(checked_run(parse_yaml(text, "run.yaml")))
    assert {name: (said.value, said.place) for name, said in mentions.items()} == {
        "num_processes": (4, "run.yaml, line 3"),
        "use_cpu": (True, "run.yaml, line 5"),
        "debug": (True, "run.yaml, line 6"),
        "zero_stage": (3, "run.yaml, line 8"),
        "offload_param_device": ("cpu", "run.yaml, line 9"),
    }


def test_an_alias_is_what_it_names():
    assert values_of("num_processes: &n 4\nnum_machines: *n") == {"num_processes": 4, "num_machines": 4}


def test_a_merge_key_is_no_setting():
    text = error_in("deepspeed_config: &base\n  zero_stage: 3\n<<: *base\n")
    assert "line 3, <<: unknown key" in text


def test_a_key_that_stands_twice_is_a_fault_of_its_block_alone():
    source = parse_yaml("a: {b: 1}\na:\n  b: 2\n  c: 3\nc: 4\n", "run.yaml")
    (fault,) = source.faults
    assert fault.path == ("a",)
    assert "on lines 1 and 2" in fault.text


@pytest.mark.parametrize("text", ["1: a\ntrue: b", "1: a\n1.0: b", "null: a", "~: a\nnull: b", ".nan: a\n.NaN: b"])
def test_keys_that_are_no_text_are_faults(text):
    assert "expected a string" in error_in(text) or "found twice" in error_in(text)


NESTED_BY_ALIASES = "\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 80))])


# --- what is no YAML --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_processes: 2\n---\nnum_processes: 4\n", "line 2, column 1: expected a single document in the stream"),
        ("use_cpu:\n\t- no", "line 2, column 1: while scanning for the next token, found character '\\t'"),
        ("use_cpu: [no", "expected ',' or ']'"),
        ("use_cpu: 'no", "while scanning a quoted scalar"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("use_cpu: no\n  debug: no", "line 2, column 8: mapping values are not allowed here"),
        ("use_cpu: *missing", "found undefined alias 'missing'"),
        ("use_cpu: no\ndebug: \x07", "line 2: found the character #x0007"),
        ("use_cpu: !!python/object/apply:os.system [ls]", "found the tag tag:yaml.org,2002:python/object/apply"),
        ("use_cpu: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("use_cpu: !mine yes", "could not determine a constructor for the tag '!mine'"),
        ("use_cpu: !!timestamp 2024-10-30", "found the tag tag:yaml.org,2002:timestamp, expected true, false, null"),
        ("use_cpu: !!timestamp x", 'line 1, column 10: found "x", which is no timestamp'),
        ("use_cpu: !!bool maybe", 'found "maybe", which is no bool'),
        ("use_cpu: !!binary aGk=", "found the tag tag:yaml.org,2002:binary"),
        ("use_cpu: !!set {a}", "found the tag tag:yaml.org,2002:set"),
        ("num_processes: !!int two", 'found "two", which is no int'),
        ("num_processes: " + "9" * 5000, "which is no int"),
        ("? [a, b]\n: c", "found a block or a list as a key"),
        ("? {a: b}\n: c", "found a block or a list as a key"),
        ("a: &a [*a]", "expected at most 64 blocks inside each other"),
        ("a: &a {b: *a}", "expected at most 64 blocks inside each other"),
        ("[" * 100 + "]" * 100, "expected at most 64 blocks inside each other"),
        ("[" * 20_000, "blocks inside each other"),
        (
            "a: &a [x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}]\n" for n in range(25)),
            "unknown key",
        ),
    ],
    ids=lambda text: repr(text[:25]),
)
def test_what_is_broken_is_pointed_at(text, words):
    assert words in error_in(text)


@pytest.mark.parametrize("shape", ["[{}]", "{{k: {}}}"])
def test_aliases_that_multiply_do_not_hang(shape):
    """Ten aliases of ten aliases of ten aliases ...: nine short lines are a billion values."""
    lines = ["a0: &a0 x"]
    for level in range(1, 10):
        items = ", ".join([f"*a{level - 1}"] * 10)
        inner = f"[{items}]" if shape == "[{}]" else "{" + ", ".join(f"k{n}: *a{level - 1}" for n in range(10)) + "}"
        lines.append(f"a{level}: &a{level} {inner}")
    assert "found more than 10000 values" in error_in("\n".join(lines))


def test_aliases_in_a_key_do_not_hang():
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 4)), "? *a3\n: b"]
    assert "found a block or a list as a key" in error_in("\n".join(lines))


@pytest.mark.parametrize(("text", "shown"), [("hello", '"hello"'), ("- a", '["a"]'), ("3", "3"), ("no", '"no"')])
def test_a_file_that_is_no_block_is_an_error(text, shown):
    assert f"run.yaml holds {shown}, expected a block" in error_in(text)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfnum_processes: 2\r\nuse_cpu: yes\r\n")
    mentions = file_mentions(read_run_file(path))
    assert {name: said.value for name, said in mentions.items()} == {"num_processes": 2, "use_cpu": True}
    assert mentions["use_cpu"].place == f"{path}, line 2"
    path = tmp_path / "run.json"
    path.write_bytes(b'\xef\xbb\xbf{"num_processes": 2}')
    assert file_mentions(read_run_file(path))["num_processes"].value == 2


@pytest.mark.parametrize("data", [b"num_processes: 2 # \xe9t\xe9", "num_processes: 2".encode("utf-16")])
def test_a_file_of_another_encoding_is_named(tmp_path, data):
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    assert f"{path} is not UTF-8 text (byte " in error_of_file(path)


def test_what_is_no_file_is_named(tmp_path):
    assert f"{tmp_path} cannot be read: Is a directory. Give --config_file a file." in error_of_file(tmp_path)
    missing = tmp_path / "none.yaml"
    assert f"{missing} cannot be read: No such file or directory." in error_of_file(missing)
    assert "cannot be read: File name too long" in error_of_file(tmp_path / ("x" * 300))


def test_a_json_is_read_as_json(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"num_processes": 2, // ranks\n "deepspeed_config": {"zero_stage": 3,},}')
    mentions = file_mentions(read_run_file(path))
    assert {name: (said.value, said.place) for name, said in mentions.items()} == {
        "num_processes": (2, f"{path}, line 1"),
        "zero_stage": (3, f"{path}, line 2"),
    }
    path.write_text("num_processes: 2")
    assert "is not JSON: line 1, column 1" in error_of_file(path)
