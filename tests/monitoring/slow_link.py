"""A slow network between a program and Redis: passes bytes on, answers as late as it is told to.

It runs in a thread with an event loop of its own, and listens on a port of loopback.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path


class SlowLink:
    """A link to a Redis on a unix socket.

    Attributes:
        delay: seconds that each answer takes longer.
        url: of this end.
    """

    def __init__(self, socket: Path) -> None:
        self.delay = 0.0
        self._socket = socket
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        )
        port = starting.result(10).sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        near, far = await asyncio.open_unix_connection(str(self._socket))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, far, slow=False))
                group.create_task(self._pass(near, writer, slow=True))
        except* ConnectionError:
            pass
        finally:
            far.close()
            writer.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, slow: bool
    ) -> None:
        while data := await reader.read(65536):
            if slow and self.delay:
                await asyncio.sleep(self.delay)
            writer.write(data)
            await writer.drain()
        raise ConnectionError("one side has ended")

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
