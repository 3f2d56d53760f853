"""The worker's HTTP side: is it alive, can it be relied on, and what has it counted.

It listens on loopback unless told otherwise, and only answers questions; nothing can be changed
through it.
"""

from __future__ import annotations

from aiohttp import web

from reconciler.reconciler import Reconciler
from store.errors import BadAddress

RECONCILER = web.AppKey("reconciler", Reconciler)


async def healthz(request: web.Request) -> web.Response:
    """The process runs its event loop."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """200 when it can be relied on; 503 with the reasons when not."""
    reasons = request.app[RECONCILER].unready()
    body = {"ready": not reasons, "reasons": reasons}
    return web.json_response(body, status=503 if reasons else 200)


async def metrics(request: web.Request) -> web.Response:
    """For Prometheus."""
    reconciler = request.app[RECONCILER]
    reconciler.metrics.observe_state(reconciler.tail.state, reconciler.summaries())
    reconciler.metrics.observe_drift(reconciler.drift_found.values())
    return web.Response(
        body=reconciler.metrics.page(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


def application(reconciler: Reconciler) -> web.Application:
    """The web application of one worker."""
    app = web.Application()
    app[RECONCILER] = reconciler
    app.add_routes(
        [web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)]
    )
    return app


def parse_address(address: str) -> tuple[str, int]:
    """`host:port`, `:port` (loopback) or `[v6]:port` -> (host, port); port 0 takes a free one.

    Raises:
        BadAddress: it is none of these.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise BadAddress(f"--http {address!r} is not host:port, for example 127.0.0.1:9464")
    return host.strip("[]") or "127.0.0.1", int(port)


async def serve(reconciler: Reconciler, address: str) -> tuple[web.AppRunner, str]:
    """Begins to listen.

    Returns:
        The runner, to be cleaned up at the end, and the URL it listens at.

    Raises:
        BadAddress: the address cannot be listened on.
    """
    host, port = parse_address(address)
    runner = web.AppRunner(application(reconciler), access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise BadAddress(
            f"--http {address}: cannot listen there ({error.strerror}); give another port, or :0"
        ) from None
    bound = runner.addresses[0]
    return runner, f"http://{bound[0]}:{bound[1]}"
