"""The options of `RedisSessionService`, as arguments and as part of its address.

ADK's service registry can give a service nothing but a URI, so every option can stand in its query:
`agent-reconciler+redis://host/0?namespace=chat&ttl=86400`. What is not an option of ours stays in the
query, for the Redis client.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode

from store import client
from store.connection import shown
from store.errors import BadAddress, PolicyError
from store.event import check_name
from store.messages import SESSION_RETENTION
from store.namespace import DEFAULT_NAMESPACE

OWN_SCHEME = "agent-reconciler+"
"""May stand before any scheme, for registries in which `redis://` belongs to somebody else."""

SCHEMES = (*client.SCHEMES, "embedded")
Ephemeral = bool | Collection[str]
TimeToLive = float | Mapping[str, float] | None


def _truth(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    return words[text.lower()]


def _apps(text: str) -> bool | frozenset[str]:
    try:
        return _truth(text)
    except KeyError:
        return frozenset(text.split(","))


_IN_ADDRESS: dict[str, Callable[[str], Any]] = {
    "namespace": str,
    "cache_bytes": int,
    "share_events": _truth,
    "accept_stale": _truth,
    "ttl": float,
    "max_event_bytes": int,
    "name": str,
    "ephemeral": _apps,
}


@dataclass(frozen=True, slots=True)
class Address:
    """An address taken apart.

    Attributes:
        url: for `store.connect`.
        options: what stood in its query, by name of the argument.
    """

    url: str
    options: dict[str, Any]


def parse_address(text: str) -> Address:
    """Takes our prefix and our options out of an address.

    Raises:
        BadAddress: no address, an unknown scheme, or an option with a value it cannot have.
    """
    url = text.removeprefix(OWN_SCHEME)
    scheme, separator, _ = url.partition("://")
    known = ", ".join(f"{name}://" for name in SCHEMES)
    if not separator:
        raise BadAddress(f"{text!r} is not the address of a session service: write {known}")
    if scheme not in SCHEMES:
        raise BadAddress(f"{shown(text)!r} has an unknown scheme: write {known}")
    url, _, query = url.partition("?")
    options: dict[str, Any] = {}
    rest: list[tuple[str, str]] = []
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _IN_ADDRESS:
            rest.append((name, value))
            continue
        try:
            options[name] = _IN_ADDRESS[name](value)
        except (ValueError, KeyError):
            raise BadAddress(f"{name}={value} in {shown(text)!r} is not a value of it") from None
    return Address(f"{url}?{urlencode(rest)}" if rest else url, options)


@dataclass(frozen=True, slots=True)
class Options:
    """The options in force; see `RedisSessionService` for what each does.

    Attributes:
        url: for `store.connect`.
    """

    url: str
    namespace: str = DEFAULT_NAMESPACE
    cache_bytes: int = 64 * 2**20
    share_events: bool = False
    accept_stale: bool = False
    ttl: TimeToLive = None
    max_event_bytes: int = 16 * 2**20
    name: str | None = None
    ephemeral: Ephemeral = False

    @classmethod
    def read(cls, url: str | None, uri: str | None, **arguments: Any) -> Self:
        """From one address and arguments, which win over what stands in its query; None is not given.

        Raises:
            BadAddress: no address, two, or one that cannot be used.
            PolicyError: a ttl that is not positive, or bytes that are no number.
            ValueError: the name cannot be one of a service.
        """
        given = url if url is not None else uri
        if given is None or (url is not None and uri is not None):
            raise BadAddress("RedisSessionService needs one address: give url, or uri")
        address = parse_address(given)
        chosen = {name: value for name, value in arguments.items() if value is not None}
        options = cls(address.url, **(address.options | chosen))
        check_ttl(options.ttl)
        for name in ("cache_bytes", "max_event_bytes"):
            value = getattr(options, name)
            if not isinstance(value, int) or value < 0:
                raise PolicyError(f"{name}={value!r} cannot be: give a number of bytes, 0 or more")
        if options.name is not None:
            check_name(options.name)
        return options

    def is_ephemeral(self, app: str) -> bool:
        """The conversations of this app go with their sessions."""
        return self.ephemeral if isinstance(self.ephemeral, bool) else app in self.ephemeral

    def ttl_ms(self, app: str) -> int:
        """The time to live of an app's sessions in ms; 0 is for ever.

        An ephemeral conversation always has one: it goes with its session, but a process that is killed
        cannot see to that.
        """
        seconds = self.ttl.get(app) if isinstance(self.ttl, Mapping) else self.ttl
        if seconds is None and self.is_ephemeral(app):
            seconds = SESSION_RETENTION
        return 0 if seconds is None else round(seconds * 1000)


def check_ttl(ttl: TimeToLive) -> None:
    """Refuses what cannot be meant.

    Raises:
        PolicyError: a time that is not positive.
    """
    for seconds in ttl.values() if isinstance(ttl, Mapping) else (ttl,):
        if seconds is not None and not seconds >= 0.001:
            raise PolicyError(
                f"ttl={seconds!r} cannot be: give seconds above 0, or None to keep sessions for ever"
            )
