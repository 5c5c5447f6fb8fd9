"""``from_pretrained`` of ``transformers`` by ranges: its files hand out tensors that are read when they are touched.

The library's loading stays its own: names, renamings, conversions, ties and missing keys. Only what its module calls
``safe_open`` is another class while a model is built under ``zero.Init``. A tensor that goes into a parameter as it is
(or cast) is then read by ranges; one that is converted first (experts that are fused, say) is touched, so it is read
whole, parameter by parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from shardwise.checkpoint.tree import DTYPE_NAMES
from shardwise.checkpoint.weights_file import FileSource, SafetensorsFile


class Defers(Protocol):
    """What makes a tensor whose values are still in a file."""

    def __call__(self, source: FileSource, shape: torch.Size, dtype: torch.dtype, label: str, /) -> torch.Tensor:
        """Make it."""


@contextmanager
def opened_lazily(defer: Defers) -> Iterator[None]:
    """While open, ``transformers`` reads safetensors lazily; nothing happens where it was not imported before."""
    if "transformers" not in sys.modules:
        yield
        return
    loading: Any = import_module("transformers.modeling_utils")
    former = loading.safe_open
    loading.safe_open = partial(LazyFile, defer)
    try:
        yield
    finally:
        loading.safe_open = former


class LazyFile:
    """Stands in for ``safetensors.safe_open``."""

    def __init__(self, defer: Defers, path: Any, framework: str = "pt", device: Any = "cpu", **_: Any) -> None:
        self._defer = defer
        self._file = SafetensorsFile(Path(path))

    def __enter__(self) -> LazyFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is open between reads."""

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self._file.shapes)

    offset_keys = keys

    def metadata(self) -> dict[str, str]:
        """What the writer said."""
        return self._file.metadata

    def get_slice(self, name: str) -> LazySlice:
        """A tensor that is not read yet."""
        return LazySlice(self._defer, self._file, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor, as it is in the file."""
        return LazyTensor(self._defer, self._file, name).to()


class LazySlice:
    """Stands in for the slices of safetensors: ``[...]`` is the whole tensor."""

    def __init__(self, defer: Defers, file: SafetensorsFile, name: str) -> None:
        self._defer = defer
        self._file = file
        self._name = name

    def get_shape(self) -> list[int]:
        """Its dims."""
        return list(self._file.shapes[self._name])

    def get_dtype(self) -> str:
        """The format's word for its dtype."""
        return DTYPE_NAMES[self._file.dtype(self._name)]

    def __getitem__(self, index: Any) -> Any:
        if index is Ellipsis:
            return LazyTensor(self._defer, self._file, self._name)
        whole = torch.empty(self.get_shape(), dtype=self._file.dtype(self._name))
        self._file.read_into(self._name, 0, whole.view(-1))
        return whole[index]


class LazyTensor:
    """What a whole slice is until somebody says in which dtype it is wanted.

    It is made by the loader's threads, which no mode watches; ``to`` therefore returns what the construction knows.
    """

    def __init__(self, defer: Defers, file: SafetensorsFile, name: str) -> None:
        self._defer = defer
        self._file = file
        self._name = name
        self.shape = torch.Size(file.shapes[name])
        self.dtype = file.dtype(name)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the construction that will be read when it is touched; on another device, the values."""
        dtype = self.dtype if dtype is None else dtype
        if device is not None and torch.device(device).type == "meta":
            return torch.empty(self.shape, dtype=dtype, device="meta")
        if device is not None and torch.device(device).type != "cpu":
            whole = torch.empty(self.shape, dtype=dtype, device=device)
            self._file.read_into(self._name, 0, whole.view(-1))
            return whole
        return self._defer(FileSource(self._file, self._name, dtype), self.shape, dtype, self._name)
