"""What tests share: waiting with a deadline, a Redis that can be killed, and short ways to say things.

Nothing here stands in for a part of the product. `RedisProcess` exists to take Redis away on purpose.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store import EventLog, LifecycleEvent, LogEntry
from store.embedded import find_server, version_of
from store.event import NO_DIGEST, EventRow, chain, decode_row, split_digest


async def eventually(
    condition: Callable[[], Any], timeout: float = 5.0, what: str | None = None
) -> Any:
    """Polls `condition` (plain or async) until it is truthy, and returns its value.

    Raises:
        AssertionError: it was not, within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(
                f"not within {timeout:g} s: {what or inspect.getsource(condition)}"
            )
        await asyncio.sleep(0.005)


def event(seq: int, type: str = "created", ref: str = "session/s", **more: Any) -> LifecycleEvent:
    """An event of process `p`, unless told otherwise."""
    return LifecycleEvent(**{"type": type, "ref": ref, "process": "p", "seq": seq, **more})


def row(seq: int, type: str = "created", ref: str = "session/s", **more: Any) -> EventRow:
    """The same as `event`, in the shape of the hot paths."""
    return EventRow(**{"type": type, "ref": ref, "process": "p", "seq": seq, **more})


def batch(first: int, last: int, process: str = "p") -> list[LifecycleEvent]:
    """Events `first` to `last` of a process, each about a session of its own."""
    return [event(n, ref=f"session/s{n}", process=process) for n in range(first, last + 1)]


async def entries_of(log: EventLog, **options: Any) -> list[LogEntry]:
    """All that `log.read` gives."""
    return [entry async for entry in log.read(**options)]


async def whole(log: EventLog, process: str) -> int:
    """The last seq of a process in the log, after checking that the log has every event of it once, in
    order, each chained to the one before."""
    namespace = await log.namespace()
    digest, last = NO_DIGEST, 0
    raw = await log._store.redis.xrange(namespace.partition_keys(process).log)
    for _, fields in raw:
        found = decode_row(fields[1])
        if found.process != process:
            continue
        assert found.seq == last + 1, f"seq {found.seq} after {last}"
        body, told = split_digest(fields[1])
        digest = chain(digest, body)
        assert told == digest, f"the chain is broken at seq {found.seq}"
        last = found.seq
    return last


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def waiting(recorder: Any) -> list[EventRow]:
    """What a recorder noted that was not taken to be sent yet, in order."""
    digest = b',"digest":"' + b"0" * 32 + b'"}'
    return [decode_row(body[:-1] + digest) for body in recorder.outbox._fresh]


async def story(log: EventLog, process: str | None = None) -> list[tuple[str, str]]:
    """(type, ref) of all events, in order, without those about the process itself."""
    return [
        (str(entry.event.type), entry.event.ref)
        async for entry in log.read(process=process)
        if not entry.event.ref.startswith("process/")
    ]


class RedisProcess:
    """A redis-server of one's own, on a unix socket, with its data kept: to be killed and restarted."""

    def __init__(self, folder: Path, *options: str, binary: Path | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self._binary = binary or find_server()
        self.folder = folder
        self.socket = folder / "r.sock"
        self.url = f"unix://{self.socket}"
        self._options = options or ("--port", "0")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self._process = subprocess.Popen(
            [
                str(self._binary), "--unixsocket", str(self.socket),
                "--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always",
                "--save", "", *self._options,
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 10
        while not answers(self.socket):
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.01)

    def kill(self) -> None:
        """Kills it without a chance to say goodbye."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=10)


def server_with_waitaof() -> Path:
    """A server of 7.2 or newer on PATH, Redis or Valkey; the test is skipped where there is none."""
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path and (version_of(Path(path)) or (0,)) >= (7, 2):
            return Path(path)
    pytest.skip(
        "no server of 7.2 or newer on PATH (redis-server, valkey-server): WAITAOF is not tested"
    )


def answers(path: Path) -> bool:
    """Something answers like Redis on this socket."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1)
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def short_folder() -> Path:
    """A new folder whose path is short enough for a unix socket."""
    return Path(tempfile.mkdtemp(prefix="ar-"))


def remove_folder(folder: Path) -> None:
    """Removes a folder of `short_folder`."""
    shutil.rmtree(folder, ignore_errors=True)


def log_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What was logged: the event of each line, and its fields."""
    return [
        {"event": record.getMessage(), **vars(record).get("fields", {})}
        for record in caplog.records
    ]
