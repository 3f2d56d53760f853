"""What a process holds: its live resources, their edges, and the events that tell of them.

A change of a registry becomes an event, an entry and a line of the inventory in one tick, without an
await between: so drift is a difference and never a race. Nothing here does I/O; the recorder numbers
the events and the host sends them.

An entry links to what it uses; the links are kept in both directions, so that "does anything alive use
it" costs one look when an order is checked.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, TypeVar

from adapters.entry import Entry, Use, current_order
from adapters.inventory import InventoryBook
from adapters.links import Links
from adapters.recorder import Recorder, origin
from adapters.registry import Findings, Index, Registry, Teardown
from store.errors import NotAlive
from store.event import Scalar, check_ref
from store.logs import get_logger
from store.messages import IndexEntry

log = get_logger("adapters.holdings")

R = TypeVar("R", Registry, Index)


class Holdings:
    """What one process holds.

    Args:
        recorder: numbers the events.
        book: the inventory, kept up to date with every change.
        wake: called when the inventory changed.
        report: called when what is observed changed.

    Attributes:
        recorder: as given; another one after the process had to start anew.
        entries: what is alive in this process, by reference.
        registries: primary registries, and findings.
        indexes: index registries by name.
        handlers: teardowns for kinds that no registry holds, by kind.
        unowned: entries whose owner is not known yet, by reference.
    """

    def __init__(
        self,
        recorder: Recorder,
        book: InventoryBook,
        wake: Callable[[], None],
        report: Callable[[], None],
    ) -> None:
        self.recorder = recorder
        self.book = book
        self.entries: dict[str, Entry] = {}
        self.registries: list[Registry] = []
        self.indexes: dict[str, Index] = {}
        self.handlers: dict[str, Teardown] = {}
        self.unowned: dict[str, Entry] = {}
        self._links = Links()
        self.end_listeners: list[Callable[[str], None]] = []
        self._wake_up = wake
        self._observed = report

    @property
    def process(self) -> str:
        """The id of this incarnation."""
        return self.recorder.process

    # --- registries -----------------------------------------------------------------------------

    def add(self, registry: R) -> R:
        """Takes a registry in; what it holds already is adopted.

        Raises:
            ValueError: it belongs to a host already, or an index of that name exists.
        """
        if registry.host is not None:
            raise ValueError(f"registry {registry.name} belongs to a host already")
        if isinstance(registry, Index):
            if registry.name in self.indexes:
                raise ValueError(f"there is an index named {registry.name} already")
            self.indexes[registry.name] = registry
            registry.host = self
            registry.note(registry.rescan)
        else:
            self.registries.append(registry)
            registry.host = self
            self.recorder.outbox.allow(len(registry))
            for key, value in registry.items():
                if isinstance(registry, Findings):
                    self.stray_added(registry, key)
                else:
                    adopt = functools.partial(self.entry_added, type="adopted")
                    registry.note(adopt, registry, key, value)
        self._observed()
        return registry

    def remove(self, registry: Registry | Index) -> dict[Any, Any]:
        """Lets a registry go; its resources are closed in the log. Returns its content, as a dict."""
        if isinstance(registry, Index):
            registry.forget()
            del self.indexes[registry.name]
        else:
            for entry in [e for e in self.entries.values() if e.registry is registry]:
                self.forget(entry, reason="no longer observed")
            for ref in registry.strays:
                self.book.let_go(ref)
            self.registries = [one for one in self.registries if one is not registry]
        registry.host = None
        self._observed()
        return registry.plain()

    # --- what happens to resources ----------------------------------------------------------------

    def record(
        self,
        type: str,
        ref: str,
        *,
        uses: str | Sequence[str] | None = None,
        owned_by: str | None = None,
        reason: str | None = None,
        attrs: dict[str, Scalar] | None = None,
    ) -> int:
        """Records an event about a resource that no registry of this host holds.

        It takes a microsecond or two and never waits. `created` and `reused` make the resource known to
        this host, `cleaned_up` forgets it. Arguments, result and errors as for `Recorder.record`.
        """
        entry = self.entries.get(ref)
        if uses is not None:
            uses = self._links.references(uses)
        if owned_by is not None:
            check_ref(owned_by)
        seq = self.recorder.record(
            type, ref, uses=uses, owned_by=owned_by, reason=reason, attrs=attrs
        )
        if type == "cleaned_up":
            if entry is not None:
                self._drop(entry)
        elif type in {"created", "reused", "adopted"}:
            if entry is None:
                entry = self.entries[ref] = Entry(ref, seq)
                if type == "created":
                    entry.origin = origin()
            entry.seq = seq
            if uses == entry.uses:
                uses = None  # As before: nothing to link.
            self._link(entry, uses, owned_by)
        return seq

    def link(
        self, ref: str, *, uses: str | Sequence[str] | None = None, owned_by: str | None = None
    ) -> None:
        """Says anew what a live resource uses, or what it dies with.

        Raises:
            NotAlive: there is no such resource in this process.
            ValueError: a reference is not `kind/id`.
        """
        entry = self._alive(ref)
        if uses is not None:
            uses = self._links.references(uses)
        if owned_by is not None:
            check_ref(owned_by)
        self._link(entry, uses, owned_by)
        entry.seq = self.recorder.record("reused", ref, uses=uses, owned_by=owned_by)

    def acquire(self, ref: str) -> Use:
        """Marks a resource as in use: `with host.acquire("session/abc"):`, or `async with`.

        While it is acquired nothing tears it down, whatever the clock says.

        Raises:
            NotAlive: when it is entered and the resource is not alive, or is being torn down.
        """
        return Use(self, ref)

    def begin_use(self, ref: str) -> Entry:
        """The first half of `acquire`; end it with `end_use`."""
        entry = self._alive(ref)
        entry.in_use += 1
        entry.seq = self.recorder.record("reused", ref, attrs={"in_use": entry.holders})
        return entry

    def end_use(self, entry: Entry) -> None:
        """The second half of `acquire`."""
        entry.in_use -= 1
        if entry.heir is not None:
            self.end_use(entry.heir)
        if self.entries.get(entry.ref) is entry:
            entry.seq = self.recorder.record("reused", entry.ref, attrs={"in_use": entry.holders})

    def keep_alive(self, ref: str, seconds: float) -> None:
        """Asks for a stay: the resource is desired for so many seconds more, though it is idle.

        Raises:
            NotAlive: there is no such resource in this process.
            ValueError: the time is not more than 0.
        """
        if not seconds > 0:
            raise ValueError("keep_alive takes more than 0 seconds")
        entry = self._alive(ref)
        entry.kept_until = max(entry.kept_until, time.monotonic() + seconds)
        entry.seq = self.recorder.record("reused", ref, attrs={"keep_alive_s": float(seconds)})

    def _alive(self, ref: str) -> Entry:
        entry = self.entries.get(ref)
        if entry is None:
            raise NotAlive(f"{ref} is not alive in {self.process}: create it anew")
        if entry.terminating:
            raise NotAlive(f"{ref} is being torn down (order {entry.terminating}): create it anew")
        return entry

    # --- called by registries -----------------------------------------------------------------------

    def entry_added(
        self,
        registry: Registry,
        key: Any,
        value: Any,
        *,
        type: str = "created",
        order_id: str | None = None,
    ) -> Entry:
        """An object came into a registry, in this tick."""
        ref = registry.ref(key)
        id = registry.id(key)
        uses = self._links.references(registry.uses(id, value)) if registry.uses is not None else ()
        owner = registry.owned_by(id, value) if registry.owned_by is not None else None
        if owner is not None:
            check_ref(owner)
        stale = self.entries.get(ref)
        if stale is not None:
            # What was acquired, used or owned was the other object: the log must not mix them up.
            self.forget(stale, reason="another object came under its reference")
        entry = Entry(ref, 0, registry, key, value, uses, owner)
        if type == "created":
            entry.origin = origin()
        if registry.used is not None:
            entry.mark = registry.used(id, value)
        if registry.in_use is not None:
            entry.held = registry.in_use(id, value)
        if registry.owned_by is not None and owner is None:
            self.unowned[ref] = entry
        self.record_entry(type, entry, order_id=order_id)
        self.entries[ref] = entry
        self._link(entry, uses, owner)
        self.book.hold(ref)
        if registry.unclosed is not None:
            registry.unclosed.pop(_identity(value), None)  # It was only moved.
        registry.noted += 1
        registry.strays.discard(ref)
        return entry

    def entry_used(self, ref: str) -> None:
        """An object was put into its registry again, in this tick."""
        entry = self.entries.get(ref)
        if entry is not None:
            entry.seq = self.recorder.record("reused", ref)

    def look_at(self, entry: Entry) -> None:
        """Notes what the service changed in an object itself: its holders, its use, what it uses."""
        registry = entry.registry
        if registry is None or (registry.in_use is None and registry.used is None):
            return
        if entry.terminating:
            return  # What its teardown changes in it is not a use.
        id, held, mark, uses = registry.id(entry.key), entry.held, entry.mark, entry.uses
        if registry.in_use is not None:
            held = registry.in_use(id, entry.obj)
        if registry.used is not None:
            mark = registry.used(id, entry.obj)
            if registry.uses is not None:
                uses = self._links.references(registry.uses(id, entry.obj))
        if (held, mark, uses) == (entry.held, entry.mark, entry.uses):
            return
        linked = uses if uses != entry.uses else None
        attrs: dict[str, Scalar] | None = None
        if held != entry.held:
            attrs = {"in_use": entry.in_use + held}
        entry.held, entry.mark = held, mark
        self._link(entry, linked, None)
        entry.seq = self.recorder.record("reused", entry.ref, uses=linked, attrs=attrs)

    def entry_removed(
        self, registry: Registry, key: Any, value: Any, *, reason: str | None = None
    ) -> None:
        """An object left a registry, in this tick."""
        entry = self.entries.get(registry.ref(key))
        if entry is None:
            self.stray_removed(registry, key)
        if entry is None or entry.registry is not registry:
            return
        self.forget(entry, reason=reason)
        if registry.close_removed is not None and not entry.terminating and value is not None:
            self._keep_unclosed(registry, entry, value)

    def _keep_unclosed(self, registry: Registry, entry: Entry, value: Any) -> None:
        """The service let an object go and did not close it: the reconciler will have it closed.

        It is owned by what it was in the registry, which is gone, so it is an orphan at once; unless
        it is in use, then its use goes on under the new name.
        """
        unclosed = registry.unclosed
        if unclosed is None:
            ending = registry.close_removed
            unclosed = registry.unclosed = self.add(
                Registry(
                    f"unclosed_{registry.kind}",
                    name=f"unclosed {registry.name}",
                    teardown=None if ending is True else ending,
                    owned_by=lambda id, _: registry.removed.pop(id, None),
                )
            )
        registry.removed[_identity(value)] = f"{entry.ref}@{entry.seq}"
        unclosed[_identity(value)] = value
        if entry.in_use:
            heir = entry.heir = self.entries[unclosed.ref(_identity(value))]
            heir.in_use = entry.in_use
            heir.seq = self.recorder.record("reused", heir.ref, attrs={"in_use": heir.in_use})

    def stray_added(self, registry: Registry, key: Any) -> None:
        """Something came into a registry that the log shall not hear of, in this tick."""
        ref = registry.ref(key)
        registry.strays.add(ref)
        self.book.hold(ref)
        self._wake_up()

    def stray_removed(self, registry: Registry, key: Any) -> None:
        """Something that the log never heard of left a registry, in this tick."""
        ref = registry.ref(key)
        if ref in registry.strays:
            registry.strays.discard(ref)
            self.book.let_go(ref)
            self._wake_up()

    def entries_changed(self, gone: Iterable[IndexEntry], come: Iterable[IndexEntry]) -> None:
        """Entries of an index went or came, in this tick."""
        self.book.strike(gone)
        self.book.enter(come)
        self._wake_up()

    def forget(self, entry: Entry, *, reason: str | None = None) -> None:
        """A resource is no more: that is recorded, and its traces go."""
        order = current_order.get()
        mine = order is not None and entry.terminating == order.id
        if order is not None and reason is None:
            reason = order.reason if mine else f"went with {order.ref}"
        self.recorder.record(
            "cleaned_up",
            entry.ref,
            reason=reason or "removed from its registry by the service",
            order_id=order.id if order is not None else None,
        )
        self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        for listener in self.end_listeners:
            listener(entry.ref)
        self._link(entry, (), None)
        self.entries.pop(entry.ref, None)
        self.unowned.pop(entry.ref, None)
        if entry.registry is not None:
            self.book.let_go(entry.ref)
            entry.registry.noted -= 1

    def _link(self, entry: Entry, uses: Iterable[str] | None, owned_by: str | None) -> None:
        if owned_by is not None:
            entry.owned_by = owned_by
            self.unowned.pop(entry.ref, None)
        if uses is not None:
            self._links.put(entry, tuple(uses))

    def record_entry(
        self, type: str, entry: Entry, *, reason: str | None = None, order_id: str | None = None
    ) -> None:
        """Records all that there is to say of an entry."""
        attrs: dict[str, Scalar] = {"in_use": entry.holders} if entry.holders else {}
        if entry.ref in self.unowned:
            attrs["awaits_owner"] = True
        if (user := _user_of(entry)) is not None:
            attrs["user"] = user
        if entry.kept_until and (stay := entry.kept_until - time.monotonic()) > 0:
            attrs["keep_alive_s"] = stay
        entry.seq = self.recorder.record(
            type,
            entry.ref,
            uses=entry.uses or None,
            owned_by=entry.owned_by,
            reason=reason,
            order_id=order_id,
            attrs=attrs or None,
            trace=entry.origin.trace_id if entry.origin is not None else None,
        )

    # --- asked by the executor ------------------------------------------------------------------------

    def holds(self, entry: Entry) -> bool:
        """The registry of an entry still holds that very object."""
        registry = entry.registry
        assert registry is not None
        if registry.displaced() is not None:
            return (
                False  # The service has another dict by now; the next look finds out what is in it.
            )
        return entry.key in registry and dict.get(registry, entry.key) is entry.obj

    def user_of(self, ref: str, *, besides: Container[str] = ()) -> str | None:
        """Something alive that uses `ref`, if there is anything, itself and some others aside."""
        return self._links.user_of(ref, besides)

    def untracked(self, ref: str) -> Entry | None:
        """What a registry holds under `ref` and the log never heard of; None if none does."""
        kind, _, id = ref.partition("/")
        for registry in self.registries:
            if registry.kind != kind:
                continue
            for key, value in registry.items():
                if registry.id(key) == id:
                    return Entry(ref, 0, registry, key, value)
        return None

    def adopt(self, ref: str, *, order_id: str | None = None) -> Entry | None:
        """Records a resource that a registry holds and the log never heard of; None if none does."""
        found = self.untracked(ref)
        if found is None or found.registry is None or isinstance(found.registry, Findings):
            return None
        return self.entry_added(
            found.registry, found.key, found.obj, type="adopted", order_id=order_id
        )


def _user_of(entry: Entry) -> str | None:
    """Whose it is, where the service says so; what its function raises costs no more than that."""
    registry = entry.registry
    if registry is None or registry.user is None:
        return None
    try:
        user = registry.user(registry.id(entry.key), entry.obj)
        return None if user is None else str(user)
    except Exception:
        log.exception("whose a resource is could not be told", ref=entry.ref)
        return None


def _identity(value: Any) -> str:
    return f"{id(value):x}"
