"""A Ray cluster of three node processes on this machine, for the tests: one line of JSON when it is up, its address and the
process of each node; it ends with its standard input.
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack

# Workers are no nicer than others: 15, Ray's own choice, starves them on a crowded machine, where helpers are slow, too.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_agent_register_timeout_ms": "300000"}

from ray._private.node import Node  # noqa: E402 (Ray reads the environment)
from ray._raylet import DASHBOARD_AGENT_LISTEN_PORT_NAME, persist_port  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

NODES = 3
PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def free_ports() -> dict[str, int]:
    """A port for each of a node's helpers."""
    with ExitStack() as held:
        sockets = {name: held.enter_context(socket.socket()) for name in PORTS}
        for one in sockets.values():
            one.bind(("", 0))
        return {name: one.getsockname()[1] for name, one in sockets.items()}


def without_waiting(start_raylet: Callable[..., None]) -> Callable[..., None]:
    """Ray's start of a node, which waits 15 s at most for its helpers' ports: too little beside other work. The one port
    that cannot be given is there before its helper (-1: none, as where only the core of Ray is installed).
    """

    def start(node: Node, *arguments: object, **options: object) -> None:
        persist_port(node._session_dir, node._node_id, DASHBOARD_AGENT_LISTEN_PORT_NAME, -1)
        start_raylet(node, *arguments, **options)

    return start


def node() -> dict[str, object]:
    """A small machine with room for one run."""
    size = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
    return {**size, "include_dashboard": False, "include_log_monitor": False, **free_ports()}


def main() -> None:
    """Start the nodes, say so, wait."""
    logging.disable()
    Node.start_raylet = without_waiting(Node.start_raylet)
    cluster = Cluster(initialize_head=True, head_node_args=node())
    nodes = [cluster.head_node, *(cluster.add_node(**node()) for _ in range(NODES - 1))]
    processes = [one.all_processes["raylet"][0].process.pid for one in nodes]
    print(json.dumps({"address": cluster.address, "nodes": processes}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
