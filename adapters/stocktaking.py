"""Stocktaking: the registries themselves are compared with what is noted of them.

A registry tells of every change made through it. A list inside an index that the service changes in
place, a dict written behind its methods' back, a count of users in an object: nobody tells of those,
so the host looks, from time to time at some and before a forced pass at everything, in one tick.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from adapters.holdings import Holdings
from adapters.registry import Findings, Index, Registry
from store.event import is_ref
from store.logs import get_logger
from store.messages import Inventory

log = get_logger("adapters.stocktaking")

LOOKS = 1000
"""Objects of one registry that one look around takes, in turn: it must not hold up the service. What
an order is about is looked at in any case, when the order is checked."""
EVERYTHING = sys.maxsize


def take_stock(holdings: Holdings, *, thorough: bool = False, looks: int = LOOKS) -> None:
    """Notes what was changed behind the registries' backs, in one tick.

    Args:
        holdings: what is noted.
        thorough: look for changes also where the count of entries is what it should be.
        looks: objects of one registry whose use is asked for.
    """
    for index in holdings.indexes.values():
        with _noted(index.name):
            _put_back(index)
            index.rescan()
    for registry in holdings.registries:
        with _noted(registry.name):
            _put_back(registry)
        if thorough or len(registry) != registry.noted or registry.strays:
            with _noted(registry.name):
                _look_behind(holdings, registry)
        if registry.in_use is not None or registry.used is not None:
            with _noted(registry.name):
                _look_at_some(holdings, registry, looks)
    for ref, entry in list(holdings.unowned.items()):
        holder = entry.registry
        if holder is not None and holder.owned_by is not None and not entry.terminating:
            with _noted(holder.name):
                owner = holder.owned_by(holder.id(entry.key), entry.obj)
                if owner is not None:
                    holdings.link(ref, owned_by=owner)


def findings(holdings: Holdings) -> dict[str, bool]:
    """The kinds that are findings, and whether they can be ended."""
    return {r.kind: r.teardown is not None for r in holdings.registries if isinstance(r, Findings)}


def inventory(holdings: Holdings, rss: int) -> Inventory:
    """What the registries hold at this instant.

    Args:
        holdings: of the process.
        rss: memory of the process, in bytes.
    """
    take_stock(holdings, thorough=True)
    return Inventory(
        process=holdings.process,
        as_of=holdings.recorder.seq,
        held=frozenset(ref for registry in holdings.registries for ref in _refs(registry)),
        entries=tuple(line for index in holdings.indexes.values() for line in index.known()),
        kinds=frozenset(registry.kind for registry in holdings.registries),
        rss=rss,
        findings=findings(holdings),
    )


def _refs(registry: Registry) -> set[str]:
    return {ref for key in registry if is_ref(ref := registry.ref(key))}


def _put_back(registry: Registry | Index) -> None:
    """A service may assign a new dict to the attribute that was observed: that is observed instead."""
    if registry.displaced() is None:
        return
    try:
        registry.come_back()
        log.warning("the service assigned a new dict; it is observed now", registry=registry.name)
    except TypeError as error:
        registry.place = None
        log.error(
            "the service assigned what cannot be observed: what it holds is no longer looked after",
            registry=registry.name, reason=str(error),
        )  # fmt: skip


def _look_behind(holdings: Holdings, registry: Registry) -> None:
    """Notes what came into a registry, or left it, behind its back: drift of its own sort."""
    held = _refs(registry)
    strays = held - holdings.entries.keys()
    for ref in registry.strays - strays - holdings.entries.keys():
        holdings.book.let_go(ref)
    for ref in strays:
        holdings.book.hold(ref)
    registry.strays = strays
    for ref, entry in holdings.entries.items():
        if entry.registry is registry and ref not in held:
            holdings.book.let_go(ref)


def _look_at_some(holdings: Holdings, registry: Registry, looks: int) -> None:
    """Looks at as many objects of a registry, going on where the last rescan ended."""
    keys = list(registry)
    if len(keys) > looks:
        start = registry.looked % len(keys)
        registry.looked = start + looks
        keys = (keys + keys)[start : start + looks]
    for key in keys:
        if (entry := holdings.entries.get(registry.ref(key))) is not None:
            holdings.look_at(entry)


@contextlib.contextmanager
def _noted(name: str) -> Iterator[None]:
    """What a service's own functions raise is logged, and costs no more than one look."""
    try:
        yield
    except Exception:
        log.exception("a registry could not be looked at", registry=name)
