"""Grids of parameters of which the quick suite runs some points and `make test-all` runs all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def grid(*axes: Iterable[Any], quick: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Every combination of the axes' values, for `pytest.mark.parametrize`; those that are not `quick` are slow."""
    points, wanted = list(itertools.product(*axes)), list(quick)
    unknown = [point for point in wanted if point not in points]
    assert not unknown, f"not on the grid: {unknown}"
    return [pytest.param(*point, marks=() if point in wanted else pytest.mark.slow) for point in points]
