"""Real Redis Clusters and sentinels on loopback, for tests that take nodes away.

Every server is a process of ours, ended by its pid. Ports are asked for; a node of a cluster needs two,
its own and the one 10,000 above it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from store.embedded import find_server

_BUS = 10_000
_SLOTS = 16_384
_NODE_TIMEOUT_MS = 1500


def until(condition: Callable[[], Any], what: str, timeout: float = 30.0) -> Any:
    """Asks until the answer is true; a Redis that is away has not answered yet."""
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(redis.RedisError):
            if answer := condition():
                return answer
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.02)


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port(*, with_bus: bool = False) -> int:
    """A port nobody listens on; with the one 10,000 above it if asked."""
    for _ in range(1000):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if not with_bus or (port + _BUS < 65_536 and _can_bind(port + _BUS)):
            return port
    raise AssertionError("no free port")


class Server:
    """One redis-server (or sentinel) on a port of its own.

    Args:
        folder: its data and its log.
        options: as on its command line.
        config: a configuration file that it may write to; sentinels need one.
    """

    def __init__(self, folder: Path, *options: str, with_bus: bool = False) -> None:
        self.port = free_port(with_bus=with_bus)
        self.folder = folder / str(self.port)
        self.folder.mkdir(parents=True)
        self.options = list(options)
        self.config: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.client = redis.Redis(port=self.port, socket_timeout=2, decode_responses=True)

    def start(self) -> None:
        """Starts it and waits until it answers."""
        command = [str(find_server())]
        if self.config is not None:
            command += [str(self.config), "--sentinel"]
        else:
            command += ["--save", "", "--appendonly", "no"]
        command += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += [*self.options, "--logfile", str(self.folder / "log")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until(self.client.ping, f"the server on port {self.port} answers")

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Takes it away without a chance to say goodbye."""
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait(10)
        self.client.close()


class RedisCluster:
    """Three masters and three replicas."""

    def __init__(self, folder: Path) -> None:
        options = [
            *("--cluster-enabled", "yes", "--cluster-node-timeout", str(_NODE_TIMEOUT_MS)),
            *("--cluster-replica-validity-factor", "0"),
            *("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"),
        ]
        self.nodes = [Server(folder, *options, with_bus=True) for _ in range(6)]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def start(self) -> None:
        """Starts the nodes, makes them a cluster, and waits until it is whole."""
        for node in self.nodes:
            node.start()
        masters, replicas = self.nodes[:3], self.nodes[3:]
        for number, node in enumerate(masters):
            begin, end = number * _SLOTS // 3, (number + 1) * _SLOTS // 3
            node.client.execute_command("CLUSTER", "ADDSLOTS", *range(begin, end))
            node.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            node.client.execute_command("CLUSTER", "MEET", "127.0.0.1", masters[0].port)
        until(lambda: all(len(n.client.cluster("NODES")) == 6 for n in self.nodes), "all have met")
        for master, replica in zip(masters, replicas, strict=True):
            name = master.client.execute_command("CLUSTER", "MYID")
            until(lambda r=replica, n=name: r.client.execute_command("CLUSTER", "REPLICATE", n) == "OK",
                  "a replica knows its master")  # fmt: skip
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        """Every node agrees, and every master has a replica that is up to date."""
        until(self._whole, "the cluster is whole", 60)

    def _whole(self) -> bool:
        for node in self.nodes:
            if "cluster_state:ok" not in str(node.client.execute_command("CLUSTER", "INFO")):
                return False
            nodes = node.client.cluster("NODES").values()
            if sum("master" in n["flags"] for n in nodes) != 3 or any(
                "fail" in n["flags"] for n in nodes
            ):
                return False
            info = node.client.info("replication")
            if info["role"] == "slave":
                if info["master_link_status"] != "up":
                    return False
            elif info["connected_slaves"] != 1:
                return False
        return True

    def master_of(self, key: str) -> Server:
        """The node that has a key now."""
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                with contextlib.suppress(redis.RedisError):
                    if node.client.info("replication")["role"] == "master":
                        node.client.exists(key)
                        return node
        raise AssertionError(f"no node has {key}")

    def replica_of(self, master: Server) -> Server:
        """The replica of a node."""
        return next(
            n for n in self.nodes if n.client.info("replication").get("master_port") == master.port
        )

    def replica_leads(self, node: Server) -> bool:
        """The node was promoted."""
        return bool(node.client.info("replication")["role"] == "master")

    def flush(self) -> None:
        """Empties it."""
        for node in self.nodes:
            if node.client.info("replication")["role"] == "master":
                node.client.flushall()

    def mend(self) -> None:
        """Starts again what was killed, and waits until the cluster is whole."""
        for node in self.nodes:
            assert node.process is not None
            if node.process.poll() is not None:
                node.start()
        self.wait_until_whole()

    def stop(self) -> None:
        for node in self.nodes:
            node.kill()


class SentinelSetup:
    """A master, a replica, and three sentinels that watch them."""

    name = "agents"

    def __init__(self, folder: Path) -> None:
        fast = ("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")
        self.master = Server(folder, *fast)
        self.replica = Server(folder, "--replicaof", "127.0.0.1", str(self.master.port), *fast)
        self.sentinels = [Server(folder) for _ in range(3)]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.name}"

    def start(self) -> None:
        """Starts all five, and waits until the sentinels know each other and the replica."""
        self.master.start()
        self.replica.start()
        for sentinel in self.sentinels:
            sentinel.config = sentinel.folder / "sentinel.conf"
            sentinel.config.write_text(
                f"sentinel monitor {self.name} 127.0.0.1 {self.master.port} 2\n"
                f"sentinel down-after-milliseconds {self.name} 1000\n"
                f"sentinel failover-timeout {self.name} 5000\n"
            )
            sentinel.start()
        until(lambda: all(map(self._complete, self.sentinels)), "the sentinels know everybody")

    def _complete(self, sentinel: Server) -> bool:
        state = sentinel.client.sentinel_master(self.name)
        link = self.replica.client.info("replication")["master_link_status"]
        return (state["num-other-sentinels"], state["num-slaves"], link) == (2, 1, "up")

    def stop(self) -> None:
        for server in (*self.sentinels, self.replica, self.master):
            server.kill()


@contextlib.contextmanager
def running(made: RedisCluster | SentinelSetup) -> Iterator[Any]:
    """Started now, stopped at the end, also when the start fails."""
    try:
        made.start()
        yield made
    finally:
        made.stop()
