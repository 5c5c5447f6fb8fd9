"""Strings of the configuration become a transport, once."""

from __future__ import annotations

from shardwise.comm.base import Buckets, Communicator
from shardwise.comm.hops import Hop
from shardwise.comm.process_group import AllReduceNative, Native, OrderedMessages, OrderedNative
from shardwise.comm.shared_memory import SharedMemory
from shardwise.comm.single import SingleRank
from shardwise.errors import ConfigError
from shardwise.mesh import Axis, Mesh
from shardwise.topology import Topology


def build_hops(comm: Communicator, topology: Topology) -> tuple[Hop, Hop]:
    """The two ways of a two-hop collective: inside the nodes of ``topology``, and across them. Collective.

    Args:
        comm: moves what the hops carry.
        topology: of the axis of ``comm``.

    Raises:
        ConfigError: ``comm`` is not from messages or a backend, or the nodes differ in size.
    """
    if not isinstance(comm, OrderedMessages | Native):
        raise ConfigError("collectives in two hops need transport 'process_group' and more than one rank.")
    if topology.ranks_per_node is None:
        sizes = [topology.node_of.count(node) for node in range(topology.num_nodes)]
        raise ConfigError(
            f"nodes have {', '.join(map(str, sizes))} ranks: collectives in two hops need as many on each. Start the "
            "same number of processes on every node."
        )
    inside = sorted({topology.inside(rank) for rank in range(topology.world)})
    across = sorted({topology.across(rank) for rank in range(topology.world)})
    return comm.hop(inside), comm.hop(across)


def build_communicator(
    mesh: Mesh,
    transport: str = "auto",
    reduction: str = "auto",
    *,
    reduce_scatter: bool = True,
    allgather_partitions: bool = True,
    reduce_bucket_numel: int = 500_000_000,
    gather_bucket_numel: int = 500_000_000,
    axis: Axis | None = None,
) -> Communicator:
    """The transport of one axis. Collective: all ranks choose alike.

    Args:
        mesh: device and ranks.
        transport: "shared_memory" (CPU ranks on one Linux host), "process_group", or "auto": the first that works.
        reduction: "ordered" (sums in rank order, the same bits at every stage), "native" (the backend's order), or
            "auto": ordered on the CPU, where it is also the faster one; native on GPUs.
        reduce_scatter: False averages gradients by all-reduce, as DeepSpeed's key of that name asks.
        allgather_partitions: False lets the backend's collectives publish by one broadcast an owner; transports that
            fetch from each owner anyway do so in both cases.
        reduce_bucket_numel: elements that are reduced at a time at most.
        gather_bucket_numel: elements of stepped parameters that are gathered at a time at most.
        axis: of ``mesh``; None: ``mesh.dp_shard``.

    Raises:
        ConfigError: what is asked for cannot be had here.
    """
    axis = axis or mesh.dp_shard
    buckets = Buckets(reduce_bucket_numel, gather_bucket_numel)
    if axis.size == 1:
        return SingleRank(axis, mesh.device)
    on_cpu = mesh.device.type == "cpu"
    native = reduction == "native" or (reduction == "auto" and not on_cpu) or not reduce_scatter
    if transport == "shared_memory" and (native or not on_cpu):
        raise ConfigError(
            "transport 'shared_memory' is for CPU ranks and sums in rank order; a GPU, reduction 'native' and "
            "reduce_scatter false need transport 'process_group'."
        )
    if not reduce_scatter:
        if reduction == "ordered":
            raise ConfigError("reduction 'ordered' is a reduce-scatter: set reduce_scatter to true, or drop 'ordered'.")
        return AllReduceNative(axis, mesh.device, buckets, not allgather_partitions)
    if native:
        return Native(axis, mesh.device, buckets, not allgather_partitions)
    if not on_cpu:
        return OrderedNative(axis, mesh.device, buckets, not allgather_partitions)
    if transport != "process_group":
        shared = SharedMemory.connect(axis, buckets)
        if shared is not None:
            return shared
        if transport == "shared_memory":
            raise ConfigError(
                "transport 'shared_memory' needs all ranks on one Linux host that lets them open each other's memory "
                "files; here one of them cannot. Use transport 'process_group' or 'auto'."
            )
    return OrderedMessages(axis, buckets)
