"""The transport that a configuration asks for: what moves bytes, in one hop or in two, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta

import torch

from shardwise.comm.averaging import Averaging, average_by
from shardwise.comm.base import CollectiveId, Communicator
from shardwise.comm.choose import build_communicator, build_hops
from shardwise.comm.logged import OPERATIONS, CommsLogSettings, Logged
from shardwise.comm.replicated import Replicated
from shardwise.comm.two_hop import TwoHop, TwoHopSettings
from shardwise.config import EngineConfig
from shardwise.config.tools import CommsLoggerConfig
from shardwise.errors import ConfigError
from shardwise.mesh import Axis, Mesh, build_mesh, local_rank
from shardwise.quantize import Quantizer, build_quantizer
from shardwise.topology import Topology, divisors
from shardwise.zero.offload import Offload, Place

logger = logging.getLogger(__name__)


def build_training_mesh(config: EngineConfig, device: str | torch.device | None, timeout: timedelta) -> Mesh:
    """The mesh whose axis ``dp_shard`` is as long as the configuration asks. Collective.

    Raises:
        ConfigError: that many ranks do not divide the world.
    """
    mesh = build_mesh(device, timeout)
    size, world = config.zero_optimization.mics_shard_size, mesh.world.size
    if size <= 0 or size == world:
        return mesh
    if world % size:
        raise ConfigError(
            f"zero_optimization.mics_shard_size: found {size}, which does not divide {world} ranks. Expected "
            f"{' or '.join(map(str, divisors(world)))}, best the number of ranks on a node."
        )
    return build_mesh(device, timeout, size)


def connect(mesh: Mesh, config: EngineConfig, offload: Offload) -> Communicator:
    """The transport that the configuration asks for. Collective."""
    averaging = Averaging.of_settings(
        mesh.world.size,
        prescale=config.prescale_gradients,
        predivide_factor=config.gradient_predivide_factor,
        is_mean=config.gradient_allreduce_op == "mean",
    )
    transport = choose_transport(mesh, config, offload)
    comm = (
        in_one_group(mesh, config, transport, averaging)
        if mesh.dp_replicate.size == 1
        else in_replicas(mesh, config, transport, averaging)
    )
    comm.check = config.shardwise.check_collectives
    return comm


def choose_transport(mesh: Mesh, config: EngineConfig, offload: Offload) -> str:
    """Where nothing but messages or a backend will do, that.

    Raises:
        ConfigError: shared memory is asked for.
    """
    transport = config.shardwise.transport
    if offload.parameter is not Place.DEVICE:
        if transport == "shared_memory":
            raise ConfigError(
                "transport 'shared_memory' reads the other ranks' shards in their memory, and offload_param keeps them "
                "elsewhere. Use transport 'process_group' or 'auto'."
            )
        return "process_group"
    if mesh.dp_replicate.size > 1:
        if transport == "shared_memory":
            raise ConfigError(
                "transport 'shared_memory' joins all ranks, and mics_shard_size parts them into groups. Use transport "
                "'process_group' or 'auto'."
            )
        return "process_group"
    return "process_group" if uses_two_hops(config) or gathers_by_nodes(config) else transport


def in_one_group(mesh: Mesh, config: EngineConfig, transport: str, averaging: Averaging) -> Communicator:
    """States are sharded over all ranks. Collective."""
    moves = _transport(mesh, mesh.dp_shard, config, transport, config.shardwise.reduction)
    comm = average_by(moves, averaging)
    comm.traffic.topology = find_topology(comm, config.shardwise.simulated_nodes)
    if uses_two_hops(config) and comm.size > 1:
        comm = in_two_hops(comm, moves, config, averaging.before * averaging.after)
    elif gathers_by_nodes(config):
        comm = _by_nodes(comm, moves, [comm.traffic.topology])
    return _logged(comm, mesh.dp_shard, config)


def in_replicas(mesh: Mesh, config: EngineConfig, transport: str, averaging: Averaging) -> Communicator:
    """States are sharded over a group of ranks, and every group holds all of them. Collective."""
    moves = _transport(mesh, mesh.dp_shard, config, transport, config.shardwise.reduction)
    across = _transport(mesh, mesh.dp_replicate, config, transport, "ordered", reduce_scatter=True)
    everyone = _transport(mesh, mesh.world, config, transport, config.shardwise.reduction)
    topology = find_topology(everyone, config.shardwise.simulated_nodes)
    for comm, axis in ((moves, mesh.dp_shard), (across, mesh.dp_replicate), (everyone, mesh.world)):
        comm.traffic.topology = topology.among(axis.ranks)
    inner = moves
    if gathers_by_nodes(config):
        inner = _by_nodes(moves, moves, [topology.among(part) for part in mesh.dp_shard.parts])
    replicated = Replicated(
        _logged(inner, mesh.dp_shard, config),
        _logged(across, mesh.dp_replicate, config),
        _logged(everyone, mesh.world, config),
    )
    return average_by(replicated, averaging)


def _transport(
    mesh: Mesh, axis: Axis, config: EngineConfig, transport: str, reduction: str, reduce_scatter: bool | None = None
) -> Communicator:
    zero = config.zero_optimization
    return build_communicator(
        mesh,
        transport,
        reduction,
        reduce_scatter=zero.reduce_scatter if reduce_scatter is None else reduce_scatter,
        allgather_partitions=zero.allgather_partitions,
        reduce_bucket_numel=zero.reduce_bucket_size,
        gather_bucket_numel=zero.allgather_bucket_size,
        axis=axis,
    )


def _logged(comm: Communicator, axis: Axis, config: EngineConfig) -> Communicator:
    if not config.comms_logger.enabled or comm.size == 1:
        return comm
    return Logged(comm, axis.name, comms_log_settings(config.comms_logger, comm.world.rank))


def _by_nodes(comm: Communicator, moves: Communicator, of_groups: Sequence[Topology]) -> Communicator:
    """``comm``, which gathers across nodes first and then inside them, where groups are of several. Collective.

    Args:
        comm: for everything else.
        moves: the transport that ``comm`` stands around.
        of_groups: the topology of each group of ranks that gather.

    Raises:
        ConfigError: groups are not of whole nodes of one size.
    """
    if all(topology.num_nodes == 1 for topology in of_groups):
        return comm
    if len(set(of_groups)) > 1 or of_groups[0].ranks_per_node is None:
        raise ConfigError(
            f"zero_optimization.mics_hierarchical_params_gather: groups of {moves.size} neighbouring ranks do not all "
            "lie on nodes alike. Expected as many ranks on every node, and a mics_shard_size that is a multiple of "
            "that number or divides it. Change mics_shard_size, or drop this key."
        )
    inside, across = build_hops(moves, of_groups[0])
    return TwoHop(comm, inside, across, TwoHopSettings(gathers=True))


def uses_two_hops(config: EngineConfig) -> bool:
    """Whether ZeRO++ is asked for."""
    zero = config.zero_optimization
    return zero.zero_quantized_weights or zero.zero_quantized_gradients or zero.zero_hpz_partition_size > 1


def gathers_by_nodes(config: EngineConfig) -> bool:
    """Whether MiCS's gathers are to travel across nodes first."""
    zero = config.zero_optimization
    return zero.mics_shard_size > 0 and zero.mics_hierarchical_params_gather


def find_topology(comm: Communicator, simulated_nodes: int | None) -> Topology:
    """Which ranks share a node. Collective.

    Raises:
        ConfigError: so many nodes as are to be simulated do not divide the world.
    """
    if simulated_nodes is not None:
        if comm.size % simulated_nodes:
            raise ConfigError(
                f"shardwise.simulated_nodes: found {simulated_nodes}, which does not divide {comm.size} ranks. "
                f"Expected {' or '.join(map(str, divisors(comm.size)))}."
            )
        return Topology.even(comm.size, comm.size // simulated_nodes)
    mine = str(local_rank(comm.world.rank)).encode()
    return Topology.of_local_ranks([int(r) for r in comm.exchange(CollectiveId("survey of nodes", "", 0), mine)])


def in_two_hops(comm: Communicator, moves: Communicator, config: EngineConfig, factor: float) -> Communicator:
    """``comm``, whose even collectives travel inside nodes and across them apart. Collective.

    Args:
        comm: for everything else.
        moves: the transport that ``comm`` stands around.
        config: what travels how.
        factor: that the sum of gradients is multiplied by.

    Raises:
        ConfigError: the size of hpZ's groups does not divide the world, or nodes differ in size.
    """
    zero, own = config.zero_optimization, config.shardwise
    topology, size = comm.traffic.topology, zero.zero_hpz_partition_size
    if size > 1:
        if comm.size % size:
            raise ConfigError(
                f"zero_optimization.zero_hpz_partition_size: found {size}, which does not divide {comm.size} ranks. "
                f"Expected {' or '.join(map(str, divisors(comm.size)))}, best the number of ranks on a node."
            )
        topology = Topology.even(comm.size, size)
    inside, across = build_hops(moves, topology)

    def quantizer(format: str, wanted: bool) -> Quantizer | None:
        return build_quantizer(format, own.quantization_block, comm.device) if wanted else None

    settings = TwoHopSettings(
        weights=quantizer(own.quantized_weights, zero.zero_quantized_weights),
        gradients=quantizer(own.quantized_gradients, zero.zero_quantized_gradients),
        keeps_secondary=size > 1,
        feeds_error_back=own.error_feedback,
        factor=factor,
    )
    return TwoHop(comm, inside, across, settings)


def comms_log_settings(block: CommsLoggerConfig, rank: int) -> CommsLogSettings:
    """What the configuration wants to see of the collectives; only rank 0 logs lines."""
    operations = frozenset(OPERATIONS if block.prof_all else block.prof_ops)
    unknown = sorted(operations - frozenset(OPERATIONS))
    if rank == 0 and (unknown or not operations):
        logger.warning(
            "comms_logger.prof_ops names %s: no collective is called so. Those of this engine are %s.",
            ", ".join(unknown) or "nothing",
            ", ".join(OPERATIONS),
        )
    return CommsLogSettings(operations, by_unit=block.debug, each=block.verbose and rank == 0)
