"""A hook on a user's module that stays behind when the module is copied or pickled.

Copies are made to keep averages of weights, or to send a model elsewhere: they belong to no engine. A plain hook would
go along, and with it the engine and all that it holds, or it would act on the engine's units for the copy's passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def no_hook(*_: Any) -> None:
    """What a copy has in place of a hook."""


class ModuleHook:
    """Calls ``function``; a copy of it is ``no_hook``.

    Args:
        function: the hook itself.
        before_copy: called when the module is about to be copied or pickled; it may refuse.
    """

    def __init__(self, function: Callable[..., Any], before_copy: Callable[[], None]) -> None:
        self._function = function
        self._before_copy = before_copy

    def __call__(self, *args: Any) -> Any:
        """Run the hook."""
        return self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        self._before_copy()
        return no_hook

    def __reduce__(self) -> tuple[Any, ...]:
        self._before_copy()
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return no_hook
