"""The instructions that a host program of the tests takes: one JSON object a line.

`{"code": …, "values": …}` is run as the body of an async function, in the event loop of the service; the
answer is `{"result": …}` or `{"error": …}`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap
import traceback
from typing import Any


async def obey(greeting: dict[str, Any], **within: Any) -> None:
    """Greets, then carries out instructions until standard input ends.

    Args:
        greeting: said first.
        within: what the code of an instruction can use, besides its own values.
    """
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    print(json.dumps(greeting), flush=True)
    while line := await reader.readline():
        order = json.loads(line)
        scope: dict[str, Any] = {**within, **order["values"]}
        source = "async def body():\n" + textwrap.indent(textwrap.dedent(order["code"]), "    ")
        try:
            exec(source, scope)
            answer: dict[str, Any] = {"result": await scope["body"]()}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer, default=str), flush=True)
