"""A host under load, as a process to be killed: says after each turn which event Redis acknowledged.

python -m tests.adapters.loaded_host URL NAMESPACE SPILL_DIR EVENTS_A_SECOND [FILE_SIZE_LIMIT]
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys

from adapters import Host


async def main(url: str, namespace: str, spill_dir: str, rate: int) -> None:
    async with Host.connect(
        url,
        name="loaded",
        namespace=namespace,
        lease_seconds=2,
        spill_dir=spill_dir,
        outbox_limit=2000,
    ) as host:
        sessions = host.registry("session")
        for number in range(10):
            sessions[f"s{number}"] = object()
        while True:
            for _ in range(rate // 100):
                host.record("reused", f"session/s{host.recorder.seq % 10}")
            outbox = host.recorder.outbox
            line = {
                "process": host.process, "acknowledged": outbox.acknowledged,
                "recorded": host.recorder.seq, "spilled": outbox.spilled, "dropped": outbox.dropped,
            }  # fmt: skip
            print(json.dumps(line), flush=True)
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    if len(sys.argv) > 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]), resource.RLIM_INFINITY))
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
