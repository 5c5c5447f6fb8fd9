"""Device and ranks are chosen from the machine and from torchrun's environment; a half of it is the user's error."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from shardwise.errors import ConfigError
from shardwise.mesh import DEFAULT_TIMEOUT, build_mesh, choose_device, init_distributed

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """A machine that shows `request.param` GPUs: only the counting is replaced, nothing is put on one."""
    number = int(request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    return number


@pytest.fixture
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment that torchrun gives to a single process, and no process group afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in zip(TORCHRUN, ("0", "1", "0", "127.0.0.1", str(port)), strict=True):
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# -- device


@pytest.mark.parametrize("gpus", [0], indirect=True)
def test_without_a_gpu_the_cpu_is_taken(gpus: int) -> None:
    assert choose_device() == choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("gpus", [4], indirect=True)
def test_each_local_rank_has_a_gpu_of_its_own(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device() == choose_device("cuda") == torch.device("cuda", 3)
    assert choose_device("cuda:1") == choose_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("gpus", [0], indirect=True)
def test_cuda_where_there_is_none(gpus: int) -> None:
    with pytest.raises(ConfigError, match=r"cuda:0 is asked for, but this machine shows 0 .* ask for the CPU"):
        choose_device("cuda")


@pytest.mark.parametrize("gpus", [2], indirect=True)
def test_more_ranks_than_gpus(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"cuda:2 is asked for, but this machine shows 2 .* one process a GPU"):
        choose_device()


def test_a_device_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="'meta' is not supported: expected 'cpu' or 'cuda'"):
        choose_device("meta")


# -- process group


def test_without_torchrun_there_is_a_single_process() -> None:
    init_distributed()
    assert not dist.is_initialized()
    mesh = build_mesh("cpu")
    assert mesh.device == torch.device("cpu")
    axis = mesh.dp_shard
    assert (axis.name, axis.rank, axis.size, axis.group, axis.control_group) == ("dp_shard", 0, 1, None, None)
    assert axis.timeout == DEFAULT_TIMEOUT


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_an_error(missing: str, world_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(missing)
    with pytest.raises(ConfigError, match=f"lacks {missing}.*shardwise launch"):
        init_distributed()
    assert not dist.is_initialized()


@pytest.mark.parametrize("gpus", [0], indirect=True)
def test_a_world_of_one_has_an_axis_without_groups(gpus: int, world_of_one: None) -> None:
    init_distributed(timeout=timedelta(seconds=30))
    assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
    group = dist.group.WORLD
    init_distributed()
    assert dist.group.WORLD is group
    axis = build_mesh(timeout=timedelta(seconds=30)).dp_shard
    assert (axis.rank, axis.size, axis.group, axis.timeout) == (0, 1, None, timedelta(seconds=30))
