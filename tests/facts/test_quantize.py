"""Quantised values: as near as is stated, for any finite input, and the same bits however the work is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.layout import MAX_BLOCK
from shardwise.quantize import FORMATS, Quantizer, build_quantizer
from shardwise.quantize.base import SCALE_BYTES
from shardwise.quantize.expressions import Expressions

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
"""No clock decides: the machine may be busy with other things."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = list(FORMATS)
BLOCKS = st.sampled_from([32, 64, 96, 256, 1024, 4096])
LARGEST = torch.finfo(torch.float32).max

Generate = Callable[[torch.Generator, int], torch.Tensor]


def uniform(generator: torch.Generator, block: int) -> torch.Tensor:
    return torch.rand(block, generator=generator, dtype=torch.float64) * 2 - 1


def ties(generator: torch.Generator, block: int, largest_code: int) -> torch.Tensor:
    """Values in the middle between two codes, and their neighbours in fp32: half a step is met, not more."""
    scale = torch.rand(1, generator=generator) + 0.5
    halves = torch.randint(-largest_code, largest_code, (block,), generator=generator) + 0.5
    steps = torch.randint(-2, 3, (block,), generator=generator)
    values = (scale * halves).view(torch.int32).add_(steps).view(torch.float32)
    values[0] = scale * largest_code
    return values.double()


def one_outlier(generator: torch.Generator, block: int) -> torch.Tensor:
    values = uniform(generator, block) * 1e-3
    values[int(torch.randint(block, (), generator=generator))] = 1e4
    return values


def wide(generator: torch.Generator, block: int) -> torch.Tensor:
    return uniform(generator, block) * 2.0 ** torch.randint(-149, 128, (block,), generator=generator).double()


def reaching_the_end(generator: torch.Generator, block: int) -> torch.Tensor:
    values = uniform(generator, block) * LARGEST
    values[int(torch.randint(block, (), generator=generator))] = -LARGEST
    return values


KINDS: dict[str, Generate] = {
    "zeros": lambda generator, block: torch.zeros(block).double(),
    "signed zeros": lambda generator, block: torch.copysign(torch.zeros(block).double(), uniform(generator, block)),
    "uniform": uniform,
    "constant": lambda generator, block: uniform(generator, 1).expand(block).clone(),
    "denormal": lambda generator, block: uniform(generator, block) * 2.0**-128,
    "denormal in fp16": lambda generator, block: uniform(generator, block) * 2.0**-18,
    "nearly denormal": lambda generator, block: uniform(generator, block) * 2.0**-120,
    "huge": lambda generator, block: uniform(generator, block) * LARGEST,
    "to the end": reaching_the_end,
    "outlier": one_outlier,
    "of all exponents": wide,
    "ties of int8": lambda generator, block: ties(generator, block, 127),
    "ties of int4": lambda generator, block: ties(generator, block, 7),
}


def narrowed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to the dtype; what it has no room for becomes its largest."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


@st.composite
def rows_of_blocks(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    """A block's length and values [rows, n]: blocks of different kinds side by side."""
    block, dtype = draw(BLOCKS), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    num_rows, num_blocks = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=num_blocks * num_rows, max_size=num_blocks * num_rows))
    values = torch.cat([narrowed(KINDS[kind](generator, block), dtype) for kind in kinds])
    return block, values.view(num_rows, -1)


def encoded(quantizer: Quantizer, values: torch.Tensor) -> torch.Tensor:
    wire = torch.full((values.shape[0], quantizer.wire_bytes(values.shape[1])), 0xA5, dtype=torch.uint8)
    quantizer.encode(values, wire)
    return wire


def decoded(quantizer: Quantizer, wire: torch.Tensor, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.full((wire.shape[0], numel), torch.nan, dtype=dtype)
    quantizer.decode(wire, values)
    return values


def assert_within_bound(quantizer: Quantizer, values: torch.Tensor, found: torch.Tensor) -> None:
    errors = (found.double() - values.double()).abs().view(-1, quantizer.block)
    for block, error in zip(values.reshape(-1, quantizer.block), errors, strict=True):
        largest = float(block.double().abs().max())
        bound = quantizer.error_bound(largest, found.dtype)
        assert float(error.max()) <= bound, f"{quantizer.format.name}: {float(error.max())} > {bound} of {largest}"


# -- how near


@untimed
@given(rows_of_blocks(), st.sampled_from(NAMES), st.sampled_from(DTYPES))
def test_any_finite_value_comes_back_within_the_bound(
    drawn: tuple[int, torch.Tensor], name: str, dtype: torch.dtype
) -> None:
    block, values = drawn
    quantizer = build_quantizer(name, block)
    if float(values.double().abs().max()) > torch.finfo(dtype).max:
        dtype = torch.float32
    found = decoded(quantizer, encoded(quantizer, values), values.shape[1], dtype)
    assert found.isfinite().all()
    assert_within_bound(quantizer, values, found)
    assert (found[values == 0] == 0).all(), "a zero is not zero any more"


@untimed
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
@pytest.mark.parametrize("name", NAMES)
def test_any_32_floats_come_back_within_the_bound(name: str, floats: list[float]) -> None:
    quantizer = build_quantizer(name, 32)
    values = torch.tensor([floats], dtype=torch.float32)
    assert_within_bound(quantizer, values, decoded(quantizer, encoded(quantizer, values), 32))


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_met_not_only_kept(name: str) -> None:
    """A bound that is far too wide would hold whatever the code does."""
    quantizer = build_quantizer(name, 256)
    values = uniform(torch.Generator().manual_seed(0), 1 << 16).float()[None]
    values.view(-1, 256)[:, 0] = 1.0
    error = (decoded(quantizer, encoded(quantizer, values), values.shape[1]) - values).abs().max()
    assert 0.99 * quantizer.error_bound(1.0) < float(error) <= quantizer.error_bound(1.0)


def test_the_bound_of_an_output_that_may_overflow_is_infinite() -> None:
    quantizer = build_quantizer("int8", 32)
    assert math.isinf(quantizer.error_bound(1e5, torch.float16))
    assert math.isfinite(quantizer.error_bound(65504.0, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_both_ends_of_a_block_come_back(name: str, dtype: torch.dtype) -> None:
    """Exactly in 16 bits; in fp32 but for the last bit, which is the rounding of the scale."""
    quantizer = build_quantizer(name, 32)
    values = torch.zeros(1 << 12, 32, dtype=dtype)
    ends = (torch.rand(1 << 12, generator=torch.Generator().manual_seed(1)) * 100 + 1).to(dtype)
    values[:, 3], values[:, 21] = ends, -ends
    values = values.view(1, -1)
    found = decoded(quantizer, encoded(quantizer, values), values.shape[1], dtype)
    if dtype is torch.float32:
        assert ((found - values).abs() <= values.abs() * 2**-23).all()
        assert (found == values).float().mean() > 0.9
    else:
        assert torch.equal(found, values)


# -- what is on the wire


@pytest.mark.parametrize(("name", "expected"), [("int8", 256 + 4), ("fp8", 256 + 4), ("int4", 128 + 4)])
def test_bytes_of_a_wire(name: str, expected: int) -> None:
    quantizer = build_quantizer(name, 256)
    assert quantizer.wire_bytes(7 * 256) == 7 * expected
    assert quantizer.code_bytes(7 * 256) == 7 * (expected - SCALE_BYTES)


def test_codes_come_first_then_scales_then_nothing() -> None:
    quantizer = build_quantizer("int8", 32)
    values = torch.zeros(1, 64)
    values[0, :3] = torch.tensor([127.0, -127.0, 5.0])
    values[0, 32:35] = torch.tensor([2.0, -254.0, 20.0])
    wire = encoded(quantizer, values)[0]
    assert wire[:64].view(torch.int8).tolist() == [127, -127, 5] + [0] * 29 + [1, -127, 10] + [0] * 29
    assert wire[64:].view(torch.float32).tolist() == [1.0, 2.0]


def test_two_codes_of_a_block_share_a_byte() -> None:
    quantizer = build_quantizer("int4", 32)
    codes = torch.tensor([*range(-7, 8), *range(7, -8, -1), 0, -1], dtype=torch.float32)
    wire = encoded(quantizer, codes[None])[0]
    for at in range(16):
        low, high = int(codes[at]), int(codes[16 + at])
        assert int(wire[at]) == (low & 15) | (high & 15) << 4
    assert torch.equal(decoded(quantizer, wire[None], 32)[0], codes)


def test_fp8_is_the_ocp_format() -> None:
    """Every finite code, written by torch, decodes to what torch says it is."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes.view(torch.float8_e4m3fn).float().isfinite()]
    codes = torch.cat([codes, codes[:2]])  # 256 of them
    wire = torch.cat([codes, torch.tensor([1.5]).view(torch.uint8)])[None]
    found = decoded(build_quantizer("fp8", 256), wire, 256)
    assert torch.equal(found[0], codes.view(torch.float8_e4m3fn).float() * 1.5)
    assert torch.equal(found[0].signbit(), codes.view(torch.float8_e4m3fn).float().signbit())


# -- NaN and infinity


@untimed
@given(
    st.sampled_from(NAMES), st.sampled_from(DTYPES), st.sampled_from(DTYPES), BLOCKS,
    st.sampled_from([math.nan, math.inf, -math.inf]), st.data(),
)  # fmt: skip
def test_what_is_not_finite_spoils_its_block_alone(
    name: str, dtype: torch.dtype, to: torch.dtype, block: int, wrong: float, data: st.DataObject
) -> None:
    quantizer = build_quantizer(name, block)
    values = uniform(torch.Generator().manual_seed(block), 3 * block).to(dtype)[None]
    expected = decoded(quantizer, encoded(quantizer, values), 3 * block, to)
    values[0, block + data.draw(st.integers(0, block - 1))] = wrong
    found = decoded(quantizer, encoded(quantizer, values), 3 * block, to)
    assert not found[0, block : 2 * block].isfinite().any()
    assert torch.equal(found[0, :block], expected[0, :block])
    assert torch.equal(found[0, 2 * block :], expected[0, 2 * block :])


# -- the same bits however the work is cut


@untimed
@given(rows_of_blocks(), st.sampled_from(NAMES), st.sampled_from([1, 100, 5000, 1 << 20]))
def test_rows_and_chunks_change_no_bit(drawn: tuple[int, torch.Tensor], name: str, chunk: int) -> None:
    block, values = drawn
    numel = values.shape[1]
    quantizer, cut = build_quantizer(name, block), Expressions(FORMATS[name], block, chunk)
    wire = encoded(quantizer, values)
    assert torch.equal(encoded(cut, values), wire)
    for row in range(values.shape[0]):
        assert torch.equal(encoded(cut, values[row : row + 1])[0], wire[row])
    for dtype in DTYPES:
        assert torch.equal(decoded(cut, wire, numel, dtype), decoded(quantizer, wire, numel, dtype))
    start = torch.ones(values.shape, dtype=values.dtype)
    one, other = start.clone(), start.clone()
    quantizer.decode(wire, one, accumulate=True)
    cut.decode(wire, other, accumulate=True)
    assert torch.equal(one, other)
    found, alone = (decoded(quantizer, wire, numel, dtype) for dtype in (torch.float32, values.dtype))
    assert torch.equal(one, (found + start).to(values.dtype)), "a sum is rounded once"
    assert torch.equal(alone, found.to(values.dtype)), "a decoded value is rounded once"


@pytest.mark.parametrize("name", NAMES)
def test_threads_change_no_bit(name: str) -> None:
    """Neither torch's own threads nor several calls at a time."""
    quantizer = build_quantizer(name, 128)
    values = torch.randn(6, 128 * 700, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wire = encoded(quantizer, values)
        found = decoded(quantizer, wire, values.shape[1])
        torch.set_num_threads(2)
        assert torch.equal(encoded(quantizer, values), wire)
        assert torch.equal(decoded(quantizer, wire, values.shape[1]), found)
    finally:
        torch.set_num_threads(before)
    together, back = torch.zeros_like(wire), torch.zeros_like(values)

    def there_and_back(row: int) -> None:
        for _ in range(3):
            quantizer.encode(values[row : row + 1], together[row : row + 1])
            quantizer.decode(together[row : row + 1], back[row : row + 1])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(there_and_back, range(6)))
    assert torch.equal(together, wire)
    assert torch.equal(back, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_may_lie_apart(name: str, dtype: torch.dtype) -> None:
    quantizer = build_quantizer(name, 64)
    numel = 64 * 5
    num_bytes = quantizer.wire_bytes(numel)
    values = torch.randn(4, numel, generator=torch.Generator().manual_seed(4)).to(dtype)
    apart = torch.full((4, numel + 13), 9.0, dtype=dtype)
    apart[:, 5 : 5 + numel] = values
    room = torch.full((4, num_bytes + 3 * SCALE_BYTES), 7, dtype=torch.uint8)
    wire = room[:, SCALE_BYTES : SCALE_BYTES + num_bytes]
    quantizer.encode(apart[:, 5 : 5 + numel], wire)
    assert torch.equal(wire, encoded(quantizer, values))
    assert (room[:, :SCALE_BYTES] == 7).all() and (room[:, SCALE_BYTES + num_bytes :] == 7).all()
    for row in (slice(None), slice(None, None, 2), slice(1, 2)):  # every second row, one row
        expected = decoded(quantizer, wire[row].contiguous(), numel, dtype)
        apart.fill_(9.0)
        quantizer.decode(wire[row], apart[row, 5 : 5 + numel])
        assert torch.equal(apart[row, 5 : 5 + numel], expected)
        assert (apart[:, :5] == 9).all() and (apart[:, 5 + numel :] == 9).all()
        quantizer.decode(wire[row], apart[row, 5 : 5 + numel], accumulate=True)
        assert torch.equal(apart[row, 5 : 5 + numel], expected + expected)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_encoded_as_nothing(name: str, shape: tuple[int, int]) -> None:
    quantizer = build_quantizer(name, 32)
    wire = encoded(quantizer, torch.zeros(shape))
    assert wire.shape == (shape[0], quantizer.wire_bytes(shape[1]))
    assert decoded(quantizer, wire, shape[1]).shape == shape
    if shape[0]:
        quantizer.sum_decoded(wire, torch.zeros(shape[1]))


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("name", NAMES)
def test_a_sum_over_wires_is_taken_in_their_order(name: str, chunk: int | None) -> None:
    quantizer = Expressions(FORMATS[name], 64, chunk)
    numel = 64 * 5
    values = torch.randn(5, numel, generator=torch.Generator().manual_seed(5)) * torch.logspace(-3, 3, 5)[:, None]
    wires = encoded(quantizer, values)
    expected = torch.zeros(numel)
    for part in decoded(quantizer, wires, numel):
        expected += part
    assert not torch.equal(expected, decoded(quantizer, wires.flip(0), numel).cumsum(0)[-1]), "the order must matter"
    for apart in (wires, torch.nn.functional.pad(wires, (0, 8))[:, : wires.shape[1]]):
        total, plain = torch.full((numel,), torch.nan), torch.full((numel,), torch.nan)
        quantizer.sum_decoded(apart, total)
        Quantizer.sum_decoded(quantizer, apart, plain)
        assert torch.equal(total, expected)
        assert torch.equal(plain, expected)
    quantizer.sum_decoded(wires[:1], total)
    assert torch.equal(total, decoded(quantizer, wires[:1], numel)[0])


# -- what does not fit


@pytest.mark.parametrize(
    ("block", "fitting"), [(0, 32), (-5, 32), (1, 32), (31, 32), (100, 96), (4097, 4096), (10**9, MAX_BLOCK)]
)
def test_a_block_that_does_not_fit_is_refused(block: int, fitting: int) -> None:
    with pytest.raises(ConfigError, match=rf"{block} elements .* multiple of 32 from 32 to 4096, such as {fitting}\."):
        build_quantizer("int8", block)
    build_quantizer("int8", fitting)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'int3' is unknown\. Expected one of int8, int4, fp8\."):
        build_quantizer("int3", 256)


# -- twice


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("magnitude", [1e-42, 1e-38, 1e-3, 1.0, 3e38])
def test_what_was_decoded_is_encoded_to_the_same_codes(format: str, magnitude: float) -> None:
    """Saving and loading what rests as codes changes nothing."""
    quantizer = build_quantizer(format, 32)
    values = torch.randn(64, 4096, generator=torch.Generator().manual_seed(5)).clamp(-1, 1) * magnitude
    wires = [torch.empty(64, quantizer.wire_bytes(4096), dtype=torch.uint8) for _ in range(2)]
    decoded = torch.empty_like(values)
    for wire in wires:
        quantizer.encode(values, wire)
        quantizer.decode(wire, decoded)
        values = decoded.clone()
    assert torch.equal(*wires)
