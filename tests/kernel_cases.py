"""Kernels against expressions: equal bytes, equal values. For a GPU's tests, and a program for Triton's interpreter.

``TRITON_INTERPRET=1 python -m tests.kernel_cases`` prints a line of JSON a case: its name, and what was wrong or null.
The interpreter (of Triton 3.9) cuts bf16 off where a GPU rounds, and knows no denormal bf16: there, and for bf16 alone,
values are compared within a unit of the last place.
"""

from __future__ import annotations

import json
import math
import traceback
from typing import TYPE_CHECKING

import torch

from shardwise.quantize import FORMATS
from shardwise.quantize.base import SMALLEST_SCALE, Quantizer
from shardwise.quantize.expressions import Expressions

if TYPE_CHECKING:
    from shardwise.quantize.kernels import Kernels

LARGEST = torch.finfo(torch.float32).max
BLOCKS = (32, 96, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [f"{name}-{block}" for name in FORMATS for block in BLOCKS]


def rows_of(block: int, device: str) -> torch.Tensor:
    """[2, n] fp32: blocks of many kinds, the codes' ties among them, and more than one tile of them."""
    generator = torch.Generator().manual_seed(block)
    num_blocks = max(17, 4096 // block + 1)  # more than a program's tile
    values = torch.randn(2, num_blocks, block, generator=generator)
    exponents = torch.randint(-149, 127, (block,), generator=generator).float()
    values[0, 0] = 0
    values[0, 1] = torch.copysign(torch.zeros(block), values[0, 1])
    values[0, 2] *= 2.0**-130
    values[0, 3] *= 2.0**-120
    values[0, 4] = values[0, 4].clamp(-1, 1) * LARGEST
    values[0, 5, 0] = -LARGEST
    values[0, 6] = values[0, 6].clamp(-1, 1) * 2.0**exponents
    values[0, 7] = torch.randint(-127, 127, (block,), generator=generator) + 0.5
    values[0, 7, 0] = 127
    values[0, 8] = torch.randint(-7, 7, (block,), generator=generator) + 0.5
    values[0, 8, -1] = -7
    values[0, 9] = torch.arange(block) / 1024 % 448  # ties of e4m3's small steps
    values[0, 9, 1] = 448
    values[0, 10] *= torch.logspace(-6, 0, block)
    return values.view(2, -1).to(device)


def run_case(case: str, kernels: Quantizer, device: str) -> None:
    """Raise where a kernel and an expression differ."""
    plain = Expressions(kernels.format, kernels.block)
    values = rows_of(kernels.block, device)
    for dtype in DTYPES:
        limit = torch.finfo(dtype).max
        narrow = values.clamp(-limit, limit).to(dtype)
        cut_off = device == "cpu" and dtype is torch.bfloat16
        if cut_off:
            narrow[narrow.abs() < torch.finfo(dtype).smallest_normal] = 0
        apart = torch.zeros(2, narrow.shape[1] + 40, dtype=dtype, device=device)[:, 8 : 8 + narrow.shape[1]]
        apart.copy_(narrow)
        expected = encoded(plain, narrow)
        assert torch.equal(encoded(kernels, apart), expected), f"{dtype}: other bytes"
        for accumulate in (False, True):
            one, other = torch.ones_like(apart), torch.ones_like(apart)
            plain.decode(expected, one, accumulate)
            kernels.decode(expected, other, accumulate)
            same = torch.allclose(other, one, rtol=2**-7, atol=2**-126) if cut_off else torch.equal(other, one)
            assert same, f"{dtype}, accumulate={accumulate}: other values"
    wires = encoded(plain, values)
    one, other = (torch.full(values.shape[1:], math.nan, device=device) for _ in range(2))
    plain.sum_decoded(wires, one)
    kernels.sum_decoded(wires, other)
    assert torch.equal(other, one), "another sum"
    spoilt_blocks_stay_spoilt(kernels, values)


def spoilt_blocks_stay_spoilt(kernels: Quantizer, values: torch.Tensor) -> None:
    block = kernels.block
    expected, found = torch.empty_like(values), torch.empty_like(values)
    kernels.decode(encoded(kernels, values), expected)
    wrong = values.clone()
    for at, value in ((11, math.nan), (13, math.inf), (15, -math.inf)):
        wrong[0, at * block + at] = value
        expected[0, at * block : (at + 1) * block] = 0
    kernels.decode(encoded(kernels, wrong), found)
    for at in (11, 13, 15):
        spoilt = found[0, at * block : (at + 1) * block]
        assert not spoilt.isfinite().any(), "what was not finite became finite"
        spoilt.zero_()
    assert torch.equal(found, expected), "a neighbour was changed"


def encoded(quantizer: Quantizer, values: torch.Tensor) -> torch.Tensor:
    num_bytes = quantizer.wire_bytes(values.shape[1])
    room = torch.zeros(values.shape[0], num_bytes + 16, dtype=torch.uint8, device=values.device)
    wire = room[:, 4 : 4 + num_bytes]
    quantizer.encode(values, wire)
    assert not room[:, :4].any() and not room[:, 4 + num_bytes :].any(), "written beside the wire"
    return wire


def build_kernels(name: str, block: int) -> Kernels:
    """For any device; needs Triton."""
    from shardwise.quantize.kernels import Kernels

    return Kernels(FORMATS[name], block)


def compiled(kernels: Kernels) -> dict[str, str]:
    """Each kernel's assembly (PTX), by name, for fp32 on a GPU of compute capability 8.0 that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from shardwise.quantize import triton_kernels

    of_encode = {
        "LARGEST_CODE": kernels.format.largest_code,
        "SMALLEST_SCALE": SMALLEST_SCALE,
        "LARGEST_VALUE": LARGEST,
        "SCALE_OF_LARGEST": kernels.format.scale_of_largest,
    }
    codes = {"codes": "*i8", "scales": "*fp32"}
    integers = dict.fromkeys(("wire_words", "values_stride", "num_blocks"), "i32")
    found = {}
    for name, tensors, constants in (
        ("encode_blocks", {"values": "*fp32", "codes": "*u8", "scales": "*fp32"}, of_encode),
        ("decode_blocks", {**codes, "values": "*fp32"}, {"ACCUMULATE": True}),
        ("sum_blocks", {**codes, "total": "*fp32"}, {"NUM_WIRES": 4}),
    ):
        kernel = getattr(triton_kernels, name)
        constants = {**constants, **{key: value for key, value in kernels.launch.items() if key.isupper()}}
        types = {**integers, **tensors, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(kernel, {key: types[key] for key in kernel.arg_names}, constexprs=constants)
        options = {key: value for key, value in kernels.launch.items() if not key.isupper()}
        found[name] = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
    return found


def main() -> None:
    """All cases, on the CPU."""
    for case in CASES:
        name, block = case.split("-")
        wrong = None
        try:
            run_case(case, build_kernels(name, int(block)), "cpu")
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps([case, wrong]), flush=True)


if __name__ == "__main__":
    main()
