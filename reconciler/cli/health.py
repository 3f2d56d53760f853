"""`agent-reconciler health`: asks a worker, or any service with a /readyz, whether it can be relied on.

For health checks of containers, where nothing but this program is installed. It opens no connection to
Redis: what is asked about is the process at that address.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import click

from reconciler.cli.output import console, emit
from store.errors import ReconcilerError

_LARGEST_ANSWER = 64 * 1024


@click.command(short_help="Ask a worker whether it is ready.")
@click.argument("address", default="http://127.0.0.1:9464")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=3.0,
    show_default=True,
    help="Seconds to wait for the answer.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Do not check the certificate: for the address of this machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def health(address: str, timeout: float, insecure: bool, as_json: bool) -> int:
    """Ask the process at ADDRESS whether it is ready; a path other than /readyz may be given.

    Status 0: it is; 1: it is not, for the reasons that it tells; 2: nobody answers there.
    """
    status, answer = _ask(address, timeout, insecure)
    reasons = answer.get("reasons") or ([] if status < 400 else [f"it answers with {status}"])
    if as_json:
        emit({"ready": status < 400, "reasons": reasons})
    else:
        console().print("ready" if status < 400 else f"not ready: {'; '.join(map(str, reasons))}")
    return int(status >= 400)


def _ask(address: str, timeout: float, insecure: bool) -> tuple[int, dict[str, Any]]:
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise ReconcilerError(f"{address!r} is not an address: write http://host:port")
    url = parts._replace(path=parts.path if parts.path.strip("/") else "/readyz").geturl()
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=timeout, context=context) as reply:
            return reply.status, _decoded(reply.read(_LARGEST_ANSWER))
    except urllib.error.HTTPError as reply:
        with reply:
            return reply.code, _decoded(reply.read(_LARGEST_ANSWER))
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", None) or error
        raise ReconcilerError(f"nobody answers at {url} within {timeout:g} s: {cause}") from None


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
