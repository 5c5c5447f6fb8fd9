"""The kernels that `shardwise.quantize.kernels` launches: each reads what it needs once and writes once.

A program works on TILE blocks of one row: ``[TILE, LANES]`` bytes of codes. LANES is BYTES, the bytes of a block's
codes, rounded up to a power of two. A block's values come in PARTS runs of BYTES: one where a code fills its byte, two
where two codes share it. Scales are fp32 and stand behind the row's codes. Rows of a wire lie ``wire_words`` times 4
bytes apart; that it is a multiple of 4 lets the compiler load and store 4 codes at a time.

The bits are those of `shardwise.quantize.expressions`, on one condition of every launch: ``enable_fp_fusion=False``. A
product that is fused into the sum behind it is rounded otherwise.

This module needs Triton. It holds kernels alone, which are Triton's language and not Python's.
"""

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a small number, it leaves that number, rounded to even, in the low bits of the sum."""
FP8_ROUNDER = tl.constexpr(16384.0)
"""2**14, likewise for multiples of 2**-9, the step of e4m3 below its smallest normal number."""
FP8_ROUNDER_BITS = tl.constexpr(0x46800000)
FP8_SMALLEST_NORMAL_BITS = tl.constexpr(0x3C800000)
"""2**-6."""
FP8_INTO_FP16 = tl.constexpr(256.0)


@triton.jit
def _place(num_blocks, BYTES: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """This program's blocks [TILE], lanes [1, LANES], and which of them exist [TILE, LANES]."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, LANES)[None, :]
    return at, lane, (at < num_blocks)[:, None] & (lane < BYTES)


@triton.jit
def _largest(part):
    """The largest magnitude of each row of ``part`` [TILE, LANES] as the bits of an fp32, in which a NaN is largest."""
    return tl.max(part.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _code(scaled, FP8: tl.constexpr):
    """The code of each value in the low byte of an int32; what stands above it has no meaning."""
    if FP8:
        bits = scaled.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # The exponent's bias is 120 less, the mantissa 20 bits shorter, rounded to even.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        small = (tl.abs(scaled) + FP8_ROUNDER).to(tl.int32, bitcast=True) - FP8_ROUNDER_BITS
        code = tl.where(magnitude < FP8_SMALLEST_NORMAL_BITS, small, normal)
        return (code & 0x7F) | ((bits >> 24) & 0x80)
    return (scaled + ROUNDER).to(tl.int32, bitcast=True)


@triton.jit
def _wide(byte, PART: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr):
    """What the codes in ``byte``, int8, stand for, in fp32: for fp8 divided by `FP8_INTO_FP16`."""
    if FP8:
        bits = (byte.to(tl.int16) << 7) & -0x4080  # the sign came along twice
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    whole = byte.to(tl.int32)
    if PARTS == 2:
        if PART == 0:
            whole = whole << 28
            return (whole >> 28).to(tl.float32)  # arithmetic: the sign comes back
        return (whole >> 4).to(tl.float32)
    return whole.to(tl.float32)


@triton.jit
def encode_blocks(
    values, codes, scales, values_stride, wire_words, num_blocks,
    LARGEST_CODE: tl.constexpr, SMALLEST_SCALE: tl.constexpr, LARGEST_VALUE: tl.constexpr,
    SCALE_OF_LARGEST: tl.constexpr, BYTES: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, rows): values [rows, n] of any dtype -> codes [rows, bytes] uint8, scales [rows, blocks] fp32."""
    row = tl.program_id(1).to(tl.int64)
    at, lane, mask = _place(num_blocks, BYTES, LANES, TILE)
    begin = values + row * values_stride + at[:, None] * (BYTES * PARTS) + lane
    low = tl.load(begin, mask=mask, other=0.0).to(tl.float32)
    largest_bits = _largest(low)
    if PARTS == 2:
        high = tl.load(begin + BYTES, mask=mask, other=0.0).to(tl.float32)
        largest_bits = tl.maximum(largest_bits, _largest(high))
    largest = largest_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, LARGEST_CODE)
    scale = tl.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale)  # a NaN is not less
    scale = tl.where(largest == LARGEST_VALUE, SCALE_OF_LARGEST, scale)
    # Some releases of Triton flush denormals in divisions. No bit depends on it: a denormal scale becomes the smallest
    # one either way, and no inverse of a scale is denormal.
    inverse = tl.div_rn(1.0, scale)[:, None]
    code = _code(low * inverse, FP8)
    if PARTS == 2:
        code = (code & 15) | (_code(high * inverse, FP8) << 4)
    tl.store(codes + row * wire_words * 4 + at[:, None] * BYTES + lane, (code & 0xFF).to(tl.uint8), mask=mask)
    tl.store(scales + row * wire_words + at, scale, mask=at < num_blocks)


@triton.jit
def decode_blocks(
    codes, scales, values, wire_words, values_stride, num_blocks,
    ACCUMULATE: tl.constexpr, BYTES: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, rows): codes [rows, bytes] int8, scales [rows, blocks] fp32 -> values [rows, n] of any dtype."""
    row = tl.program_id(1).to(tl.int64)
    at, lane, mask = _place(num_blocks, BYTES, LANES, TILE)
    byte = tl.load(codes + row * wire_words * 4 + at[:, None] * BYTES + lane, mask=mask, other=0)
    scale = tl.load(scales + row * wire_words + at, mask=at < num_blocks, other=0.0)[:, None]
    if FP8:
        scale = scale * FP8_INTO_FP16
    begin = values + row * values_stride + at[:, None] * (BYTES * PARTS) + lane
    for part in tl.static_range(PARTS):
        value = _wide(byte, part, PARTS, FP8) * scale
        into = begin + part * BYTES
        if ACCUMULATE:
            value = tl.load(into, mask=mask, other=0.0).to(tl.float32) + value
        tl.store(into, value.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _value_of_part(byte_at, scale_at, part, mask, exists, PARTS: tl.constexpr, FP8: tl.constexpr):
    """The values [TILE, LANES] fp32 of one part of the blocks at hand."""
    byte = tl.load(byte_at, mask=mask, other=0)
    scale = tl.load(scale_at, mask=exists, other=0.0)[:, None]
    value = _wide(byte, 0, PARTS, FP8)
    if FP8:
        scale = scale * FP8_INTO_FP16
    if PARTS == 2:
        value = tl.where(part == 0, value, _wide(byte, 1, PARTS, FP8))
    return value * scale


@triton.jit
def sum_blocks(
    codes, scales, total, wire_words, num_blocks,
    NUM_WIRES: tl.constexpr, BYTES: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
    LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, parts): codes [k, bytes] int8, scales [k, blocks] fp32 -> total [n] fp32, added from row 0 on."""
    part = tl.program_id(1)
    at, lane, mask = _place(num_blocks, BYTES, LANES, TILE)
    exists = at < num_blocks
    byte_at = codes + at[:, None] * BYTES + lane
    scale_at = scales + at
    found = _value_of_part(byte_at, scale_at, part, mask, exists, PARTS, FP8)
    for _ in range(1, NUM_WIRES):
        byte_at += tl.cast(wire_words, tl.int64) * 4
        scale_at += wire_words
        found += _value_of_part(byte_at, scale_at, part, mask, exists, PARTS, FP8)
    tl.store(total + at[:, None] * (BYTES * PARTS) + part * BYTES + lane, found, mask=mask)
