"""Which commands and keys each user of Redis really used, as Redis itself tells (MONITOR).

The calls of a script are told as `lua`, after the call of the script; they count as its caller's.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field

import redis

_LINE = re.compile(rb"^\+[\d.]+ \[\d+ (?P<who>[^\]]+)\] (?P<words>.*)$")
_WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_KEY = re.compile(r"^ar:\{([^}]*)\}:(.*)$")


@dataclass
class Usage:
    """What users did.

    Attributes:
        commands: user -> commands, `client|setname` with their second word where they have one.
        keys: user -> keys, by kind: `log`, `inventory:*`, `adk`.
    """

    commands: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    keys: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


class Watch:
    """Listens to a Redis until it is closed.

    Args:
        port: of the server.
        user, password: who may listen, and look up who is connected from where.
    """

    def __init__(self, port: int, user: str, password: str) -> None:
        self.usage = Usage()
        self._asking = redis.Redis(port=port, username=user, password=password)
        self._users: dict[str, str] = {}
        self._raw: list[tuple[str, list[str]]] = []
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(f"AUTH {user} {password}\r\nMONITOR\r\n".encode())
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._listen), threading.Thread(target=self._look)]
        for thread in self._threads:
            thread.start()

    def _look(self) -> None:
        while not self._stop.is_set():
            for one in self._asking.client_list():
                if one.get("user") not in {None, "default"}:
                    self._users[one["addr"]] = one["user"]
            time.sleep(0.005)

    def _listen(self) -> None:
        buffer, caller = b"", ""
        self._socket.settimeout(0.2)
        while not self._stop.is_set():
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            if not data:
                break
            buffer += data
            *lines, buffer = buffer.split(b"\r\n")
            for line in lines:
                if (found := _LINE.match(line)) is None:
                    continue
                who = found["who"].decode()
                words = [w.decode(errors="replace") for w in _WORD.findall(found["words"])]
                if who != "lua":
                    caller = who
                self._raw.append((caller, words))

    def close(self) -> Usage:
        """Ends listening; what was seen."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._socket.close()
        self._asking.close()
        for caller, words in self._raw:
            user = self._users.get(caller, "?")
            name = words[0].lower()
            if name in {"client", "config", "acl"} and len(words) > 1:
                name = f"{name}|{words[1].lower()}"
            self.usage.commands[user].add(name)
            for word in words[1:]:
                if found := _KEY.match(word):
                    self.usage.keys[user].add(_kind(found[1], found[2]))
        return self.usage


def _kind(tag: str, name: str) -> str:
    if "/adk/" in tag:
        return "adk"
    head, colon, _ = name.partition(":")
    return f"{head}:*" if colon else head
