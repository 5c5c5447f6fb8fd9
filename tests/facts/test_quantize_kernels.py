"""Triton's kernels write the bytes of the expressions and read the same values: here in its interpreter, on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from shardwise.quantize import FORMATS, build_quantizer
from shardwise.quantize.expressions import Expressions
from tests.kernel_cases import CASES, build_kernels, compiled

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """What was wrong, by case. In a process of its own: the interpreter is chosen where kernels are defined."""
    if find_spec("triton") is None:
        pytest.skip("needs triton: it is not installed")
    command = [sys.executable, "-m", "tests.kernel_cases"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", CASES)
def test_kernels_and_expressions_agree(outcomes: dict[str, str | None], case: str) -> None:
    assert outcomes[case] is None, outcomes[case]


def instructions_of(assembly: str) -> set[str]:
    """Their names, such as mul.rn.f32."""
    return set(re.findall(r"\b[a-z]+(?:\.[a-z0-9]+)+", assembly))


@pytest.mark.parametrize("name", FORMATS)
def test_kernels_compile_for_a_gpu_and_round_each_product(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as that shows without a GPU: no fused product and sum, no inexact division, denormals flushed in none but
    divisions, where it changes nothing."""
    pytest.importorskip("triton", reason="needs triton: it is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assembly = compiled(build_kernels(name, 256))
    assert all(".visible .entry" in text for text in assembly.values())
    for text in assembly.values():
        found = instructions_of(text)
        assert {"mul.f32", "mul.rn.f32"} & found
        assert not [name for name in found if name.startswith("fma") or ".full" in name or ".approx" in name]
        assert not [name for name in found if ".ftz" in name and not name.startswith("div.rn")]
    assert {"div.rn.f32", "div.rn.ftz.f32"} & instructions_of(assembly["encode_blocks"])


def test_a_cpu_has_no_use_for_triton() -> None:
    """Expressions are chosen, and Triton is not even imported."""
    assert isinstance(build_quantizer("int8", 256, "cpu"), Expressions)
    check = (
        "import sys, shardwise.quantize as q; q.build_quantizer('int8', 256, 'cpu'); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
