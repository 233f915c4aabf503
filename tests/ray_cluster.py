"""A Ray cluster of several nodes on this machine, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
each = dict(num_cpus=2, num_gpus=int(sys.argv[1]), object_store_memory=100 << 20)
for tries_left in (2, 1, 0):
    try:
        cluster = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False})
        other = cluster.add_node(**each)
        break
    except Exception:  # Ray gives a node 30 s to start, which a busy machine may take
        if not tries_left:
            raise
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "kill\\n":
        cluster.remove_node(other, allow_graceful=False)
    else:
        other = cluster.add_node(**each)
    print(line, end="", flush=True)
cluster.shutdown()
"""


class Nodes:
    """Two nodes of two processors each; one of them can be killed, and another added."""

    def __init__(self, stdin: IO[str], stdout: IO[str]) -> None:
        self._stdin, self._stdout = stdin, stdout
        self.address = stdout.readline().strip()
        assert self.address, "the cluster did not start"

    def do(self, word: str) -> None:
        """Kill the second node ("kill"), or start another one in its place ("add")."""
        self._stdin.write(f"{word}\n")
        self._stdin.flush()
        assert self._stdout.readline() == f"{word}\n"


@contextlib.contextmanager
def two_nodes(gpus: int = 0) -> Iterator[Nodes]:
    """The cluster, while the block runs.

    Args:
        gpus: That every node claims to have. Ray believes it; what looks for one itself finds none.
    """
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CLUSTER, str(gpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ours},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Nodes(process.stdin, process.stdout)
        process.stdin.close()
