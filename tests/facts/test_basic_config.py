"""write_basic_config writes what `launch` reads, and never over a file that is there."""

import pytest

from shardwise.config.run.file import read_run_file
from shardwise.errors import ConfigError
from shardwise.utils import write_basic_config


def test_a_file_that_launch_reads(tmp_path):
    path = tmp_path / "a" / "config.yaml"
    assert write_basic_config("BF16", path) == path
    run = read_run_file(path).block
    assert run.mixed_precision == "bf16" and run.num_machines == 1
    before = path.read_text()
    assert write_basic_config("fp16", path) is False
    assert path.read_text() == before


def test_the_default_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert write_basic_config() == tmp_path / "shardwise" / "default_config.yaml"


def test_a_precision_that_is_none_writes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="mixed_precision"):
        write_basic_config("fp4", tmp_path / "config.yaml")
    assert not any(tmp_path.iterdir())
