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
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from adapters.executor import Executor
from adapters.holdings import Holdings
from adapters.inventory import InventoryBook
from adapters.metrics import HostMetrics, Look
from adapters.observed_dict import ObservedDict, observable
from adapters.outbox import OUTBOX_LIMIT
from adapters.recorder import Recorder
from adapters.registry import Index, Registry, Teardown
from adapters.sender import AWAY, CANNOT_SEND, RETRY_FIRST, OutboxOptions, Sender
from adapters.spill import SPILL_LIMIT
from adapters.stocktaking import EVERYTHING, LOOKS, findings, inventory, take_stock
from store.connection import Store, connect
from store.durability import Durability
from store.event import check_name
from store.log import EventLog
from store.logs import get_logger
from store.messages import Inventory, Order, RegistryCount, Summary
from store.namespace import DEFAULT_NAMESPACE
from store.tasks import check_cancelled, end_tasks

log = get_logger("adapters.host")

LEASE_SECONDS = 15.0
_RESCAN_SECONDS = 1.0
_STOP_SECONDS = 5.0
_GO_ON_SECONDS = 1.0


class Host(Holdings):
    """One service process, as the reconciler sees it. Made by `Host.connect`.

    Attributes:
        name: of the service; for the others see `Holdings`.
        metrics: what it counts, for Prometheus.
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
        self._store = store
        self._owns_store = owns_store
        self._namespace_name = namespace
        self._wanted_partitions = partitions
        self._lease_ms = int(lease_seconds * 1000)
        book = InventoryBook()
        self.metrics = HostMetrics(self)
        sender = self._sender = Sender(
            name, book, self._summary, self._begin_incarnation, outbox, self.metrics
        )
        super().__init__(sender.recorder, book, sender.wake, sender.report)
        self._recorded = self._dropped = 0  # by earlier incarnations
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
            ValueError: a limit or the lease is not more than 0, or the name cannot be one.
        """
        check_name(name)
        if outbox_limit < 1 or spill_limit < 1 or not lease_seconds > 0:
            raise ValueError("outbox_limit, spill_limit and lease_seconds take more than 0")
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
            self.metrics.incarnations.labels("start").inc()
        except BaseException:
            await self.recorder.outbox.close(keep=False)
            if self._owns_store:
                await self._store.close()
            raise
        sender = self._sender
        for work in (sender.send, sender.guard, sender.inherit, self._receive, self._renew):
            name = f"agent-reconciler {work.__name__}"
            task = asyncio.create_task(_going_on(work, name), name=name)
            self._tasks.append(task)
        return self

    def _begin_incarnation(self, recorder: Recorder) -> None:
        if recorder is not self.recorder:
            self._recorded += self.recorder.seq
            self._dropped += self.recorder.outbox.dropped
            self.recorder = recorder
        recorder.record("process_started", f"process/{self.process}", attrs={"pid": os.getpid()})
        recorder.outbox.allow(len(self.entries))
        for entry in self.entries.values():
            self.record_entry("adopted", entry, reason="held by the process at its start")
        self.book.put_back_all()
        self._sender.report()

    async def close(self) -> None:
        """Says that the process ends, sends what is left for some seconds, and lets go.

        What the registries hold is left to the service; it is closed in the log.
        """
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        await end_tasks([*tasks, *self._executing])
        # In a task of its own: a service that is told to end by cancelling it comes here in a task that
        # counts as cancelled, and what sends asks for that.
        await asyncio.create_task(self._leave(), name="host leaves")
        if self._owns_store:
            await self._store.close()

    async def _leave(self) -> None:
        self.recorder.record("process_stopped", f"process/{self.process}", reason="closed")
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self._sender.drain()
                await self._sender.channel.leave()
        except CANNOT_SEND as error:
            log.warning("no good end: Redis cannot be told", error=str(error))
        await self._sender.close()

    def __await__(self) -> Generator[Any, None, Host]:
        return self.start().__await__()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
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
        registry.stands_in(owner, attribute)
        return self.add(registry)

    def observe_index(
        self, owner: Any, attribute: str, *, names: str | None = None, **options: Any
    ) -> Index:
        """Turns a dict of a service into an index registry, in place; see `observe` and `Index`."""
        content = observable(getattr(owner, attribute), attribute)
        index = Index(options.pop("name", attribute), names, content, **options)
        setattr(owner, attribute, index)
        index.stands_in(owner, attribute)
        return self.add(index)

    def handle(self, kind: str, teardown: Teardown) -> None:
        """Names the teardown for resources of a kind that are recorded without a registry.

        Raises:
            TypeError: it cannot be called.
        """
        if not callable(teardown):
            raise TypeError(
                f"the teardown of {kind} is called with (id, None); {teardown!r} cannot be"
            )
        self.handlers[kind] = teardown

    # --- inventory --------------------------------------------------------------------------------

    def report(self, request: str) -> None:
        """Looks at the registries themselves, and publishes the inventory as an answer."""
        self._take_stock(thorough=True, looks=EVERYTHING)
        self._sender.answers.append(request)
        self._sender.report()

    def _take_stock(self, *, thorough: bool = False, looks: int = LOOKS) -> None:
        take_stock(self, thorough=thorough, looks=looks)
        if self.book.dirty:
            self._wake_up()

    def inventory(self) -> Inventory:
        """What the registries hold at this instant."""
        return inventory(self, self._self.memory_info().rss)

    def look(self) -> Look:
        """What there is to say of it now; see `adapters.metrics`."""
        outbox = self.recorder.outbox
        return Look(
            outbox=len(self.recorder),
            spilled=outbox.spilled,
            spill_bytes=outbox.spill_bytes,
            recorded=self._recorded + self.recorder.seq,
            dropped=self._dropped + outbox.dropped,
            redis_up=self._sender.connected,
            resources=len(self.entries),
        )

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
            findings=findings(self),
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
            self._take_stock()
            if not beat_now.is_set() and time.monotonic() < next_beat:
                continue
            next_beat = time.monotonic() + every
            beat_now.clear()
            self._sender.report()
            try:
                await self._sender.beat()
            except AWAY:
                next_beat = time.monotonic()


def check_host(host: object) -> Host:
    """Returns `host` if it is one.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(host, Host):
        raise TypeError(
            f"a Host is wanted: `async with Host.connect(url, name=…) as host:`, not {host!r:.80}"
        )
    return host


async def _going_on(work: Callable[[], Awaitable[None]], name: str) -> None:
    """Does the work of a task to its end; what nobody expected is said, and does not end it."""
    while True:
        try:
            return await work()
        except Exception:
            log.exception("a task of the host failed; it goes on", task=name)
            await asyncio.sleep(_GO_ON_SECONDS)


def restore(owner: Any, attribute: str, host: Host) -> None:
    """Undoes `Host.observe` and `Host.observe_index`: a plain dict stands there again."""
    registry = getattr(owner, attribute)
    if isinstance(registry, ObservedDict):
        registry.place = None
        setattr(owner, attribute, host.remove(registry))  # type: ignore[arg-type]
