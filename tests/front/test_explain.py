"""The fear: a screen that explains another config than the one that would run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise.commands.main import main
from shardwise.config.run.auto import Seen, fill
from shardwise.config.run.precedence import resolve
from shardwise.config.run.said import Origin, Said
from shardwise.errors import ConfigError
from shardwise.explain.read import read, split
from shardwise.explain.rows import Explanation, Row, explain
from shardwise.explain.states import parse_count, states_per_rank

YAML = """\
distributed_type: DEEPSPEED
num_processes: 4
deepspeed_config:
  deepspeed_config_file: ds.json
"""
JSON = """\
{
  "train_micro_batch_size_per_gpu": 2,
  "bf16": {"enabled": true},
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
  "vocabulary_size": 7,
  "zero_optimization": {
    "stage": 3,
    "reduce_bucket_size": "auto",
    "prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto"
  }
}
"""
LISTS_MODULES = """
import atexit, sys
atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))
from shardwise.commands.main import main
sys.argv = ["shardwise", *sys.argv[1:]]
main()
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, which is the working directory, with both files in it."""
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME", "SHARDWISE_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(YAML)
    (tmp_path / "ds.json").write_text(JSON)
    return tmp_path


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `shardwise explain WORDS` in this process: exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shardwise", "explain", *words])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


def explained(*words: str) -> Explanation:
    flags, files = split(words)
    return explain(read(files, flags, {"HOME": "."})[0])


def rows(explanation: Explanation) -> dict[tuple[str, str], Row]:
    return {(table.title, row.key): row for table in explanation.tables for row in table.rows}


def test_each_value_comes_with_the_file_and_line_or_the_flag_that_said_it(home: Path) -> None:
    found = rows(explained("run.yaml", "--gradient-clipping=0.5"))
    places = {
        ("Settings of the run", "num_processes"): (4, "run.yaml, line 2"),
        ("Settings of the run", "mixed_precision"): ("bf16", "ds.json, line 3"),
        ("DeepSpeed config, top level", "gradient_clipping"): (0.5, "--gradient_clipping"),
        ("optimizer", "params.betas"): ([0.9, 0.95], "ds.json, line 4"),
        ("zero_optimization", "stage"): (3, "ds.json, line 7"),
        ("zero_optimization", "sub_group_size"): (1_000_000_000, "default"),
    }
    assert {key: (found[key].value, found[key].place) for key in places} == places
    assert "16 P" in found["zero_optimization", "stage"].cost


def test_every_value_of_the_config_that_would_run_has_its_row(home: Path) -> None:
    explanation = explained("run.yaml")
    found = rows(explanation)
    for path, said in explanation.resolved.origins.items():
        aliased = {"prefetch_bucket_size": "stage3_prefetch_bucket_size"}.get(str(path[-1]), str(path[-1]))
        if path[:2] == ("optimizer", "params"):
            row = found["optimizer", f"params.{aliased}"]
        else:
            row = found[".".join(map(str, path[:-1])) or "DeepSpeed config, top level", aliased]
        assert row.place == said.place
        assert row.value == said.value or said.value == float("inf")  # Infinity is read as "never"
        assert row.shown_first or not said.value or said.origin is Origin.DEFAULT


def test_formula_of_auto_is_what_prepare_computes(home: Path) -> None:
    flags, files = split(["run.yaml"])
    asked, _ = read(files, flags, {"HOME": "."})
    found = rows(explain(asked))
    hidden = Said(1021, Origin.AUTO, "config.hidden_size")
    filled = fill(resolve(asked), Seen(num_processes=4, hidden_size=hidden, optimizer={"lr": 0.1})).ds_config
    assert filled is not None
    for written, key in (
        ("reduce_bucket_size", "reduce_bucket_size"),
        ("prefetch_bucket_size", "stage3_prefetch_bucket_size"),
        ("stage3_param_persistence_threshold", "stage3_param_persistence_threshold"),
    ):
        row = found["zero_optimization", key]
        formula = row.auto.removeprefix("prepare fills in ").partition(";")[0]
        assert row.value == "auto"
        assert eval(formula, {"hidden_size": 1021, "int": int}) == filled["zero_optimization"][written]
    assert "DummyOptim(lr=...)" in found["optimizer", "params.lr"].auto


def test_difference_from_deepspeed_is_told_where_the_key_is_not_given(home: Path) -> None:
    silent = rows(explained("ds.json"))["DeepSpeed config, top level", "gradient_clipping"]
    assert silent.value == 0 and silent.shown_first
    assert silent.deepspeed.startswith("1.0 where the key is not given")
    spoken = rows(explained("ds.json", "--gradient_clipping", "0"))["DeepSpeed config, top level", "gradient_clipping"]
    assert spoken.deepspeed == ""
    at_stage_2 = JSON.replace('"stage": 3', '"stage": 2')
    (home / "ds2.json").write_text(at_stage_2)
    live = ("zero_optimization", "stage3_max_live_parameters")
    assert rows(explained("ds.json"))[live].shown_first
    assert not rows(explained("ds2.json"))[live].shown_first


def test_refused_and_idle_keys_are_rows_with_reasons_and_the_exit_code_is_2(home: Path, command: Command) -> None:
    refused = '"amp": {"enabled": true}, "zero_optimization": {"cpu_offload": true,'
    (home / "bad.json").write_text(JSON.replace('"zero_optimization": {', refused))
    code, out, _ = command("bad.json", "--json")
    assert code == 2
    shown = json.loads(out)
    found = {(row["block"], row["key"]): row for row in shown["settings"]}
    amp = found["DeepSpeed config, top level", "amp"]
    assert "does not exist here" in amp["refused"] and amp["place"] == "bad.json, line 6"
    assert "not supported" in found["zero_optimization", "cpu_offload"]["refused"]
    assert "no part of training asks for it" in found["DeepSpeed config, top level", "vocabulary_size"]["idle"]
    assert "amp" in shown["faults"][0] and "zero_optimization.cpu_offload" in shown["faults"][0]
    assert command("ds.json")[0] == 0


def test_contradictions_and_typos_are_the_launchers_own_errors(home: Path, command: Command) -> None:
    code, _, err = command("run.yaml", "--zero_stage", "2")
    assert code == 2 and "zero_stage: 2 (--zero_stage) but 3 (ds.json, line 7)" in err
    code, _, err = command("run.yaml", "--zero_stag", "2")
    assert code == 2 and "zero_stage" in err and "Did you mean" in err
    code, _, err = command("ds.json", "--zero_stage")
    assert code == 2 and "--zero_stage=VALUE" in err


def test_batch_that_does_not_fit_the_ranks_is_a_verdict(home: Path, command: Command) -> None:
    (home / "batch.json").write_text('{"train_batch_size": 10, "zero_optimization": {"stage": 1}}')
    code, out, _ = command("batch.json", "-n", "4")
    assert code == 2 and "8 or 12" in out
    assert command("batch.json", "-n", "5")[0] == 0


def test_yaml_and_json_are_told_apart_by_what_they_hold(home: Path) -> None:
    (home / "run.json").write_text('{"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}}')
    assert explained("run.json").resolved["zero_stage"] == 1
    both = explained("run.yaml", "ds.json")
    assert both.resolved["num_processes"] == 4 and both.resolved["zero_stage"] == 3
    with pytest.raises(ConfigError, match=r"2 configs of DeepSpeed JSON were named"):
        explained("ds.json", "./ds.json")


def test_default_view_of_nothing_says_that_nothing_is_sharded(command: Command) -> None:
    code, out, _ = command()
    assert code == 0 and "without ZeRO" in out


def test_all_shows_untouched_defaults_too(command: Command) -> None:
    brief, full = command("ds.json")[1], command("ds.json", "--all")[1]
    assert "sub_group_size" not in brief and "sub_group_size = 1e9    [default]" in full


@pytest.mark.parametrize(
    ("dtype", "formulas"),
    [
        ("fp32", (lambda w: 16, lambda w: 8 + 8 / w, lambda w: 4 + 12 / w, lambda w: 16 / w)),
        ("bf16", (lambda w: 18, lambda w: 6 + 12 / w, lambda w: 2 + 16 / w, lambda w: 16 / w)),
    ],
)
def test_model_states_are_those_of_the_memory_page(home: Path, dtype: str, formulas: Any) -> None:
    num_parameters = 2**20  # divides evenly, so that no padding comes in
    (home / "dtype.json").write_text(JSON.replace("true", str(dtype == "bf16").lower()))
    config = explained("dtype.json").config
    for num_ranks in (2, 4, 8):
        stages = states_per_rank(config, num_parameters, num_ranks).stages
        assert [found.bytes.total for found in stages] == [int(f(num_ranks) * num_parameters) for f in formulas]
        assert [found.stage for found in stages if found.in_force] == [3]
    alone = states_per_rank(config, num_parameters, 1).stages
    assert len({found.bytes.total for found in alone}) == 1  # one rank alone shards nothing


def test_size_of_a_model_is_read_as_people_write_it(command: Command) -> None:
    written = {"7B": 7 * 10**9, "350M": 350 * 10**6, "1.5b": 1_500_000_000, "124_439_808": 124_439_808, "1e6": 10**6}
    assert {text: parse_count(text) for text in written} == written
    for wrong in ("", "7X", "-1", "0", "B7", "1e30"):
        with pytest.raises(ConfigError, match="--parameters"):
            parse_count(wrong)
    code, _, err = command("ds.json", "--parameters", "7B")
    assert code == 2 and "Add --num_processes" in err


@pytest.mark.parametrize("words", ["explain ds.json -n 4 --parameters 7B", "explain --help", "test --help"])
def test_neither_numbers_nor_help_wait_for_torch(home: Path, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTS_MODULES, *words.split()], cwd=home, capture_output=True, text=True, check=True
    )
    assert ("Example: shardwise" if "--help" in words else "stage 3: parameters 0 B") in done.stdout
    assert not set(done.stderr.split()) & {"torch", "numpy", "transformers"}


def test_what_rests_off_the_device_is_said(home: Path, command: Command) -> None:
    nvme = '"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/fast"},'
    (home / "nvme.json").write_text(JSON.replace('"zero_optimization": {', nvme))
    code, out, _ = command("nvme.json", "-n", "4", "--parameters", "7B")
    assert code == 0 and "off the device: optimizer state, masters, gradients in files." in out
    assert "off the device" not in command("ds.json", "-n", "4", "--parameters", "7B")[1]


def test_what_hpz_keeps_is_said(home: Path, command: Command) -> None:
    hpz = '"zero_optimization": {"zero_hpz_partition_size": 2, "zero_quantized_weights": true,'
    (home / "hpz.json").write_text(JSON.replace('"zero_optimization": {', hpz))
    code, out, _ = command("hpz.json", "-n", "4", "--parameters", "8B", "--json")
    assert code == 0 and json.loads(out)["model_states"]["secondary_bytes"] == 8_000_000_000 / 2 * (1 + 4 / 256)
    assert "zero_hpz_partition_size keeps" in command("hpz.json", "-n", "4", "--parameters", "8B")[1]
