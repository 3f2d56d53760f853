"""The leaky chat of leaky_chat.py over HTTP, as the container `chat` of compose.yaml runs it.

A service with the adapter in it: the host begins with the server and ends with it, a request acquires
the chat it is about, and the probes ask /healthz and /readyz. Ready means that it can answer chats:
Redis may be away, then events wait in the host and the chats go on.

    python examples/chat_server.py --url redis://127.0.0.1:6379 --rate 2
    curl -d '{"user": "ada", "topic": "chess"}' http://127.0.0.1:8000/chats
    curl -d '{"text": "e4"}' http://127.0.0.1:8000/chats/ID
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web
from leaky_chat import TOPICS, ChatService, look_after
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from adapters import Host
from store import ReconcilerError
from store.errors import NotAlive

SERVICE = web.AppKey("service", ChatService)
HOST = web.AppKey("host", Host)
_LARGEST_BODY = 16 * 1024


async def open_chat(request: web.Request) -> web.Response:
    """`{"user": …, "topic": …}` begins a chat."""
    body = await _body(request, "user", "topic")
    if body["topic"] not in TOPICS:
        raise _refused(400, f"topic: choose of {', '.join(TOPICS)}")
    chat = await request.app[SERVICE].open_chat(body["user"], body["topic"])
    return web.json_response({"chat": chat}, status=201)


async def say(request: web.Request) -> web.Response:
    """`{"text": …}` says something in a chat; the answer is the agent's."""
    body = await _body(request, "text")
    chat = request.match_info["chat"]
    try:
        async with request.app[HOST].acquire(f"session/{chat}"):
            answer = await request.app[SERVICE].send(chat, body["text"])
    except (NotAlive, KeyError):  # Ended, or its runner was restarted away from under it.
        raise _refused(404, f"there is no chat {chat}: it has ended, begin another") from None
    return web.json_response({"answer": answer})


async def _body(request: web.Request, *names: str) -> dict[str, str]:
    try:
        body = await request.json()
    except ValueError:
        raise _refused(400, "the body is not JSON") from None
    if not isinstance(body, dict) or any(not isinstance(body.get(name), str) for name in names):
        raise _refused(400, f"the body needs the texts {', '.join(names)}")
    return body


def _refused(status: int, message: str) -> web.HTTPException:
    kind = {400: web.HTTPBadRequest, 404: web.HTTPNotFound}[status]
    return kind(text=json.dumps({"message": message}), content_type="application/json")


async def healthz(request: web.Request) -> web.Response:
    """The event loop turns."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Chats can be answered."""
    host, service = request.app[HOST], request.app[SERVICE]
    return web.json_response({"ready": True, "process": host.process, "chats": len(service.chats)})


async def metrics(request: web.Request) -> web.Response:
    """What the host counts, and the memory and descriptors of the process, for Prometheus."""
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def talk(service: ChatService, rate: float) -> None:
    """Users who open chats and do not come back, `rate` a second, so that there is something to see."""
    chance = random.Random(1)
    while True:
        await asyncio.sleep(1 / rate)
        topic = chance.choice(TOPICS)
        chat = await service.open_chat(f"user-{chance.randrange(40)}", topic)
        await service.send(chat, f"something about {topic}")
        if chance.random() < 0.02:
            service.restart_agent(topic)


def application(options: argparse.Namespace) -> web.Application:
    """The server; its host begins and ends with it."""
    service = ChatService()

    async def looked_after(app: web.Application) -> AsyncIterator[None]:
        async with Host.connect(
            options.url, name="leaky-chat", namespace=options.namespace, spill_dir=options.spill_dir
        ) as host:
            look_after(host, service)
            host.metrics.register()
            app[HOST] = host
            talking = asyncio.create_task(talk(service, options.rate)) if options.rate else None
            yield
            if talking is not None:
                talking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await talking

    app = web.Application(client_max_size=_LARGEST_BODY)
    app[SERVICE] = service
    app.cleanup_ctx.append(looked_after)
    app.add_routes(
        [
            web.post("/chats", open_chat),
            web.post("/chats/{chat}", say),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", metrics),
        ]
    )
    return app


def main() -> Any:
    parser = argparse.ArgumentParser(description="A chat service that leaks, over HTTP.")
    default = os.environ.get("AGENT_RECONCILER_URL", "redis://127.0.0.1:6379")
    parser.add_argument("--url", default=default)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--http", default="127.0.0.1:8000", help="host:port to listen on")
    parser.add_argument(
        "--rate", type=float, default=0, help="chats that it opens by itself, a second"
    )
    parser.add_argument("--spill-dir", help="where events wait while Redis is away for long")
    options = parser.parse_args()
    host, _, port = options.http.rpartition(":")
    if not host or not port.isdigit():
        parser.error(f"--http {options.http!r} is not host:port")
    logging.getLogger("google_adk").setLevel(logging.ERROR)
    try:
        web.run_app(application(options), host=host, port=int(port), print=None, access_log=None)
    except (ReconcilerError, OSError) as error:
        print(f"chat_server: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
