"""The ZeRO engine: who holds which model state, when it travels, and who steps it.

Scripts find here what they know from DeepSpeed's module of this name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwise.zero.construction import Init
    from shardwise.zero.external import register_external_parameter, unregister_external_parameter
    from shardwise.zero.gathered import GatheredParameters

_HOMES = {
    "GatheredParameters": "gathered",
    "Init": "construction",
    "register_external_parameter": "external",
    "unregister_external_parameter": "external",
}

__all__ = ["GatheredParameters", "Init", "register_external_parameter", "unregister_external_parameter"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"shardwise.zero.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'shardwise.zero' has no attribute {name!r}")
