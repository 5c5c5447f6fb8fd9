"""The transport that a configuration asks for: what moves bytes, in one hop or in two, and what is said of it."""

from __future__ import annotations

import logging

from shardwise.comm.averaging import Averaging, average_by
from shardwise.comm.base import CollectiveId, Communicator
from shardwise.comm.choose import build_communicator, build_hops
from shardwise.comm.logged import OPERATIONS, CommsLogSettings, Logged
from shardwise.comm.two_hop import TwoHop, TwoHopSettings
from shardwise.config import EngineConfig
from shardwise.config.tools import CommsLoggerConfig
from shardwise.errors import ConfigError
from shardwise.mesh import Mesh, local_rank
from shardwise.quantize import Quantizer, build_quantizer
from shardwise.topology import Topology, divisors
from shardwise.zero.offload import Offload, Place

logger = logging.getLogger(__name__)


def connect(mesh: Mesh, config: EngineConfig, offload: Offload) -> Communicator:
    """The transport that the configuration asks for. Collective."""
    zero = config.zero_optimization
    transport = config.shardwise.transport
    if offload.parameter is not Place.DEVICE:
        if transport == "shared_memory":
            raise ConfigError(
                "transport 'shared_memory' reads the other ranks' shards in their memory, and offload_param keeps them "
                "elsewhere. Use transport 'process_group' or 'auto'."
            )
        transport = "process_group"
    if uses_two_hops(config):
        transport = "process_group"
    moves = comm = build_communicator(
        mesh,
        transport,
        config.shardwise.reduction,
        reduce_scatter=zero.reduce_scatter,
        allgather_partitions=zero.allgather_partitions,
        reduce_bucket_numel=zero.reduce_bucket_size,
        gather_bucket_numel=zero.allgather_bucket_size,
    )
    averaging = Averaging.of_settings(
        comm.size,
        prescale=config.prescale_gradients,
        predivide_factor=config.gradient_predivide_factor,
        is_mean=config.gradient_allreduce_op == "mean",
    )
    comm = average_by(comm, averaging)
    comm.traffic.topology = find_topology(comm, config.shardwise.simulated_nodes)
    if uses_two_hops(config) and comm.size > 1:
        comm = in_two_hops(comm, moves, config, averaging.before * averaging.after)
    if config.comms_logger.enabled and comm.size > 1:
        comm = Logged(comm, mesh.dp_shard.name, comms_log_settings(config.comms_logger, comm.rank))
    comm.check = config.shardwise.check_collectives
    return comm


def uses_two_hops(config: EngineConfig) -> bool:
    """Whether ZeRO++ is asked for."""
    zero = config.zero_optimization
    return zero.zero_quantized_weights or zero.zero_quantized_gradients or zero.zero_hpz_partition_size > 1


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
    mine = str(local_rank(comm.rank)).encode()
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
