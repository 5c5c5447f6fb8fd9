"""Rules between keys: each looks only at values that the user set, and names both keys and the way out."""

from collections.abc import Iterator

from shardwise.config.messages import Fault
from shardwise.config.schema import EngineConfig


def broken_rules(config: EngineConfig) -> Iterator[Fault]:
    """Yield a fault for every rule that the config breaks."""
    yield from _one_compute_dtype(config)
    yield from _autocast_or_compute_dtype(config)
    yield from _room_for_the_loss_scale(config)
    yield from _one_division(config)
    yield from _travel(config)
    yield from _replicas(config)
    yield from _steps_in_backward(config)


def _one_compute_dtype(config: EngineConfig) -> Iterator[Fault]:
    if config.fp16.enabled and config.bf16.enabled:
        yield Fault(
            ("bf16", "enabled"),
            "found true, and fp16.enabled is true as well; expected one compute dtype. Set one of the two to false.",
        )


def _autocast_or_compute_dtype(config: EngineConfig) -> Iterator[Fault]:
    if config.torch_autocast.enabled and config.compute_dtype != "fp32":
        yield Fault(
            ("torch_autocast", "enabled"),
            f"found true, and {config.compute_dtype}.enabled is true as well: under autocast parameters stay in fp32. "
            "Set one of the two to false.",
        )


def _room_for_the_loss_scale(config: EngineConfig) -> Iterator[Fault]:
    fp16 = config.fp16
    if not config.scales_loss or fp16.loss_scale > 0:
        return  # no dynamic scale, so its bounds are not in use
    if fp16.min_loss_scale > 2.0**fp16.initial_scale_power:
        yield Fault(
            ("fp16", "min_loss_scale"),
            f"found {fp16.min_loss_scale:g}, expected at most 2^initial_scale_power = {2**fp16.initial_scale_power}, "
            "where the scale starts. Lower it, or raise initial_scale_power.",
        )


def _one_division(config: EngineConfig) -> Iterator[Fault]:
    if config.prescale_gradients and config.gradient_allreduce_op == "sum":
        yield Fault(
            ("prescale_gradients",),
            'found true, and gradient_allreduce_op is "sum", which divides nothing. Drop one of the two.',
        )


def _travel(config: EngineConfig) -> Iterator[Fault]:
    zero, own = config.zero_optimization, config.shardwise
    for name in (name for name, wanted in _zeropp(config).items() if wanted):
        path = ("zero_optimization", name)
        if zero.stage != 3:
            yield Fault(path, f"found at stage {zero.stage}; ZeRO++ works on sharded parameters. Set stage to 3.")
        if own.transport == "shared_memory":
            yield Fault(
                path,
                'found, and shardwise.transport is "shared_memory", where nothing travels. Set the transport to '
                '"process_group" or "auto".',
            )
    at_rest = {
        ("zero_optimization", "zero_quantized_nontrainable_weights"): zero.zero_quantized_nontrainable_weights,
        ("shardwise", "frozen_weights"): own.frozen_weights is not None,
    }
    for path in (path for path, wanted in at_rest.items() if wanted and zero.stage != 3):
        yield Fault(path, f"found at stage {zero.stage}, which keeps parameters whole. Set stage to 3.")
    if zero.zero_quantized_gradients and not zero.reduce_scatter:
        yield Fault(
            ("zero_optimization", "zero_quantized_gradients"),
            "found true, and reduce_scatter is false, which averages by all-reduce. Drop one of the two.",
        )
    if own.error_feedback and not zero.zero_quantized_gradients:
        yield Fault(
            ("shardwise", "error_feedback"),
            "found true, and no gradient is quantised. Set zero_optimization.zero_quantized_gradients to true.",
        )
    if own.error_feedback and config.scales_loss:
        yield Fault(
            ("shardwise", "error_feedback"),
            "found true with fp16: what was left of one step would be added under the next one's loss scale. Use bf16, "
            "or drop it.",
        )


def _replicas(config: EngineConfig) -> Iterator[Fault]:
    zero = config.zero_optimization
    path = ("zero_optimization", "mics_shard_size")
    if zero.mics_shard_size <= 0:
        return
    if zero.stage != 3:
        yield Fault(
            path,
            f"found {zero.mics_shard_size} at stage {zero.stage}; it shards all states, parameters among them. Set "
            "stage to 3, or drop it.",
        )
    if zero.mics_hierarchical_params_gather and config.shardwise.transport == "shared_memory":
        yield Fault(
            ("zero_optimization", "mics_hierarchical_params_gather"),
            'found true, and shardwise.transport is "shared_memory", where nothing travels. Set the transport to '
            '"process_group" or "auto".',
        )
    for name, wanted in _zeropp(config).items():
        if wanted:
            yield Fault(
                path,
                f"found {zero.mics_shard_size}, and {name} is set, which sends less between nodes where all ranks "
                "share the states. Drop one of the two.",
            )


def _steps_in_backward(config: EngineConfig) -> Iterator[Fault]:
    if not config.shardwise.step_in_backward:
        return
    zero, path = config.zero_optimization, ("shardwise", "step_in_backward")
    if zero.offload_optimizer.device not in ("cpu", "nvme"):
        yield Fault(
            path,
            "found true, and zero_optimization.offload_optimizer.device is none: only states that rest off the device "
            'are stepped in backward. Set the device to "cpu" or "nvme", or drop the key.',
        )
    whole = {
        "gradient_clipping": (config.gradient_clipping > 0, "the factor needs the norm of all gradients"),
        "fp16": (config.scales_loss, "an overflow anywhere skips the whole step. Use bf16"),
        "zero_quantized_gradients": (
            zero.zero_quantized_gradients,
            "a gradient that is not finite anywhere skips the whole step",
        ),
    }
    for name, (wanted, reason) in whole.items():
        if wanted:
            yield Fault(path, f"found true with {name}: {reason}. Drop one of the two.")


def _zeropp(config: EngineConfig) -> dict[str, bool]:
    """ZeRO++'s keys, and whether they ask for something."""
    zero = config.zero_optimization
    return {
        "zero_hpz_partition_size": zero.zero_hpz_partition_size > 1,
        "zero_quantized_weights": zero.zero_quantized_weights,
        "zero_quantized_gradients": zero.zero_quantized_gradients,
    }


def faults_of_offload(config: EngineConfig) -> Iterator[Fault]:
    """Yield a fault where states cannot rest as asked.

    Asked when a model is prepared and not before: a run's settings may be looked at without its directories.
    """
    zero = config.zero_optimization
    if zero.offload_param.device in ("cpu", "nvme") and zero.stage != 3:
        yield Fault(
            ("zero_optimization", "offload_param", "device"),
            f'found "{zero.offload_param.device}" at stage {zero.stage}, which keeps parameters whole on every rank. '
            "Set stage to 3, or the device to none.",
        )
    if zero.offload_optimizer.device in ("cpu", "nvme") and zero.stage == 0:
        yield Fault(
            ("zero_optimization", "offload_optimizer", "device"),
            f'found "{zero.offload_optimizer.device}" at stage 0, which keeps optimizer state whole on every rank. '
            "Set stage to 1, 2 or 3, or the device to none.",
        )
    for name, block in (("offload_param", zero.offload_param), ("offload_optimizer", zero.offload_optimizer)):
        if block.device == "nvme" and not block.nvme_path:
            yield Fault(
                ("zero_optimization", name, "nvme_path"),
                'found nothing, and the device is "nvme". Expected a directory on a local disk.',
            )
