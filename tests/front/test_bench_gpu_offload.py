"""The fear: a program for GPUs that breaks while nobody has one, or that trains on the CPU where one was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu_offload", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_same_way_without_a_gpu(tmp_path: Path) -> None:
    result, traces = tmp_path / "result.json", tmp_path / "traces"
    small = ("--batch", "1", "--seq", "16", "--warmup", "1", "--steps", "2", "--threads", "1")
    done = bench(
        *("--device", "cpu", "--sizes", "tiny", "--parameters", "cpu", *small),
        *("--json", str(result), "--trace", str(traces)),
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(result.read_text())["results"].values()
    assert len(found["step_seconds"]) == 2
    assert found["peak_device_bytes"] is None
    assert found["passes"]["down"] == {"num_bytes": 0, "seconds": 0, "hidden_share": None}
    assert 5 < found["last_loss"] < 8  # ln 512 is 6.2
    assert len(list(traces.iterdir())) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = bench("--json", str(tmp_path / "result.json"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "torch finds no GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []
