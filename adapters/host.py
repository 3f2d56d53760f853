"""The host agent: what a service embeds to be looked after.

It ties the parts together: registries note changes and the recorder numbers them in the same tick;
one task sends events and inventory to Redis, one receives orders, one renews the lease of the
process. When Redis is away, events wait and the service goes on. A process that was declared lost
while it was only paused finds itself fenced, and starts again as a new process that adopts what it
still holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil

from adapters.executor import Entry, Executor, current_order
from adapters.inventory import InventoryBook
from adapters.logs import get_logger
from adapters.outbox import OUTBOX_LIMIT
from adapters.recorder import Recorder
from adapters.registry import Findings, Index, ObservedDict, Registry, Teardown, observable
from adapters.sender import AWAY, CANNOT_SEND, RETRY_FIRST, OutboxOptions, Sender
from adapters.spill import SPILL_LIMIT
from store.connection import Store, check_cancelled, connect, end_tasks
from store.durability import Durability
from store.errors import NotAlive
from store.event import Scalar, is_ref
from store.log import EventLog
from store.messages import IndexEntry, Inventory, Order, RegistryCount, Summary
from store.namespace import DEFAULT_NAMESPACE

log = get_logger("adapters.host")
R = TypeVar("R", Registry, Index)

LEASE_SECONDS = 15.0
_RESCAN_SECONDS = 1.0
_LOOKS = 1000
"""Objects of one registry that one rescan looks at, in turn: it must not hold up the service. What an
order is about is looked at in any case, when the order is checked."""
_STOP_SECONDS = 5.0


class Use:
    """Holds a resource acquired: `with host.acquire(ref):` or `async with`. Yields the object."""

    def __init__(self, host: Host, ref: str) -> None:
        self._host = host
        self._ref = ref
        self._entry: Entry | None = None

    def __enter__(self) -> Any:
        self._entry = self._host.begin_use(self._ref)
        return self._entry.obj

    def __exit__(self, *exc: object) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._host.end_use(entry)

    async def __aenter__(self) -> Any:
        return self.__enter__()

    async def __aexit__(self, *exc: object) -> None:
        self.__exit__()


class Host:
    """One service process, as the reconciler sees it. Made by `Host.connect`.

    Attributes:
        name: of the service.
        recorder: numbers the events.
        entries: what is alive in this process, by reference.
        indexes: index registries by name.
        handlers: teardowns for kinds that no registry holds, by kind.
    """

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        namespace: str = DEFAULT_NAMESPACE,
        lease_seconds: float = LEASE_SECONDS,
        partitions: int | None = None,
        owns_store: bool = False,
        outbox: OutboxOptions = OutboxOptions(),  # noqa: B008 - it is frozen
    ) -> None:
        self.name = name
        self.entries: dict[str, Entry] = {}
        self.registries: list[Registry] = []
        self.indexes: dict[str, Index] = {}
        self.handlers: dict[str, Teardown] = {}
        self._store = store
        self._owns_store = owns_store
        self._namespace_name = namespace
        self._wanted_partitions = partitions
        self._lease_ms = int(lease_seconds * 1000)
        self._users: dict[str, dict[str, None]] = {}
        self._unowned: dict[str, Entry] = {}
        self._book = InventoryBook()
        self._sender = Sender(name, self._book, self._summary, self._begin_incarnation, outbox)
        self.recorder = self._sender.recorder
        self._wake_up = self._sender.wake
        self._dropped = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._executing: set[asyncio.Task[None]] = set()
        self._executor = Executor(self)
        self._self = psutil.Process()

    # --- life -----------------------------------------------------------------------------------

    @classmethod
    def connect(
        cls,
        url: str | Store,
        *,
        name: str,
        namespace: str = DEFAULT_NAMESPACE,
        lease_seconds: float = LEASE_SECONDS,
        partitions: int | None = None,
        spill_dir: str | Path | None = None,
        outbox_limit: int = OUTBOX_LIMIT,
        spill_limit: int = SPILL_LIMIT,
        durability: str | Durability | None = None,
    ) -> Host:
        """A host for this process: `async with Host.connect(url, name="chat-api") as host:`.

        Args:
            url: of the Redis that holds the log (see `store.connect`), or an open store.
            name: of the service; the process is `name@hostname:pid:start`.
            namespace: of the log.
            lease_seconds: the process counts as lost when it was not heard of for so long.
            partitions: how many the namespace must have; None takes what is recorded, or the default.
            spill_dir: a folder for events that wait while Redis is away and memory is half full; the
                next incarnation of the service sends what this one could not. None has no file.
            outbox_limit: events that wait in memory at the most (and 512 bytes for each), beyond what
                the service holds when it is taken in.
            spill_limit: bytes that the file may have.
            durability: when an event counts as acknowledged: `memory`, `fsync` or `replicated`, see
                `store.durability`; None takes `?durability=` of the URL, or `memory`.

        Raises:
            BadAddress, RedisUnavailable, NamespaceError, DurabilityError: when it is entered.
            ValueError: a limit is not more than 0.
        """
        if outbox_limit < 1 or spill_limit < 1:
            raise ValueError("outbox_limit and spill_limit take more than 0")
        folder = None if spill_dir is None else Path(spill_dir)
        store = url if isinstance(url, Store) else connect(url)
        return cls(
            store,
            name=name,
            namespace=namespace,
            lease_seconds=lease_seconds,
            partitions=partitions,
            owns_store=not isinstance(url, Store),
            outbox=OutboxOptions(outbox_limit, folder, spill_limit, durability),
        )

    @property
    def process(self) -> str:
        """The id of this incarnation."""
        return self.recorder.process

    @property
    def unpublished(self) -> bool:
        """The inventory has changed since it was last published."""
        return self._sender.unpublished

    @property
    def store(self) -> Store:
        """The Redis that holds the log; what stands beside the host may use it too."""
        return self._store

    @property
    def namespace_name(self) -> str:
        """The namespace of the log."""
        return self._namespace_name

    async def start(self) -> Self:
        """Connects, announces the process and begins its tasks; see `connect` for what it raises."""
        await self._store.open()
        try:
            event_log = EventLog(
                self._store, self._namespace_name, partitions=self._wanted_partitions
            )
            await self._sender.open(self._store, event_log, self._lease_ms)
            self._begin_incarnation(self.recorder)
            await self._sender.beat()
            await self._sender.drain()
        except BaseException:
            await self.recorder.outbox.close(keep=False)
            if self._owns_store:
                await self._store.close()
            raise
        sender = self._sender
        for work in (sender.send, sender.guard, sender.inherit, self._receive, self._renew):
            task = asyncio.create_task(work(), name=f"agent-reconciler {work.__name__}")
            self._tasks.append(task)
        return self

    def _begin_incarnation(self, recorder: Recorder) -> None:
        if recorder is not self.recorder:
            self._dropped += self.recorder.outbox.dropped
            self.recorder = recorder
        recorder.record("process_started", f"process/{self.process}", attrs={"pid": os.getpid()})
        recorder.outbox.allow(len(self.entries))
        for entry in self.entries.values():
            self._record_entry("adopted", entry, reason="held by the process at its start")
        self._book.put_back_all()
        self._sender.report()

    async def close(self) -> None:
        """Says that the process ends, sends what is left for some seconds, and lets go.

        What the registries hold is left to the service; it is closed in the log.
        """
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        await end_tasks([*tasks, *self._executing])
        self.recorder.record("process_stopped", f"process/{self.process}", reason="closed")
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self._sender.drain()
                await self._sender.channel.leave()
        except CANNOT_SEND as error:
            log.warning("no good end: Redis cannot be told", error=str(error))
        await self._sender.close()
        if self._owns_store:
            await self._store.close()

    def __await__(self) -> Generator[Any, None, Host]:
        return self.start().__await__()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def call(self, function: Callable[..., object], *args: Any, soon: bool = False) -> bool:
        """Calls a function in the thread of the host: at once if that is this one, else soon.

        Args:
            function: what to call.
            args: with.
            soon: never at once. For finalizers, which may run in the middle of anything.

        Returns:
            Whether it was or will be called; a host that has not started, or whose loop is closed,
            calls nothing later.
        """
        loop = self._sender.loop
        if not soon and threading.get_ident() == self._sender.thread:
            function(*args)
            return True
        if loop is None:
            return False
        try:
            loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            return False
        return True

    # --- registries -----------------------------------------------------------------------------

    def registry(
        self, kind: str, content: Mapping[Any, Any] | None = None, **options: Any
    ) -> Registry:
        """A new primary registry of this host; options as for `Registry`."""
        return self.add(Registry(kind, content, **options))

    def index(self, name: str, names: str | None = None, **options: Any) -> Index:
        """A new index registry of this host; options as for `Index`."""
        return self.add(Index(name, names, **options))

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
            registry.rescan()
        else:
            self.registries.append(registry)
            registry.host = self
            self.recorder.outbox.allow(len(registry))
            for key, value in registry.items():
                if isinstance(registry, Findings):
                    self.stray_added(registry, key)
                else:
                    self.entry_added(registry, key, value, type="adopted")
        self._sender.report()
        return registry

    def observe(self, owner: Any, attribute: str, *, kind: str, **options: Any) -> Registry:
        """Turns a dict of a service into a primary registry, in place.

        Args:
            owner: the object that has the dict.
            attribute: its name; it is replaced by an observed dict with the same content.
            kind: of the resources in it.
            options: as for `Registry`; the name is the attribute's.

        Raises:
            TypeError: it is not a plain dict, or is observed already.
        """
        content = observable(getattr(owner, attribute), attribute)
        registry = Registry(kind, content, **{"name": attribute, **options})
        setattr(owner, attribute, registry)
        return self.add(registry)

    def observe_index(
        self, owner: Any, attribute: str, *, names: str | None = None, **options: Any
    ) -> Index:
        """Turns a dict of a service into an index registry, in place; see `observe` and `Index`."""
        content = observable(getattr(owner, attribute), attribute)
        index = Index(options.pop("name", attribute), names, content, **options)
        setattr(owner, attribute, index)
        return self.add(index)

    def remove(self, registry: Registry | Index) -> dict[Any, Any]:
        """Lets a registry go; its resources are closed in the log. Returns its content, as a dict."""
        if isinstance(registry, Index):
            registry.forget()
            del self.indexes[registry.name]
        else:
            for entry in [e for e in self.entries.values() if e.registry is registry]:
                self.forget(entry, reason="no longer observed")
            for ref in registry.strays:
                self._book.let_go(ref)
            self.registries = [one for one in self.registries if one is not registry]
        registry.host = None
        self._sender.report()
        return registry.plain()

    def handle(self, kind: str, teardown: Teardown) -> None:
        """Names the teardown for resources of a kind that are recorded without a registry."""
        self.handlers[kind] = teardown

    # --- what happens to resources ----------------------------------------------------------------

    def record(
        self,
        type: str,
        ref: str,
        *,
        uses: Sequence[str] | None = None,
        owned_by: str | None = None,
        reason: str | None = None,
        attrs: dict[str, Scalar] | None = None,
    ) -> int:
        """Records an event about a resource that no registry of this host holds.

        It takes a microsecond or two and never waits. `created` and `reused` make the resource known to
        this host, `cleaned_up` forgets it. Arguments, result and errors as for `Recorder.record`.
        """
        entry = self.entries.get(ref)
        seq = self.recorder.record(
            type, ref, uses=uses, owned_by=owned_by, reason=reason, attrs=attrs
        )
        if type == "cleaned_up":
            if entry is not None:
                self._drop(entry)
        elif type in {"created", "reused", "adopted"}:
            if entry is None:
                entry = self.entries[ref] = Entry(ref, seq)
            entry.seq = seq
            self._link(entry, uses, owned_by)
        return seq

    def link(
        self, ref: str, *, uses: Sequence[str] | None = None, owned_by: str | None = None
    ) -> None:
        """Says anew what a live resource uses, or what it dies with.

        Raises:
            NotAlive: there is no such resource in this process.
        """
        entry = self._alive(ref)
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
        attrs: dict[str, Scalar] = {}
        uses = tuple(registry.uses(id, value)) if registry.uses is not None else None
        owner = registry.owned_by(id, value) if registry.owned_by is not None else None
        stale = self.entries.get(ref)
        if stale is not None:
            # What was acquired, used or owned was the other object: the log must not mix them up.
            self.forget(stale, reason="another object came under its reference")
        entry = Entry(ref, 0, registry, key, value)
        if registry.used is not None:
            entry.mark = registry.used(id, value)
        if registry.in_use is not None and (held := registry.in_use(id, value)):
            entry.held = attrs["in_use"] = held
        if registry.owned_by is not None and owner is None:
            attrs["awaits_owner"] = True
            self._unowned[ref] = entry
        if registry.user is not None and (user := registry.user(id, value)) is not None:
            attrs["user"] = str(user)
        entry.seq = self.recorder.record(
            type, ref, uses=uses, owned_by=owner, order_id=order_id, attrs=attrs or None
        )
        self.entries[ref] = entry
        self._link(entry, uses, owner)
        self._book.hold(ref)
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
                uses = tuple(registry.uses(id, entry.obj))
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
            unclosed = registry.unclosed = self.registry(
                f"unclosed_{registry.kind}",
                name=f"unclosed {registry.name}",
                teardown=None if ending is True else ending,
                owned_by=lambda id, _: registry.removed.pop(id, None),
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
        self._book.hold(ref)
        self._wake_up()

    def stray_removed(self, registry: Registry, key: Any) -> None:
        """Something that the log never heard of left a registry, in this tick."""
        ref = registry.ref(key)
        if ref in registry.strays:
            registry.strays.discard(ref)
            self._book.let_go(ref)
            self._wake_up()

    def entries_changed(self, gone: Iterable[IndexEntry], come: Iterable[IndexEntry]) -> None:
        """Entries of an index went or came, in this tick."""
        self._book.strike(gone)
        self._book.enter(come)
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
        self._link(entry, (), None)
        self.entries.pop(entry.ref, None)
        self._unowned.pop(entry.ref, None)
        if entry.registry is not None:
            self._book.let_go(entry.ref)
            entry.registry.noted -= 1

    def _link(self, entry: Entry, uses: Iterable[str] | None, owned_by: str | None) -> None:
        if owned_by is not None:
            entry.owned_by = owned_by
            self._unowned.pop(entry.ref, None)
        if uses is None:
            return
        for used in entry.uses:
            users = self._users.get(used)
            if users is not None:
                users.pop(entry.ref, None)
                if not users:
                    del self._users[used]
        entry.uses = tuple(uses)
        for used in entry.uses:
            self._users.setdefault(used, {})[entry.ref] = None

    def _record_entry(self, type: str, entry: Entry, *, reason: str) -> None:
        attrs: dict[str, Scalar] = {"in_use": entry.holders} if entry.holders else {}
        if entry.ref in self._unowned:
            attrs["awaits_owner"] = True
        registry = entry.registry
        if registry is not None and registry.user is not None:
            user = registry.user(registry.id(entry.key), entry.obj)
            attrs |= {} if user is None else {"user": str(user)}
        entry.seq = self.recorder.record(
            type,
            entry.ref,
            uses=entry.uses or None,
            owned_by=entry.owned_by,
            reason=reason,
            attrs=attrs or None,
        )

    # --- asked by the executor ------------------------------------------------------------------------

    def holds(self, entry: Entry) -> bool:
        """The registry of an entry still holds that very object."""
        assert entry.registry is not None
        return entry.key in entry.registry and dict.get(entry.registry, entry.key) is entry.obj

    def user_of(self, ref: str) -> str | None:
        """Something alive that uses `ref`, if there is anything."""
        return next((user for user in self._users.get(ref, ()) if user != ref), None)

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

    def _findings(self) -> dict[str, bool]:
        return {r.kind: r.teardown is not None for r in self.registries if isinstance(r, Findings)}

    def report(self, request: str) -> None:
        """Looks at the registries themselves, and publishes the inventory as an answer."""
        self._rescan(thorough=True, looks=sys.maxsize)
        self._sender.answers.append(request)
        self._sender.report()

    def inventory(self) -> Inventory:
        """What the registries hold at this instant."""
        self._rescan(thorough=True)
        return Inventory(
            process=self.process,
            as_of=self.recorder.seq,
            held=frozenset(
                ref
                for registry in self.registries
                for key in registry
                if is_ref(ref := registry.ref(key))
            ),
            entries=tuple(line for index in self.indexes.values() for line in index.known()),
            kinds=frozenset(registry.kind for registry in self.registries),
            rss=self._self.memory_info().rss,
            findings=self._findings(),
        )

    def _look_behind(self, registry: Registry) -> None:
        """Notes what came into a registry, or left it, behind its back: drift of its own sort."""
        held = {ref for key in registry if is_ref(ref := registry.ref(key))}
        strays = held - self.entries.keys()
        for ref in registry.strays - strays - self.entries.keys():
            self._book.let_go(ref)
        for ref in strays:
            self._book.hold(ref)
        registry.strays = strays
        for ref, entry in self.entries.items():
            if entry.registry is registry and ref not in held:
                self._book.let_go(ref)

    def _look_at_some(self, registry: Registry, looks: int) -> None:
        """Looks at as many objects of a registry, going on where the last rescan ended."""
        keys = list(registry)
        if len(keys) > looks:
            start = registry.looked % len(keys)
            registry.looked = start + looks
            keys = (keys + keys)[start : start + looks]
        for key in keys:
            if (entry := self.entries.get(registry.ref(key))) is not None:
                self.look_at(entry)

    def _rescan(self, *, thorough: bool = False, looks: int = _LOOKS) -> None:
        """Compares the book with the registries themselves, in one tick."""
        for index in self.indexes.values():
            with _noted(index.name):
                index.rescan()
        for registry in self.registries:
            if thorough or len(registry) != registry.noted or registry.strays:
                with _noted(registry.name):
                    self._look_behind(registry)
            if registry.in_use is not None or registry.used is not None:
                with _noted(registry.name):
                    self._look_at_some(registry, looks)
        for ref, entry in list(self._unowned.items()):
            holder = entry.registry
            if holder is not None and holder.owned_by is not None and not entry.terminating:
                with _noted(holder.name):
                    owner = holder.owned_by(holder.id(entry.key), entry.obj)
                    if owner is not None:
                        self.link(ref, owned_by=owner)
        if self._book.dirty:
            self._wake_up()

    # --- tasks ------------------------------------------------------------------------------------------

    def _summary(self) -> Summary:
        counts = [RegistryCount(r.name, "primary", r.kind, len(r)) for r in self.registries]
        counts += [
            RegistryCount(i.name, "index", i.names or i.key_names or "", len(i))
            for i in self.indexes.values()
        ]
        outbox = self.recorder.outbox
        with self._self.oneshot():
            rss, fds = self._self.memory_info().rss, self._self.num_fds()
        return Summary(
            process=self.process,
            as_of=self.recorder.seq,
            kinds=tuple(sorted({registry.kind for registry in self.registries})),
            registries=tuple(counts),
            rss=rss,
            fds=fds,
            outbox=len(self.recorder),
            spilled=outbox.spilled,
            dropped=self._dropped + outbox.dropped,
            outbox_problem=outbox.problem,
            answers=tuple(self._sender.answers),
            findings=self._findings(),
        )

    async def _receive(self) -> None:
        """Receives orders; each batch is carried out by a task of its own."""
        away = False
        while True:
            check_cancelled()
            try:
                if away:
                    await self._sender.channel.look_back()
                orders = await self._sender.channel.orders()
            except AWAY:
                away = True
                await asyncio.sleep(RETRY_FIRST)
                continue
            if away:
                # A blocked read feels it first when Redis goes: what it has now is asked at once.
                away = False
                self._sender.beat_now.set()
            if orders:
                self.execute(orders)

    def execute(self, orders: Sequence[Order]) -> asyncio.Task[None]:
        """Carries out orders that came together, in the background."""
        task = asyncio.create_task(self._executor.execute(orders))
        self._executing.add(task)
        task.add_done_callback(self._executing.discard)
        return task

    async def _renew(self) -> None:
        """Renews the lease, and looks for what was changed behind the registries' backs."""
        every = self._lease_ms / 3000
        next_beat = time.monotonic() + every
        while True:
            check_cancelled()
            beat_now = self._sender.beat_now
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_RESCAN_SECONDS, every)):
                    await beat_now.wait()
            self._rescan()
            if not beat_now.is_set() and time.monotonic() < next_beat:
                continue
            next_beat = time.monotonic() + every
            beat_now.clear()
            self._sender.report()
            try:
                await self._sender.beat()
            except AWAY:
                next_beat = time.monotonic()


@contextlib.contextmanager
def _noted(name: str) -> Iterator[None]:
    """What a service's own functions raise is logged, and costs no more than one look."""
    try:
        yield
    except Exception:
        log.exception("a registry could not be looked at", registry=name)


def _identity(value: Any) -> str:
    return f"{id(value):x}"


def restore(owner: Any, attribute: str, host: Host) -> None:
    """Undoes `Host.observe` and `Host.observe_index`: a plain dict stands there again."""
    registry = getattr(owner, attribute)
    if isinstance(registry, ObservedDict):
        setattr(owner, attribute, host.remove(registry))  # type: ignore[arg-type]
