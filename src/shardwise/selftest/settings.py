"""The config of the user's run, made fit for a model of a few thousand parameters."""

from typing import Any

from shardwise.config import EngineConfig, LeafModuleConfig
from shardwise.config.load import check
from shardwise.config.rules import broken_rules
from shardwise.config.run.auto import Seen, fill
from shardwise.config.run.precedence import resolve
from shardwise.config.run.resolved import PRECISIONS, Resolved, section_of
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.source import Source

MICRO_BATCH = 4
MOST_ACCUMULATION_STEPS = 4  # enough to see that micro-batches add up; more would only take longer
WIDTH = 61  # of the model's layers; odd, so that shards begin and end inside rows

# What decides how states are sharded, in which precision they compute and how they travel. The rest stays out: the
# user's optimizer may be made for slow steps, and trackers would publish this job.
_KEPT = (
    "gradient_clipping",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "fp16",
    "bf16",
    "data_types",
    "zero_optimization",
    "shardwise",
)


def user_config(asked: Asked, num_ranks: int) -> EngineConfig:
    """The config that the user's run would have, with every "auto" filled as for this job's model and batches.

    Raises ConfigError as the run itself would.
    """
    resolved = resolve(asked)
    if resolved.ds_config is None:
        precision = resolved["mixed_precision"]
        config: dict[str, Any] = {dtype: section_of(dtype, precision == dtype) for dtype in PRECISIONS}
        resolved = Resolved(resolved.values, {"train_micro_batch_size_per_gpu": MICRO_BATCH, **config})
    seen = Seen(
        num_processes=num_ranks,
        micro_batch_size=Said(MICRO_BATCH, Origin.AUTO, "the self-test's batch"),
        gradient_accumulation_steps=1,
        hidden_size=Said(WIDTH, Origin.AUTO, "the self-test's model"),
        optimizer={"lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8, "momentum": 0.9},
        scheduler={"warmup_num_steps": 2, "total_num_steps": 16 * num_ranks},
    )
    filled = fill(resolved, seen)
    checked = check(Source(filled.json_name, filled.ds_config), EngineConfig, broken_rules)
    checked.raise_faults([*checked.faults, *checked.refused])
    checked.block.resolve_batch(num_ranks)
    return checked.block


def job_config(config: EngineConfig, num_ranks: int) -> EngineConfig:
    """The same sharding, precision and travel for this job: small batches, no names of the user's modules."""
    steps = config.resolve_batch(num_ranks).gradient_accumulation_steps
    zero = config.zero_optimization
    threshold = zero.stage3_param_persistence_threshold
    fitted = zero.model_copy(
        update={
            "zero_leaf_modules": (),
            "leaf_module": LeafModuleConfig(),
            # Else all of a small model would be persistent, and nothing of stage 3 would be seen.
            "stage3_param_persistence_threshold": None if threshold is None else min(threshold, 10 * WIDTH),
        }
    )
    kept = {name: getattr(config, name) for name in _KEPT} | {
        "zero_optimization": fitted,
        "shardwise": config.shardwise.model_copy(update={"unit_classes": None}),
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": min(steps, MOST_ACCUMULATION_STEPS),
    }
    return EngineConfig(**kept)


def in_words(config: EngineConfig) -> str:
    """The config in a line."""
    steps = config.gradient_accumulation_steps or 1
    words = [f"ZeRO stage {config.zero_optimization.stage}", config.compute_dtype]
    if config.gradient_clipping:
        words.append(f"clipping at {config.gradient_clipping:g}")
    words.append(f"{steps} micro-batch{'es' * (steps != 1)} a step")
    return ", ".join(words)
