"""Opening what should be a file: of a pipe or a device the reader would wait for ever, or never see the end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of ``path``, which is a file, or a link to one.

    Raises:
        OSError: it is missing, or something else.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return descriptor


def reading(path: Path) -> BinaryIO:
    """``path`` open for reading, if it is a file."""
    return os.fdopen(open_plain(path), "rb")
