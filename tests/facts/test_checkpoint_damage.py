"""What is damaged, foreign or hostile is one clear CheckpointError that names the file; nothing of it is believed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from shardwise.checkpoint.load import Checkpoint
from shardwise.checkpoint.manifest import MANIFEST
from shardwise.checkpoint.save import Content, Place, save
from shardwise.checkpoint.shard_file import Entry, ShardFile, write_shard_file
from shardwise.errors import CheckpointError
from tests.one_rank import Alone, read, write


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(tmp_path, "whole", 7)
    return tmp_path


def data_file(directory: Path) -> Path:
    return next((directory / "whole").glob("rank_*.safetensors"))


def test_a_flipped_bit_anywhere_is_found_and_named(directory: Path) -> None:
    draw = random.Random(3)
    for path in [data_file(directory), directory / "whole" / MANIFEST]:
        content = path.read_bytes()
        for _ in range(200):
            at, bit = draw.randrange(len(content)), draw.randrange(8)
            broken = bytearray(content)
            broken[at] ^= 1 << bit
            path.write_bytes(broken)
            with pytest.raises(CheckpointError) as caught:
                read(directory)
            assert str(path) in str(caught.value), f"bit {bit} of byte {at}"
        path.write_bytes(content)
    assert read(directory) == 7


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_a_file_that_was_cut_or_grew(directory: Path, length: int) -> None:
    for path in [data_file(directory), directory / "whole" / MANIFEST]:
        content = path.read_bytes()
        for changed in (content[:length], content + b"\0"):
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
                read(directory)
        path.write_bytes(content)


def test_a_file_that_is_gone(directory: Path) -> None:
    data_file(directory).unlink()
    with pytest.raises(CheckpointError, match=r"rank_00000.*No such file"):
        read(directory)


# -- hostile manifests: with a right checksum, for whoever can write files can also write that


def forge(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the manifest as `change` leaves it; a text is taken as it is."""
    path = directory / "whole" / MANIFEST
    manifest = json.loads(path.read_bytes())["manifest"]
    changed = change(manifest)
    body = (changed if isinstance(changed, str) else json.dumps(manifest)).encode()
    path.write_bytes(b'{"checksum": "%s",\n"manifest": %s}\n' % (hashlib.sha256(body).hexdigest().encode(), body))


def outside(manifest: dict[str, Any]) -> None:
    manifest["files"][0]["name"] = "../../secret"


def absolute(manifest: dict[str, Any]) -> None:
    manifest["files"][0]["name"] = "/etc/passwd"


def newer(manifest: dict[str, Any]) -> None:
    manifest["version"] = 99


def without_files(manifest: dict[str, Any]) -> None:
    del manifest["files"]


def another_tensor(manifest: dict[str, Any]) -> None:
    manifest["shared"]["tensor"] = {"$tensor": "7/tree/0"}


def no_tensor(manifest: dict[str, Any]) -> None:
    manifest["shared"]["tensor"] = {"$tensor": ["0/tree/0"]}


def unknown_mark(manifest: dict[str, Any]) -> None:
    manifest["shared"]["tensor"] = {"$code": "import os"}


def wrong_shape(manifest: dict[str, Any]) -> None:
    manifest["shared"]["number"] = {"$scalar": [[1, 2], "F99"]}


def a_list(manifest: dict[str, Any]) -> str:
    return "[]"


def deep(manifest: dict[str, Any]) -> str:
    return "[" * 200_000


def deep_value(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest)
    return text.replace('"text": "save 7"', '"text": ' + "[" * 600 + "]" * 600)


def not_a_number(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest).replace('"world": 1', '"world": ' + "9" * 5000)


FORGERIES = [outside, absolute, newer, without_files, another_tensor, no_tensor, unknown_mark, wrong_shape, a_list,
             deep, deep_value, not_a_number]  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.__name__)
def test_a_forged_manifest(directory: Path, forgery: Callable[[dict[str, Any]], Any]) -> None:
    (directory.parent / "secret").write_bytes(b"secret")
    forge(directory, forgery)
    with pytest.raises(CheckpointError):
        read(directory)


@pytest.mark.parametrize(
    "tag", ["../whole", "/etc", ".", "..", "", "a/b", "a\\b", "x" * 300, ".hidden", "a\0b", "latest"]
)
def test_tags_that_lead_elsewhere(directory: Path, tag: str) -> None:
    with pytest.raises(CheckpointError, match="tag"):
        read(directory, tag)
    with pytest.raises(CheckpointError, match="tag"):
        write(directory, tag, 8)
    (directory / "latest").write_text(tag)
    with pytest.raises(CheckpointError):
        read(directory)


def test_headers_that_lie(tmp_path: Path) -> None:
    """The bytes have their checksums, the header makes no sense."""
    for header in (b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [9999999999], "data_offsets": [0, 4]}}',
                   b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
                   b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'):  # fmt: skip
        record = write_shard_file(tmp_path / "plain.safetensors", [])
        text = len(header).to_bytes(8, "little") + header + b"\0" * 4
        (tmp_path / "plain.safetensors").write_bytes(text)
        import zlib

        forged = type(record)(record.name, len(text), (zlib.crc32(text),))
        with pytest.raises(CheckpointError, match=r"plain\.safetensors"):
            ShardFile(tmp_path, forged).read("a")
        (tmp_path / "plain.safetensors").unlink()
    huge = (10**18).to_bytes(8, "little")
    (tmp_path / "huge").write_bytes(huge)
    with pytest.raises(CheckpointError, match="claims"):
        ShardFile(tmp_path, type(record)("huge", 8, (zlib.crc32(huge),)))


class Payload:
    """What it does when it is unpickled shows."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["SHARDWISE_TEST_PAYLOAD"],)


def test_a_pickle_runs_only_for_who_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    monkeypatch.setenv("SHARDWISE_TEST_PAYLOAD", str(made))
    content = Content([], {"evil": Payload()}, None, allow_pickle=["client_state.evil"])
    save(Place(tmp_path, "pickled"), content, Alone())
    with Checkpoint(tmp_path / "pickled") as checkpoint:
        with pytest.raises(CheckpointError, match=r"client_state\.evil.*pickle.*allow_pickle"):
            checkpoint.shared()
        assert not made.exists()
        checkpoint.shared(["client_state.evil"])
        assert made.exists()


def test_no_file_of_a_checkpoint_is_a_pickle(directory: Path) -> None:
    for path in [p for p in directory.rglob("*") if p.is_file()]:
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError, IndexError, AttributeError)):
            pickle.loads(path.read_bytes())


def test_the_data_are_plain_safetensors(tmp_path: Path) -> None:
    wanted = {
        "half": torch.randn(7, 3).bfloat16(), "bytes": torch.arange(5, dtype=torch.uint8), "none": torch.empty(0, 4),
        "number": torch.tensor(2.5, dtype=torch.float64), "truth": torch.tensor([True, False]),
    }  # fmt: skip
    record = write_shard_file(tmp_path / "file", [Entry.of(name, tensor) for name, tensor in wanted.items()])
    ours = ShardFile(tmp_path, record)
    with safe_open(tmp_path / "file", "pt") as theirs:
        assert sorted(theirs.keys()) == sorted(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(theirs.get_tensor(name), tensor)
            assert torch.equal(ours.read(name), tensor)
            assert theirs.get_tensor(name).dtype == tensor.dtype
