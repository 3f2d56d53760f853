"""The web application of a worker: routes, headers, and the socket it listens on.

It listens on loopback unless told otherwise. The page may load nothing but what this worker serves,
and no other site may frame it, script it or read from it.
"""

from __future__ import annotations

import socket
from importlib import resources

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from reconciler.reconciler import Reconciler
from reconciler.web.access import Access, is_loopback
from reconciler.web.api import Api
from reconciler.web.errors import as_json
from reconciler.web.openapi import document
from reconciler.web.shapes import Health, Readiness
from reconciler.web.stream import Streams
from reconciler.web.view import FleetView
from store.errors import BadAddress
from store.logs import get_logger

log = get_logger("reconciler.web")

RECONCILER = web.AppKey("reconciler", Reconciler)
VIEW = web.AppKey("view", FleetView)

LARGEST_BODY = 16 * 1024
_SHUTDOWN_SECONDS = 2.0
_UNGUARDED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked by probes and collectors, under whatever name; they tell nothing that a page could misuse."""

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}


async def healthz(request: web.Request) -> web.Response:
    """The process runs its event loop."""
    return _json(Health("ok"))


async def readyz(request: web.Request) -> web.Response:
    """200 when it can be relied on; 503 with the reasons when not."""
    reasons = request.app[RECONCILER].unready()
    return _json(Readiness(not reasons, reasons), status=503 if reasons else 200)


async def metrics(request: web.Request) -> web.Response:
    """For Prometheus."""
    reconciler = request.app[RECONCILER]
    reconciler.observe()
    return web.Response(
        body=reconciler.metrics.page(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


def _json(value: msgspec.Struct, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


def page_files() -> dict[str, tuple[bytes, str]]:
    """The files of the page: name -> (content, content type). What is not in it is not served."""
    folder = resources.files("reconciler.web") / "page"
    return {
        file.name: (file.read_bytes(), _TYPES[file.name.rpartition(".")[2]])
        for file in folder.iterdir()
        if file.name.rpartition(".")[2] in _TYPES
    }


def application(reconciler: Reconciler, access: Access) -> web.Application:
    """The web application of one worker.

    Args:
        reconciler: opened.
        access: who may ask, and who may change.
    """

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in _UNGUARDED:
            access.check_host(request)
        if request.method not in {"GET", "HEAD", "OPTIONS"}:
            access.check_change(request)
        return await handler(request)

    async def with_headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update({k: v for k, v in _HEADERS.items() if k not in response.headers})

    app = web.Application(middlewares=[as_json, guarded], client_max_size=LARGEST_BODY)
    view = FleetView(reconciler.namespace, reconciler.policy)
    app[RECONCILER], app[VIEW] = reconciler, view
    operations = Api(reconciler, view, access).operations()
    described = msgspec.json.encode(document(operations))

    async def openapi(request: web.Request) -> web.Response:
        return web.Response(body=described, content_type="application/json")

    for one in operations:
        app.router.add_route("GET" if one.body is None else "POST", one.path, one.__call__)
    app.add_routes(
        [
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", metrics),
            web.get("/api/openapi.json", openapi),
            web.get("/api/stream", Streams(view).__call__, allow_head=False),
        ]
    )
    for name, (content, kind) in page_files().items():
        path = "/" if name == "index.html" else f"/{name}"
        app.router.add_get(path, _file(content, kind))
    app.on_response_prepare.append(with_headers)
    app.on_shutdown.append(_close)
    return app


def _file(content: bytes, kind: str) -> Handler:
    async def send(request: web.Request) -> web.Response:
        return web.Response(body=content, content_type=kind, charset="utf-8")

    return send


async def _close(app: web.Application) -> None:
    await app[VIEW].close()


async def serve(reconciler: Reconciler, access: Access) -> tuple[web.AppRunner, str]:
    """Begins to listen.

    Args:
        reconciler: opened.
        access: where, and for whom.

    Returns:
        The runner, to be cleaned up at the end, and the URL it listens at.

    Raises:
        BadAddress: the address cannot be listened on, or not without a token, or TLS cannot be had.
    """
    access.check()
    tls = access.tls()
    app = application(reconciler, access)
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, shutdown_timeout=_SHUTDOWN_SECONDS
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, access.host, access.port, ssl_context=tls).start()
    except (OSError, socket.gaierror) as error:
        await runner.cleanup()
        raise BadAddress(
            f"--http {access.host}:{access.port}: cannot listen there "
            f"({error.strerror}); give another port, or :0"
        ) from None
    if tls is None and not is_loopback(access.host):
        log.warning("the token travels in the clear: give --tls-cert and --tls-key, or use a proxy")
    bound = runner.addresses[0]
    host = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
    return runner, f"{'https' if tls else 'http'}://{host}:{bound[1]}"
