"""Comparing versions of packages, as scripts do that run on several of them."""

from __future__ import annotations

import operator
from importlib.metadata import PackageNotFoundError, version

from torch.torch_version import TorchVersion

from shardwise.errors import ConfigError

COMPARISONS = {
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
}


def compare_versions(library_or_version: object, operation: str, requirement_version: str) -> bool:
    """Whether an installed package, or a version, stands so to another version.

    Args:
        library_or_version: the name of a package, or a version: a text that starts with a digit, or an object.
        operation: one of ``> >= == != <= <``.
        requirement_version: what to compare with.

    Raises:
        ConfigError: there is no such comparison, or the package is not installed.
    """
    if operation not in COMPARISONS:
        raise ConfigError(f"operation {operation!r} is unknown: expected one of {' '.join(COMPARISONS)}.")
    found = str(library_or_version)
    if isinstance(library_or_version, str) and not found[:1].isdigit():
        try:
            found = version(found)
        except PackageNotFoundError:
            raise ConfigError(f"package {found!r} is not installed, so it has no version to compare.") from None
    return bool(COMPARISONS[operation](TorchVersion(found), TorchVersion(requirement_version)))


def is_torch_version(operation: str, version: str) -> bool:
    """Whether the torch that is installed stands so to ``version``: ``is_torch_version(">=", "2.4")``."""
    return compare_versions("torch", operation, version)
