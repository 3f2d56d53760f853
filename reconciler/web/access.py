"""Who may ask, and who may change: the address, the names it answers to, the token.

Whoever can reach the address may look. Whoever changes something shows a bearer token. A page of some
other site must not be able to do either in a visitor's name: against DNS rebinding the Host header has
to be a name that this worker answers to, against forged requests the Authorization header is needed,
which no browser adds by itself, and Origin has to be the worker's own.
"""

from __future__ import annotations

import hmac
import ipaddress
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from reconciler.web.errors import ApiError
from store.errors import BadAddress

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def parse_address(address: str) -> tuple[str, int]:
    """`host:port`, `:port` (loopback) or `[v6]:port` -> (host, port); port 0 takes a free one.

    Raises:
        BadAddress: it is none of these.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise BadAddress(f"--http {address!r} is not host:port, for example 127.0.0.1:9464")
    return host.strip("[]") or "127.0.0.1", int(port)


def is_loopback(host: str) -> bool:
    """Only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path | None, text: str | None) -> str | None:
    """The token from a file, or from the environment; the file wins. None when there is neither.

    Raises:
        BadAddress: the file cannot be read, or what is in it cannot stand in a header.
    """
    where = "AGENT_RECONCILER_TOKEN"
    if path is not None:
        where = f"--token-file {path}"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise BadAddress(f"{where} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise BadAddress(f"{where} is not text") from None
    if text is None:
        return None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise BadAddress(
            f"{where} holds no usable token: one line of printable characters without blanks, "
            "for example from `openssl rand -hex 32`"
        )
    return token


@dataclass(frozen=True)
class Access:
    """Where to listen, and for whom.

    Attributes:
        host, port: to listen on; port 0 takes a free one.
        token: that changes need; None refuses every change.
        cert, key: PEM files for TLS; None is plain HTTP.
        names: further host names it answers to, beside its address.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = field(default=None, repr=False)
    cert: Path | None = None
    key: Path | None = None
    names: frozenset[str] = frozenset()

    def check(self) -> None:
        """Raises BadAddress when it would be open to the network without a token, or half of TLS."""
        if not is_loopback(self.host) and self.token is None:
            raise BadAddress(
                f"--http {self.host}:{self.port} is open to the network: give --token-file (or "
                "AGENT_RECONCILER_TOKEN), or listen on 127.0.0.1"
            )
        if (self.cert is None) != (self.key is None):
            raise BadAddress("TLS needs both --tls-cert and --tls-key")

    def tls(self) -> ssl.SSLContext | None:
        """What TLS needs; None for plain HTTP.

        Raises:
            BadAddress: the files cannot be used.
        """
        if self.cert is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            raise BadAddress(
                f"--tls-cert {self.cert} with --tls-key {self.key} cannot be used: {error}"
            ) from None
        return context

    def answers_to(self, host: str) -> bool:
        """True when a Host header names this worker.

        An IP address cannot be rebound by DNS, so on an open address every one of them will do; a
        name has to be a known one.
        """
        name = _name_of(host)
        if name in LOCAL_NAMES or name == self.host.lower() or name in self.names:
            return True
        if is_loopback(self.host):
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def check_host(self, request: web.Request) -> None:
        """Refuses a request that was meant for somebody else."""
        if not self.answers_to(request.headers.get("Host", "")):
            raise ApiError(
                421, "unknown_host",
                "this worker does not answer to that host name; if it should, start it with "
                "--http-name NAME",
            )  # fmt: skip

    def check_change(self, request: web.Request) -> None:
        """Refuses a change that does not come from this page or a script with the token."""
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
            raise ApiError(403, "foreign_origin", "the request comes from the page of another site")
        if request.headers.get("Sec-Fetch-Site", "none") not in {"same-origin", "none"}:
            raise ApiError(403, "foreign_origin", "the request comes from the page of another site")
        if self.token is None:
            raise ApiError(
                403, "changes_are_off",
                "nothing can be changed through this worker: start it with --token-file",
            )  # fmt: skip
        header = request.headers.get("Authorization")
        if header is None:
            raise ApiError(
                401, "token_missing", "a change needs the header `Authorization: Bearer TOKEN`",
                headers={"WWW-Authenticate": 'Bearer realm="agent-reconciler"'},
            )  # fmt: skip
        scheme, _, given = header.partition(" ")
        given = given.strip()
        if scheme.lower() != "bearer" or not given or " " in given:
            raise ApiError(
                400, "token_malformed",
                "the Authorization header cannot be read: write `Authorization: Bearer TOKEN`",
                headers={"WWW-Authenticate": 'Bearer error="invalid_request"'},
            )  # fmt: skip
        # Compared as bytes, in a time that does not tell how much of it was right.
        expected = self.token.encode()
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected):
            raise ApiError(
                401, "token_wrong", "that is not the token of this worker",
                headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
            )  # fmt: skip


def _name_of(host: str) -> str:
    """A Host header without its port, lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")
