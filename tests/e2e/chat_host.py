"""The leaky chat service as a process that takes instructions: one JSON object a line.

`{"code": …, "values": …}` is run as the body of an async function, in the event loop of the service.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

from leaky_chat import ChatService, look_after

from adapters import Host


async def main(url: str, namespace: str) -> None:
    logging.getLogger("google_adk").setLevel(logging.ERROR)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    service = ChatService()
    kept: dict[str, Any] = {}
    async with Host.connect(url, name="chat", namespace=namespace, lease_seconds=3) as host:
        look_after(host, service)
        print(json.dumps({"process": host.process}), flush=True)
        while line := await reader.readline():
            order = json.loads(line)
            scope: dict[str, Any] = {
                "service": service,
                "host": host,
                "kept": kept,
                **order["values"],
            }
            source = "async def body():\n" + textwrap.indent(textwrap.dedent(order["code"]), "    ")
            try:
                exec(source, scope)
                answer: dict[str, Any] = {"result": await scope["body"]()}
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer, default=str), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
