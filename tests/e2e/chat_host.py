"""The leaky chat service as a process that takes instructions; see `tests.e2e.obey`."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

from leaky_chat import ChatService, look_after

from adapters import Host
from tests.e2e.obey import obey


async def main(url: str, namespace: str) -> None:
    logging.getLogger("google_adk").setLevel(logging.ERROR)
    service = ChatService()
    async with Host.connect(url, name="chat", namespace=namespace, lease_seconds=3) as host:
        look_after(host, service)
        await obey({"process": host.process}, service=service, host=host, kept={})


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
