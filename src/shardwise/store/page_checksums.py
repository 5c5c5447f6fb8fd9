"""A checksum for each page of a file: what is read is what was written, or an error."""

from __future__ import annotations

import array
import zlib

from shardwise.store.base import PAGE_BYTES


class PageChecksums:
    """CRC-32 of every page that was written; a page that was not holds zeros. Takes a thousandth of the file."""

    def __init__(self, num_bytes: int) -> None:
        self._of_page = array.array("I", [zlib.crc32(bytes(PAGE_BYTES))]) * (num_bytes // PAGE_BYTES)

    def note(self, pages: memoryview, offset: int) -> None:
        """Whole ``pages`` are about to be written at byte ``offset``."""
        for begin in range(0, pages.nbytes, PAGE_BYTES):
            self._of_page[(offset + begin) // PAGE_BYTES] = zlib.crc32(pages[begin : begin + PAGE_BYTES])

    def first_difference(self, pages: memoryview, offset: int) -> int | None:
        """Position of the first of the whole ``pages`` read at byte ``offset`` that is not as noted, or None."""
        for begin in range(0, pages.nbytes, PAGE_BYTES):
            if self._of_page[(offset + begin) // PAGE_BYTES] != zlib.crc32(pages[begin : begin + PAGE_BYTES]):
                return offset + begin
        return None
