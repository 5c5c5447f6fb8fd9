"""The fear: a measurement that leaves gigabytes behind, fills the disk, or advises settings that the JSON refuses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardwise.commands.main import main
from shardwise.config import load_config
from shardwise.store.io_settings import IOSettings
from shardwise.store.survey import SMALLEST_BYTES, Cell, choose
from tests.front.command import SHARDWISE, plain_environment, shardwise


@pytest.mark.slow
def test_measures_and_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    done = shardwise("bench-storage", str(place), "--size", str(SMALLEST_BYTES), "--json", temporary=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress where nobody watches
    found = json.loads(done.stdout)
    assert list(place.iterdir()) == []
    assert found["num_bytes"] == SMALLEST_BYTES and found["path"] == str(place)
    for speed in ("both_ways", "stream", "page_cache_read", "page_cache_write"):
        assert found[speed] > 0, speed
    assert all(cell["read"] > 0 and cell["write"] > 0 for cell in found["cells"])
    assert found["best"] in found["cells"]
    assert 0 < found["work_busy"] <= 1
    config = load_config({"train_batch_size": 1, "aio": found["aio"]})
    settings = IOSettings.of(config.aio)
    assert (settings.block_bytes, settings.num_in_flight) == (found["best"]["block_size"], found["best"]["queue_depth"])


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    process = subprocess.Popen(
        [*SHARDWISE, "bench-storage", str(place), "--size", "1GB"],
        env=plain_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a shell they ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(place.glob("*/*/rank_0.survey")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)  # into the measurements
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and output == ""
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "is not a directory"),
        (["file"], "is not a directory"),
        ([".", "--size", "plenty"], "no size"),
        ([".", "--size", "10000000GB"], "has room for"),
        ([".", "--size", "1MB"], "too small"),
    ],
)
def test_mistake_is_a_short_message(
    tmp_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["shardwise", "bench-storage", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_help_has_an_example_and_does_not_wait_for_torch() -> None:
    code = "import sys, shardwise.commands.bench_storage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = subprocess.run([*SHARDWISE, "bench-storage", "--help"], capture_output=True, text=True, check=True)
    assert "Example: shardwise bench-storage" in done.stdout


def test_choice_is_the_soonest_and_of_equals_the_gentlest() -> None:
    slow = Cell(1 << 20, 1, read=1e9, write=1e9)
    lopsided = Cell(1 << 20, 2, read=9e9, write=0.5e9)
    fast = Cell(1 << 18, 16, read=2e9, write=2e9)
    as_good = Cell(1 << 18, 4, read=1.95e9, write=1.99e9)
    larger = Cell(1 << 20, 4, read=1.95e9, write=1.99e9)
    assert choose((slow, lopsided, fast, as_good, larger)) == larger
    assert choose((slow, lopsided)) == slow
