"""Parameters that a module's forward reads although another module holds them, as far as the user tells us.

What is told counts when the model is cut into units: such a parameter belongs to a unit that is whole whenever any of
its users runs.
"""

from __future__ import annotations

import weakref

from torch import nn

from shardwise.errors import ConfigError
from shardwise.torch_compat import WeakTensorKeyDictionary

_registered: weakref.WeakKeyDictionary[nn.Module, WeakTensorKeyDictionary] = weakref.WeakKeyDictionary()


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Say that ``module``'s forward reads ``parameter``, which another module holds; before ``initialize``.

    Raises:
        ConfigError: an argument is no module, or no parameter.
    """
    _check(module, parameter)
    _registered.setdefault(module, WeakTensorKeyDictionary())[parameter] = True


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Take back what ``register_external_parameter`` said.

    Raises:
        ConfigError: it was not said.
    """
    _check(module, parameter)
    registered = _registered.get(module)
    if registered is None or registered.pop(parameter, None) is None:
        raise ConfigError(
            f"unregister_external_parameter(): no such parameter was registered for this {type(module).__name__}."
        )


def external_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What was registered for ``module``."""
    registered = _registered.get(module)
    return [] if registered is None else list(registered)


def _check(module: nn.Module, parameter: nn.Parameter) -> None:
    if not isinstance(module, nn.Module) or not isinstance(parameter, nn.Parameter):
        raise ConfigError(
            f"an external parameter was given as ({type(module).__name__}, {type(parameter).__name__}). "
            "Expected a module and the nn.Parameter that its forward reads."
        )
