"""Server-sent events: a line to each open page whenever something changed.

The line says that there is something new, and the totals; what exactly, the page asks for. So every
client gets the same few bytes, a slow one skips what it missed, and nothing is queued for anybody.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
from aiohttp import web

from reconciler.web.errors import ApiError
from reconciler.web.view import FleetView

STREAMS = 200
"""Streams that may be open at once. Each costs a socket and a task."""
BEAT_SECONDS = 10.0
WRITE_SECONDS = 10.0


class Tick(msgspec.Struct):
    """One update.

    Attributes:
        version: of the fleet.
        epoch: of the timeline.
        timeline: number of the last change of a lifetime.
        now_ms: Redis time.
        drift: differences, in all.
        trouble: why the view is not up to date; empty when it is.
    """

    version: int
    epoch: str
    timeline: int
    now_ms: int
    drift: int
    trouble: str


class Streams:
    """The open streams of one worker."""

    def __init__(self, view: FleetView, limit: int = STREAMS) -> None:
        self._view = view
        self._limit = limit

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        """One stream, until the client goes, stops reading, or the worker ends."""
        view = self._view
        if view.watchers >= self._limit:
            raise ApiError(
                503, "too_many_streams",
                f"{self._limit} event streams are open already, which is the limit; close one, or ask "
                "/api/fleet from time to time instead",
                headers={"Retry-After": "15", "Connection": "close"},
            )  # fmt: skip
        with view.watching():
            await view.look()
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream; charset=utf-8"}
            )
            await response.prepare(request)
            version = -1
            with contextlib.suppress(ConnectionError, TimeoutError):
                await self._write(response, b"retry: 2000\n\n")
                while not view.closing:
                    if await view.changed(version, BEAT_SECONDS):
                        version = view.version
                        await self._write(response, self._tick())
                    else:
                        await self._write(response, b": still here\n\n")
                        # Opens the view again, should it have failed.
                        with contextlib.suppress(ApiError):
                            await view.look()
            return response

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        async with asyncio.timeout(WRITE_SECONDS):
            await response.write(data)

    def _tick(self) -> bytes:
        view, fleet = self._view, self._view.fleet
        tick = Tick(
            version=view.version,
            epoch=view.epoch,
            timeline=view.lifetimes.version,
            now_ms=fleet.now_ms if fleet is not None else 0,
            drift=sum(1 for _ in fleet.drift) if fleet is not None else 0,
            trouble=view.trouble,
        )
        return b"event: tick\ndata: %b\n\n" % msgspec.json.encode(tick)
