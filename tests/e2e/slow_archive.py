"""Archives a namespace, stops at one place, says so and waits to be killed.

python -m tests.e2e.slow_archive URL NAMESPACE FOLDER data|index|record|trim
"""

from __future__ import annotations

import asyncio
import importlib
import signal
import sys
from typing import Any, NoReturn

import reconciler.history
from store.archive import Archive

# The command stands under the name of its module in the package.
command = importlib.import_module("reconciler.cli.archive")


def stop_here(*_: Any) -> NoReturn:
    print("now", flush=True)
    while True:
        signal.pause()


def main(url: str, namespace: str, folder: str, place: str) -> None:
    put = Archive._put

    def stopping_put(self: Archive, where: str, name: str, data: bytes, epoch: int) -> None:
        if (place, name[-8:]) in {("data", "jsonl.gz"), ("index", "dex.json")}:
            self._fs.mv = stop_here
            put(self, where, name, data[: len(data) // 2], epoch)
        put(self, where, name, data, epoch)

    async def stopping(*_: Any, **__: Any) -> None:
        stop_here()

    Archive._put = stopping_put  # type: ignore[method-assign]
    if place == "record":
        reconciler.history.record_archived = stopping
    if place == "trim":
        reconciler.history.trim = stopping  # type: ignore[assignment]
    command._LEASE_MS = 500  # type: ignore[attr-defined]
    asyncio.run(command._archive(url, namespace, folder, 0))


if __name__ == "__main__":
    main(*sys.argv[1:])
