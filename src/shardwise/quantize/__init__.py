"""Blockwise quantisation: floats become one byte or half a byte each, and one scale a block."""

from shardwise.quantize.base import FORMATS, Quantizer
from shardwise.quantize.choose import build_quantizer

__all__ = ["FORMATS", "Quantizer", "build_quantizer"]
