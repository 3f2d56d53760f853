"""A small service with a host and a /metrics of its own, that takes instructions; see `tests.e2e.obey`.

It holds sessions, in a registry whose teardown and save can be told to fail, and it can be given work
that goes on by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from pathlib import Path

from adapters import Host
from tests.e2e.obey import obey


class Service:
    """What the instructions use.

    Attributes:
        sessions: are closed when they are idle.
        left: sessions nobody ever ends; the policy leaves them alone.
        hanging: their teardown never ends.
        unsaved: their recovery record cannot be saved.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.sessions = host.registry("session", teardown=lambda id, obj: None)
        self.left = host.registry("left", teardown=lambda id, obj: None)
        self.hanging = host.registry("hanging", teardown=_hang)
        self.unsaved = host.registry("unsaved", save=_disk_full)
        self._tasks: set[asyncio.Task[None]] = set()

    def _every(self, seconds: float, work: str) -> None:
        task = asyncio.create_task(self._repeat(seconds, work))
        self._tasks.add(task)

    async def _repeat(self, seconds: float, work: str) -> None:
        for number in itertools.count():
            getattr(self, f"_{work}")(number)
            await asyncio.sleep(seconds)

    def serve(self) -> None:
        """Sessions come, are used, and go when they are idle."""
        self._every(0.1, "one_session")

    def leak(self) -> None:
        """Sessions come and never go."""
        self._every(0.1, "one_left")

    def hide(self) -> None:
        """Sessions come behind the back of their registry."""
        self._every(0.3, "one_hidden")

    def _one_session(self, number: int) -> None:
        self.sessions[f"s{number}"] = object()
        with self.host.acquire(f"session/s{number}"):
            pass

    def _one_left(self, number: int) -> None:
        self.left[f"l{number}"] = object()

    def _one_hidden(self, number: int) -> None:
        dict.__setitem__(self.left, f"hidden{number}", object())


async def _hang(id: str, obj: object) -> None:
    await asyncio.Event().wait()


def _disk_full(id: str, obj: object) -> None:
    raise OSError(28, "No space left on device")


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("namespace")
    parser.add_argument("--lease", type=float, default=15.0)
    parser.add_argument("--limit", type=int, default=50_000)
    parser.add_argument("--spill", type=Path)
    options = parser.parse_args()
    async with Host.connect(
        options.url, name="svc", namespace=options.namespace, lease_seconds=options.lease,
        outbox_limit=options.limit, spill_dir=options.spill, partitions=4,
    ) as host:  # fmt: skip
        port = host.metrics.serve(0)
        service = Service(host)
        await obey({"process": host.process, "port": port}, host=host, service=service)


if __name__ == "__main__":
    asyncio.run(main())
