"""What a script does when memory is short: free what it can, or try again with a smaller batch."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch

from shardwise import roll_call
from shardwise.errors import ConfigError, StateError

OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "CUDNN_STATUS_NOT_SUPPORTED",  # what cuDNN says where no algorithm fits into what is free
    "DefaultCPUAllocator: can't allocate memory",
)


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give the GPU memory that torch keeps for later back to the driver.

    Args:
        garbage_collection: look for unreachable Python objects first.
    """
    if garbage_collection:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """Forget ``objects`` and free what they held: ``model, optimizer = release_memory(model, optimizer)``."""
    number = len(objects)
    del objects
    clear_device_cache(garbage_collection=True)
    return [None] * number


def should_reduce_batch_size(exception: Exception) -> bool:
    """Whether the exception says that memory ran out."""
    if isinstance(exception, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(exception, RuntimeError) and any(words in str(exception) for words in OUT_OF_MEMORY_WORDS)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Any:
    """Decorator, also with arguments: call ``function(batch_size, ...)`` with smaller and smaller sizes until it fits.

    The call is made without the batch size. Nine tenths of a size that did not fit come next. With many processes each
    attempt begins together: one that ran out of memory alone is an error that names it.

    Args:
        function: its first argument is the batch size.
        starting_batch_size: what to begin with.
        reduce_batch_size_fn: gives the next size, instead of nine tenths.

    Raises:
        StateError: not even a batch of one fits.
        CollectiveError: the processes do not try the same batch size.
        ConfigError: the caller passes the batch size itself.
    """
    if function is None:
        return partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    body = function

    @wraps(body)
    def until_it_fits(*args: Any, **kwargs: Any) -> Any:
        _refuse_a_batch_size_of_the_caller(body, args)
        batch_size = starting_batch_size
        while batch_size > 0:
            clear_device_cache(garbage_collection=True)
            roll_call.answer(f"find_executable_batch_size at batch size {batch_size}")
            try:
                return body(batch_size, *args, **kwargs)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
            batch_size = reduce_batch_size_fn() if reduce_batch_size_fn is not None else batch_size * 9 // 10
        raise StateError("No executable batch size found, reached zero: memory does not hold a batch of one.")

    return until_it_fits


def _refuse_a_batch_size_of_the_caller(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return
    if len(parameters) < len(args) + 1:
        name = getattr(function, "__name__", "the function")
        raise ConfigError(
            f"Batch size was passed into {name} as the first argument, or it has too many arguments: "
            f"find_executable_batch_size passes the batch size itself. Call {name} without it."
        )
