"""A checkpoint that somebody made up: whatever it says or is, a load or a conversion is one clear error in a moment."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.checkpoint.manifest import MANIFEST, complete_tags
from shardwise.errors import CheckpointError
from shardwise.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
from tests.checkpoints import begin, differences, train_steps
from tests.front.command import shardwise_here
from tests.world.engine_runs import config_of

SEED, TRIES = 11, 120
HUGE: list[Any] = [2**70, -1, float("inf"), float("nan"), "x" * 5000, [[]] * 5, 10**18]
ODD: list[Any] = [None, "", 0, 1.5, True, [], {}, {"a": 1}, "../../etc/passwd", "\0"]
MARKS: list[Any] = [
    {"$tensor": "0/tree/999"}, {"$tensor": {}}, {"$pickle": "0/tree/0"}, {"$tuple": 3}, {"$dict": [[[], 1]]},
    {"$set": [[1]]}, {"$bytes": "@@"}, {"$scalar": [float("inf"), "I8"]}, {"$scalar": []}, {"$array": "0/tree/0"},
    {"$dtype": "nn"}, {"$counter": [1]}, {"$a": 1},
]  # fmt: skip
Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """A checkpoint in the middle of a step, and an engine to load it."""
    directory = tmp_path_factory.mktemp("made")
    with begin(config_of(3, accumulation=2, fp16={"enabled": True})) as engine:
        train_steps(engine, 0, 3)
        engine.save_checkpoint(directory, "whole", {"tensor": torch.ones(300), "nest": [1, (2, 3)]})
        yield directory, engine


@pytest.fixture
def directory(made: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def manifest_of(directory: Path) -> Manifest:
    manifest: Manifest = json.loads((directory / "whole" / MANIFEST).read_bytes())["manifest"]
    return manifest


def forge(directory: Path, manifest: Manifest) -> None:
    """With a right checksum: whoever writes the one can write the other."""
    body = json.dumps(manifest).encode()
    text = b'{"checksum": "%s",\n"manifest": %s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)
    (directory / "whole" / MANIFEST).write_bytes(text)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(each, (*at, key))


def forgeries(manifest: Manifest, tries: int) -> Iterator[tuple[str, Manifest]]:
    """One member replaced or gone, of the whole or deep inside."""
    draw, where = random.Random(SEED), list(places(manifest))
    for _ in range(tries):
        forged = copy.deepcopy(manifest)
        place = draw.choice(where)
        place = place[: draw.randint(1, len(place))]
        inside = forged
        for key in place[:-1]:
            inside = inside[key]
        value = draw.choice(draw.choice([HUGE, ODD, MARKS]))
        if isinstance(inside, dict) and draw.random() < 0.15:
            del inside[place[-1]]
            value = "gone"
        else:
            inside[place[-1]] = value
        yield f"{'.'.join(map(str, place))} = {value!r:.60}", forged


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    counts = [engine.global_steps, engine.micro_steps, engine.loss_scale, *engine.get_lr()]
    return {**engine.state_dict(), "counts": torch.tensor(counts, dtype=torch.float64)}


def test_any_member_of_a_manifest(made: tuple[Path, Any], directory: Path) -> None:
    """It is refused before anything has changed, or it says the same in other words."""
    _, engine = made
    good, refused = manifest_of(directory), 0
    before = state_of(engine)
    for place, forged in forgeries(good, TRIES):
        forge(directory, forged)
        try:
            engine.load_checkpoint(directory)
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 1500, place
            assert not differences(state_of(engine), before), place
        else:
            forge(directory, good)
            engine.load_checkpoint(directory)
            assert not differences(state_of(engine), before), place
    assert refused > TRIES / 2


def test_any_member_of_a_manifest_for_who_wants_weights(directory: Path) -> None:
    for number, (place, forged) in enumerate(forgeries(manifest_of(directory), TRIES)):
        forge(directory, forged)
        output = directory.parent / ("out.bin", "out.safetensors", "out")[number % 3]
        try:
            convert_zero_checkpoint_to_fp32_state_dict(directory, output)
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 500, place


# -- what is no file


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_directory(path: Path) -> None:
    path.mkdir()


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_nothing(path: Path) -> None:
    path.symlink_to("/nowhere")


def as_secret(path: Path) -> None:
    path.symlink_to("/etc/passwd")


KINDS = [as_pipe, as_directory, as_device, as_loop, as_nothing, as_secret]
REPLACED = {
    "latest": lambda directory: directory / "latest",
    "manifest": lambda directory: directory / "whole" / MANIFEST,
    "data": lambda directory: next((directory / "whole").glob("rank_*")),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_no_file(
    made: tuple[Path, Any], directory: Path, what: str, kind: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = REPLACED[what](directory)
    path.unlink()
    kind(path)
    try:
        assert made[1].load_checkpoint(directory) == (None, None)
        assert what == "latest" and kind is as_nothing
    except CheckpointError as error:
        assert "root:" not in str(error)
    with pytest.raises(CheckpointError) as caught:
        convert_zero_checkpoint_to_fp32_state_dict(directory, directory / "out.bin")
    assert "root:" not in str(caught.value) + capsys.readouterr().out
    assert complete_tags(directory) == ([] if what == "manifest" and kind is not as_secret else ["whole"])


LINKS = ["latest.new", "zero_to_fp32.py.new", "zero_to_fp32.py", ".claimed", "whole/manifest.json.new"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_a_save_would_follow(made: tuple[Path, Any], directory: Path, name: str) -> None:
    """Nothing outside is written to."""
    outside = directory.parent / "outside"
    outside.write_text("mine")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(outside)
    try:
        made[1].save_checkpoint(directory, "whole")
    except CheckpointError:
        assert name == ".claimed"
    assert outside.read_text() == "mine"
    made[1].load_checkpoint(directory, "whole")


@pytest.mark.parametrize("output", ["out.bin", "out.safetensors"])
def test_a_link_that_a_conversion_would_follow(directory: Path, output: str) -> None:
    outside = directory.parent / "outside"
    outside.write_text("mine")
    (directory / f"{output}.new").symlink_to(outside)
    convert_zero_checkpoint_to_fp32_state_dict(directory, directory / output)
    assert outside.read_text() == "mine"


# -- the commands


def flipped(directory: Path) -> None:
    path = REPLACED["data"](directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def bomb(directory: Path) -> None:
    body = b"[" * 200_000
    text = b'{"checksum": "%s",\n"manifest": %s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)
    (directory / "whole" / MANIFEST).write_bytes(text)


def shapeless(directory: Path) -> None:
    manifest = manifest_of(directory)
    record = next(iter(manifest["models"][0]["parameters"].values()))
    record["shape"], record["pieces"] = [10**15], [[0, 0, 10**15]]
    forge(directory, manifest)


@pytest.mark.parametrize("damage", [flipped, bomb, shapeless], ids=lambda damage: damage.__name__)
def test_commands_say_it_in_a_line(directory: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(directory)
    script = subprocess.run(
        [sys.executable, "zero_to_fp32.py", ".", "out.bin"], cwd=directory, capture_output=True, text=True
    )
    command = shardwise_here("consolidate", str(directory), str(tmp_path / "out.safetensors"), cwd=tmp_path)
    for done in (script, command):
        assert done.returncode in (1, 2)
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (directory / "out.bin").exists() and not (tmp_path / "out.safetensors").exists()
    assert not list(directory.glob("out*")) and not list(tmp_path.glob("out*"))
