"""The batch triple: train_batch_size T = micro-batch m · accumulation steps g · ranks W.

Any two of the three, or T or m alone, fix the rest. Where the division leaves a rest, the error names the nearest
values that would work.
"""

from dataclasses import dataclass

from shardwise.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """The triple, whole and consistent for one number of ranks."""

    train_batch_size: int  # samples a step, all ranks
    train_micro_batch_size_per_gpu: int  # samples a forward, one rank
    gradient_accumulation_steps: int  # micro-batches a step


def resolve_batch(
    train_batch_size: int | None, micro_batch_size: int | None, accumulation_steps: int | None, world_size: int
) -> BatchSizes:
    """Complete the triple for `world_size` data-parallel ranks.

    Raises ConfigError when neither T nor m is given, or when no whole numbers fit.
    """
    if world_size < 1:
        raise ConfigError(f"The batch sizes need a world of at least 1 rank, but world_size is {world_size}.")
    if train_batch_size is None:
        if micro_batch_size is None:
            raise ConfigError(
                "The config names neither train_batch_size nor train_micro_batch_size_per_gpu, so the size of a step "
                "is unknown. Give at least one of them as a number."
            )
        steps = accumulation_steps or 1
        return BatchSizes(micro_batch_size * steps * world_size, micro_batch_size, steps)
    if micro_batch_size is None:
        steps = accumulation_steps or 1
        micro_batch_size = _divide(train_batch_size, steps, world_size, "gradient_accumulation_steps")
        return BatchSizes(train_batch_size, micro_batch_size, steps)
    if accumulation_steps is None:
        steps = _divide(train_batch_size, micro_batch_size, world_size, "train_micro_batch_size_per_gpu")
        return BatchSizes(train_batch_size, micro_batch_size, steps)
    product = micro_batch_size * accumulation_steps * world_size
    if product != train_batch_size:
        raise ConfigError(_mismatch(train_batch_size, micro_batch_size, accumulation_steps, world_size))
    return BatchSizes(train_batch_size, micro_batch_size, accumulation_steps)


def _divide(train_batch_size: int, factor: int, world_size: int, factor_name: str) -> int:
    """Return T / (factor · W), or say which T would have divided."""
    quotient, rest = divmod(train_batch_size, factor * world_size)
    if rest == 0 and quotient > 0:
        return quotient
    divisor = factor * world_size
    below, above = quotient * divisor, (quotient + 1) * divisor
    nearest = f"{below} or {above}" if below else str(above)
    raise ConfigError(
        f"train_batch_size is {train_batch_size}, but it must be a multiple of {factor_name} ({factor}) "
        f"x ranks ({world_size}) = {divisor}. Nearest values that work: {nearest}."
    )


def _mismatch(train_batch_size: int, micro_batch_size: int, accumulation_steps: int, world_size: int) -> str:
    product = micro_batch_size * accumulation_steps * world_size
    ways = [f"train_batch_size to {product}"]
    for name, others in (
        ("gradient_accumulation_steps", micro_batch_size * world_size),
        ("train_micro_batch_size_per_gpu", accumulation_steps * world_size),
    ):
        if train_batch_size % others == 0:
            ways.append(f"{name} to {train_batch_size // others}")
    return (
        f"train_batch_size is {train_batch_size}, but train_micro_batch_size_per_gpu ({micro_batch_size}) x "
        f"gradient_accumulation_steps ({accumulation_steps}) x ranks ({world_size}) = {product}. "
        f"Set {', or '.join(ways)}; or leave one of the three out."
    )
