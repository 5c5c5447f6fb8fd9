"""A disk that fails, or a file that somebody touches, is one clear error; the last checkpoint is as it was."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from shardwise.errors import ConfigError, StorageError
from tests.checkpoints import begin, differences, train_steps
from tests.slow_store import Disk, SlowStore
from tests.world.engine_runs import Config, config_of, rank
from tests.world.offload_runs import zero_block
from tests.worlds import World


def files_of(directory: str) -> list[Path]:
    return sorted(path for path in Path(directory).rglob("rank_*") if path.is_file())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")
        os.fsync(file.fileno())


def replace(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.write_bytes(b"")


def touched_files_are_named(directory: str, config: Config) -> None:
    for damage in (truncate, change, replace):
        for kind in ("optimizer", "parameters"):
            with begin(config) as engine:
                train_steps(engine, 0, 2)
                engine.save_checkpoint(f"{directory}/saved")
                wanted = engine.state_dict()
                engine._offloading.settle()
                (path,) = [path for path in files_of(f"{directory}/files") if path.name.endswith(kind)]
                damage(path)
                with pytest.raises(StorageError, match=path.name):
                    train_steps(engine, 2, 4)
            with begin(config) as engine:
                train_steps(engine, 0, 1)
                engine.load_checkpoint(f"{directory}/saved")
                assert not differences(engine.state_dict(), wanted)
                train_steps(engine, 2, 4)
            assert not files_of(f"{directory}/files"), "files were left behind"


def test_a_touched_file_is_named_and_training_goes_on_from_the_checkpoint(world1: World, tmp_path: Path) -> None:
    config = config_of(3, zero=zero_block("nvme", "nvme", tmp_path / "files"))
    world1.run(touched_files_are_named, str(tmp_path), config)


def a_disk_that_fails_ends_the_step(directory: str, config: Config) -> None:
    stores: list[SlowStore] = []

    def make(path: Path, io: object) -> SlowStore:
        stores.append(SlowStore(Disk()))
        return stores[-1]

    with begin(config) as engine:
        train_steps(engine, 0, 2)
        engine.save_checkpoint(directory)
        wanted = engine.state_dict()
    for after in (0, 1, 5, 11):
        with mock.patch("shardwise.zero.offloading.SwapFile", make), begin(config) as engine:
            train_steps(engine, 0, 1)
            stores[-1].fail_after = after
            with pytest.raises(StorageError, match="as it was told to"):
                train_steps(engine, 1, 6)
    with begin(config) as engine:
        engine.load_checkpoint(directory)
        assert not differences(engine.state_dict(), wanted)


def test_a_disk_that_fails_in_the_middle(world1: World, tmp_path: Path) -> None:
    config = config_of(3, zero=zero_block("nvme", "nvme", tmp_path / "files"))
    world1.run(a_disk_that_fails_ends_the_step, str(tmp_path / "saved"), config)


def is_refused_everywhere(config: Config, words: str, path_of_rank_1: str) -> None:
    """Only rank 1 has the fault; all ranks raise, and nothing is left to close."""
    if rank() == 1:
        for block in ("offload_param", "offload_optimizer"):
            config["zero_optimization"][block]["nvme_path"] = path_of_rank_1
    with pytest.raises(ConfigError, match=words), begin(config):
        pass


def test_a_path_that_one_rank_cannot_use(world2: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    config = config_of(3, zero=zero_block("nvme", "nvme", tmp_path / "good"))
    # Ranks compare their configurations first: another path is another configuration.
    world2.run(is_refused_everywhere, config, "ranks have different models or settings", str(tmp_path / "other"))
    config = config_of(3, zero=zero_block("nvme", "nvme", tmp_path / "file"))
    world2.run(is_refused_everywhere, config, "cannot hold offloaded state", str(tmp_path / "file"))
    assert not files_of(str(tmp_path))


def is_refused_for_want_of_room(config: Config) -> None:
    real = os.statvfs

    def nearly_full(path: str) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 3  # f_bavail
        return os.statvfs_result(found)

    with mock.patch("shardwise.zero.offloading.os.statvfs", nearly_full), pytest.raises(ConfigError) as caught:
        begin(config).__enter__()
    assert "bytes free, and the files of all ranks on it need" in str(caught.value)


def test_too_little_room_is_told_before_anything_is_written(world2: World, tmp_path: Path) -> None:
    world2.run(is_refused_for_want_of_room, config_of(3, zero=zero_block("nvme", "nvme", tmp_path)))
    assert not files_of(str(tmp_path))


@pytest.mark.parametrize(
    ("stage", "zero", "words"),
    [
        (2, {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}, "keeps parameters whole on every rank"),
        (0, {"offload_optimizer": {"device": "cpu"}}, "keeps optimizer state whole on every rank"),
        (3, {"offload_optimizer": {"device": "nvme"}}, "nvme_path: found nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(stage: int, zero: Config, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        begin(config_of(stage, zero=zero)).__enter__()
