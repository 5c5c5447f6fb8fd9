"""On a GPU the kernels write the bytes of the expressions, which write those of the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from shardwise.quantize import FORMATS, build_quantizer
from shardwise.quantize.expressions import Expressions
from tests.kernel_cases import CASES, encoded, rows_of, run_case


@pytest.mark.parametrize("case", CASES)
def test_kernels_and_expressions_agree(case: str) -> None:
    pytest.importorskip("triton", reason="needs triton: it is not installed")
    name, block = case.split("-")
    kernels = build_quantizer(name, int(block), "cuda")
    assert not isinstance(kernels, Expressions)
    run_case(case, kernels, "cuda")


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_and_a_cpu_agree(case: str) -> None:
    name, block = case.split("-")
    plain = Expressions(FORMATS[name], int(block))
    wires, found, sums = [], [], []
    for device in ("cpu", "cuda"):
        values = rows_of(int(block), device)
        wire = encoded(plain, values)
        values.fill_(math.nan)
        plain.decode(wire, values)
        total = torch.empty(values.shape[1], device=device)
        plain.sum_decoded(wire, total)
        wires.append(wire.cpu())
        found.append(values.cpu())
        sums.append(total.cpu())
    assert torch.equal(*wires)
    assert torch.equal(*found)
    assert torch.equal(*sums)
