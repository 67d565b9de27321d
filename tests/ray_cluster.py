"""A Ray cluster of three node processes on this machine, for the tests: one line of JSON when it is up, its address and the
process of each node; it ends with its standard input.
"""

import json
import logging
import os
import socket
import sys
from contextlib import ExitStack

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # 15, Ray's own, starves beside other work

from ray.cluster_utils import Cluster  # noqa: E402 (reads the environment)

NODES = 3
PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def free_ports() -> dict[str, int]:
    """A port for each of a node's helpers: a node that chooses them itself waits for the helpers, 15 s at most."""
    with ExitStack() as held:
        sockets = {name: held.enter_context(socket.socket()) for name in PORTS}
        for one in sockets.values():
            one.bind(("", 0))
        return {name: one.getsockname()[1] for name, one in sockets.items()}


def node() -> dict[str, object]:
    """A small machine with room for one run."""
    size = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
    return {**size, "include_dashboard": False, "include_log_monitor": False, **free_ports()}


def main() -> None:
    """Start the nodes, say so, wait."""
    logging.disable()
    cluster = Cluster(initialize_head=True, head_node_args=node())
    nodes = [cluster.head_node, *(cluster.add_node(**node()) for _ in range(NODES - 1))]
    processes = [one.all_processes["raylet"][0].process.pid for one in nodes]
    print(json.dumps({"address": cluster.address, "nodes": processes}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
