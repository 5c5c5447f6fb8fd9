"""The fear: a bug report that lacks the one fact, or that gives away a secret."""

import json
import sys
from pathlib import Path

import pytest
import torch

from shardwise.commands.main import main


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    return tmp_path


def facts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    monkeypatch.setattr(sys, "argv", ["shardwise", "env", "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    found: dict[str, str] = json.loads(capsys.readouterr().out)
    assert "a-secret" not in str(found)
    return found


def test_facts_of_the_machine_are_there(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    found = facts(monkeypatch, capsys)
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    assert found["GLOO_SOCKET_IFNAME"] == "lo"
    assert "does not exist" in found["default config"]
    for name in ("shardwise", "python", "platform", "torch build", "gloo", "NCCL", "cores", "memory"):
        assert found[name], name
    assert any(name.startswith("GPU") for name in found)
    assert "free of" in found["disk, working directory"]


def test_default_config_is_shown_setting_by_setting(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = home / ".config" / "shardwise" / "default_config.yaml"
    place.parent.mkdir(parents=True)
    place.write_text("distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  zero_stage: 3\n")
    found = facts(monkeypatch, capsys)
    assert found["default config"] == str(place)
    assert found["default config, num_processes"] == "2"
    assert found["default config, zero_stage"] == "3"


def test_config_with_faults_does_not_spill_what_it_holds(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = home / ".cache" / "huggingface" / "accelerate" / "default_config.yaml"
    place.parent.mkdir(parents=True)
    place.write_text("tpu_env:\n- TOKEN=a-secret\n")
    found = facts(monkeypatch, capsys)
    assert found["default config"] == str(place)
    assert "shardwise explain" in found["default config, faults"]
