"""Several namespaces side by side, each with a trouble of its own, and one that is well.

Every namespace has real workers and hosts as processes, and two scrape jobs: `agent-reconciler-NAME` for
its workers, `agent-hosts-NAME` for its hosts. Troubles that take long to be noticed begin when the fleet
is up, all together; the others when a test asks for them. Signals go to pids of our own processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from store.keys import Keys
from tests.e2e.programs import HostProgram, Program, eventually, http_of
from tests.monitoring.slow_link import SlowLink
from tests.support import RedisProcess, remove_folder, short_folder

POLICY = {
    "session_idle_timeout": 1, "idle_timeouts.hanging": 0.5, "idle_timeouts.unsaved": 0.5,
    "teardown_timeout": 1, "backoff": 0.2, "backoff_max": 1, "untracked": "report",
}  # fmt: skip


class Pulse:
    """Stops a process and lets it go on, again and again, until it is ended."""

    def __init__(self, pid: int, stopped: float, going: float) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(pid, stopped, going), daemon=True)
        self._thread.start()

    def _beat(self, pid: int, stopped: float, going: float) -> None:
        while not self._over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(stopped)
            os.kill(pid, signal.SIGCONT)
            self._over.wait(going)

    def end(self) -> None:
        self._over.set()
        self._thread.join()


class Fleet:
    """All of it. `jobs` says where Prometheus finds what."""

    def __init__(self, folder: Path, closing: contextlib.ExitStack) -> None:
        self._folder = folder
        self._closing = closing
        self.jobs: dict[str, list[str]] = {}
        self.redis = self._start_redis("main")
        self.doomed = self._start_redis("doomed")
        self.slow = self._start_redis("slow")
        self.link = SlowLink(self.redis.socket)
        closing.callback(self.link.close)
        client = redis.Redis(unix_socket_path=str(self.redis.socket))
        closing.callback(client.close)
        self.client = client
        url = self.redis.url
        self.old_entries("leaking")
        workers = {
            "healthy": [self._worker("healthy", url) for _ in range(2)],
            "leaking": [self._worker("leaking", url)],
            "doomed": [self._worker("doomed", self.doomed.url)],
            "shaken": [self._worker("shaken", url, "--lease", "1") for _ in range(2)],
            "remote": [self._worker("remote", self.link.url) for _ in range(2)],
        }
        for some in workers.values():
            for one in some:
                eventually(lambda one=one: _started(one), "a worker starts", 60)
        self.workers = workers
        self.hosts = {
            "healthy": [self._host("healthy", url)],
            "leaking": [self._host("leaking", url)],
            "doomed": [
                self._host("doomed", self.doomed.url, "--limit", "2000", "--spill", str(folder / "spill")),
                self._host("doomed", self.doomed.url, "--limit", "50"),
            ],
            "shaken": [self._host("shaken", url, "--lease", "2")],
            "remote": [self._host("remote", url)],
            "slow": [self._host("slow", self.slow.url)],
        }  # fmt: skip
        for name, some in workers.items():
            self.jobs[f"agent-reconciler-{name}"] = [
                http_of(one).partition("//")[2] for one in some
            ]
        for name, hosts in self.hosts.items():
            self.jobs[f"agent-hosts-{name}"] = [f"127.0.0.1:{h.greeting['port']}" for h in hosts]
        for name in ("healthy", "leaking", "doomed", "shaken", "remote", "slow"):
            for host in self.hosts[name]:
                host.do("service.serve()")

    def _start_redis(self, name: str) -> RedisProcess:
        folder = short_folder()
        server = RedisProcess(folder)
        server.start()
        self._closing.callback(remove_folder, folder)
        self._closing.callback(server.kill)
        return server

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}-{len(list(self._folder.iterdir()))}.log"

    def _worker(self, name: str, url: str, *options: str) -> Program:
        settings = [part for key, value in POLICY.items() for part in ("--set", f"{key}={value}")]
        command = [
            sys.executable, "-m", "tests.monitoring.fast_worker", "--url", url, "--namespace", name,
            "--http", "127.0.0.1:0", "--partitions", "4", *settings, *options,
        ]  # fmt: skip
        program = Program(command, self._log(f"worker-{name}"))
        self._closing.callback(_end, program)
        return program

    def _host(self, name: str, url: str, *options: str) -> HostProgram:
        log = self._log(f"host-{name}")
        host = HostProgram(url, log, name, *options, module="tests.monitoring.service")
        self._closing.callback(_end, host)
        return host

    # --- troubles ---------------------------------------------------------------------------------

    def old_entries(self, namespace: str) -> None:
        """The log begins two hours ago: as if nothing had been archived, or put into a snapshot, since."""
        ms = int((time.time() - 7200) * 1000)
        for partition in range(4):
            for n in range(2):
                key = Keys(namespace).partition(partition).log
                self.client.xadd(key, {"x": "not an event"}, id=f"{ms}-{n + 1}")

    def leak(self) -> None:
        """A service that leaks in every way, and an archive and snapshots that cannot be written."""
        (host,) = self.hosts["leaking"]
        host.do("service.leak(); service.hide()")
        host.do("service.hanging['h'] = object(); service.unsaved['u'] = object()")
        for partition in range(4):
            # Somebody overwrote the keys of the snapshots; and the archive is no folder.
            keys = Keys("leaking").partition(partition)
            self.client.set(keys.snapshots, "something else")
            self.client.xadd(keys.log, {"e": '{"type": "created"'})
        blocked = self._folder / "archive"
        blocked.write_text("a file where a folder should be")
        retention = f'{{"archive":"{blocked}","keep_seconds":60}}'
        self.client.hset(Keys("leaking").meta, "retention", retention)

    def take_redis_away(self) -> None:
        """Redis is killed under two hosts that go on; one has a spill file, one has no room."""
        self.doomed.kill()
        for host in self.hosts["doomed"]:
            host.do("for n in range(1800): host.record('created', f'thing/t{n}')")

    def stall_redis(self) -> None:
        """Redis stands still for most of the time, as with a disk that blocks it."""
        self._pulse(self.slow.pid, 0.5, 0.2)

    def delay(self) -> None:
        """What the workers of a namespace ask Redis takes a second to come back."""
        self.link.delay = 1.0

    def pause_host(self) -> None:
        """A host stands still for longer than its lease."""
        (host,) = self.hosts["shaken"]
        host.process.send_signal(signal.SIGSTOP)
        both = self.workers["shaken"]
        eventually(
            lambda: any("process lost" in one.logged for one in both),
            "the host is declared lost",
            60,
        )
        host.process.send_signal(signal.SIGCONT)

    def shake_worker(self) -> None:
        """A worker stands still again and again, each time for longer than its lease."""
        self._pulse(self.workers["shaken"][1].process.pid, 1.3, 0.9)

    def stop_worker(self) -> None:
        """One of two workers stands still, and its leases have not lapsed yet."""
        self.link.delay = 0.0
        self.workers["remote"][1].process.send_signal(signal.SIGSTOP)

    def kill_workers(self) -> None:
        """All workers of a namespace are gone."""
        for worker in self.workers["remote"]:
            worker.stop(signal.SIGKILL)

    def _pulse(self, pid: int, stopped: float, going: float) -> None:
        pulse = Pulse(pid, stopped, going)
        self._closing.callback(pulse.end)


def _started(program: Program) -> bool:
    assert program.process.poll() is None, program.logged[-2000:]
    return any(line["event"] == "worker started" for line in program.log_lines())


def _end(program: Any) -> None:
    if program.process.poll() is None:
        program.stop(signal.SIGKILL)


@contextlib.contextmanager
def fleet(folder: Path) -> Iterator[Fleet]:
    """The fleet, ended at the end, also when its start fails."""
    with contextlib.ExitStack() as closing:
        yield Fleet(folder, closing)
