"""Finds in the running process what nobody declared: the leaks that no registry knows of.

Open aiohttp sessions and connectors, file handlers without a logger, ADK runners dropped unclosed,
tasks that nobody awaits, maps that only grow, and descriptors and memory by trend. With a host the
findings are untracked drift: shown, counted, and ended only where the policy says
`untracked = "teardown"`. With tracing each says where it was made.

The one thing to know: declared is what a registry of the host or one of our clients holds. Whatever
else is open is a finding, so tell the probe (`declare`) of what the service looks after by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Self

import psutil

from adapters.creation import Creation, creations
from adapters.host import Host
from adapters.leak_search import forsaken_tasks, only_grows, remains_closed
from adapters.logging_handlers import unattached
from adapters.owned import books
from adapters.registry import Findings
from store.logs import get_logger

log = get_logger("adapters.leak_probe")

INTERVAL_SECONDS = 30.0
SAMPLES = 12
"""Samples that a trend is told from."""
_CLOSABLE = ("leaked_http_session", "leaked_http_connector", "leaked_log_handler")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that nobody declared.

    Attributes:
        kind: see `KINDS`.
        id: of the finding; the same in each look.
        what: in words.
        site: where it was made, `file:line in function`; empty where that was not traced.
    """

    kind: str
    id: str
    what: str
    site: str = ""
    weak: weakref.ref[Any] | None = field(default=None, repr=False, compare=False)
    note: Creation | None = field(default=None, repr=False, compare=False)

    @property
    def ref(self) -> str:
        return f"{self.kind}/{self.id}"

    @property
    def can_be_closed(self) -> bool:
        """It is still there, and whoever has it can still close it."""
        return self.kind in _CLOSABLE and self.weak is not None

    def __str__(self) -> str:
        return f"{self.what}, made at {self.site}" if self.site else self.what


async def _end_session(id: str, finding: Finding) -> None:
    from adapters.aiohttp_client import close_session

    session = finding.weak() if finding.weak is not None else None
    if session is not None:
        await close_session(id, session)
    _settle(finding)


async def _end_connector(id: str, finding: Finding) -> None:
    connector = finding.weak() if finding.weak is not None else None
    if connector is not None:
        await connector.close()


def _end_handler(id: str, finding: Finding) -> None:
    handler = finding.weak() if finding.weak is not None else None
    if handler is not None:
        handler.close()
    _settle(finding)


async def _end_runner(id: str, finding: Finding) -> None:
    if finding.note is not None and finding.note.remains is not None:
        await remains_closed(finding.note.remains)
    _settle(finding)


async def _end_task(id: str, finding: Finding) -> None:
    task = finding.weak() if finding.weak is not None else None
    if task is not None:
        task.cancel()
        await asyncio.wait({task})


def _settle(finding: Finding) -> None:
    if finding.note is not None:
        finding.note.closed, finding.note.remains = True, None


KINDS: dict[str, Callable[[str, Finding], Any] | None] = {
    "leaked_http_session": _end_session,
    "leaked_http_connector": _end_connector,
    "leaked_log_handler": _end_handler,
    "leaked_runner": _end_runner,
    "leaked_task": _end_task,
    "growing_map": None,
    "growing_fds": None,
    "growing_memory": None,
}
"""Kinds of findings, with what ends one; a trend is only reported."""


class LeakProbe:
    """Looks for leaks: `async with LeakProbe(host, tracing=True) as probe:`, or `with` on demand.

    Args:
        host: that shows the findings to the reconciler; None does without one.
        tracing: say where things were made; costs some microseconds for each.
        interval: seconds between two looks of `async with`. A look holds the event loop for some ms,
            and where tasks or handlers are in doubt, for some ten ms for a million objects.
        fds: a rise by so many descriptors that never goes back is a finding.
        memory: the same for resident memory, in bytes.
        entries: the same for the entries of a map that is watched.
    """

    def __init__(
        self,
        host: Host | None = None,
        *,
        tracing: bool = False,
        interval: float = INTERVAL_SECONDS,
        fds: int = 16,
        memory: int = 64 * 2**20,
        entries: int = 10,
    ) -> None:
        self._host = host
        self._tracing = tracing
        self._interval = interval
        self._limits = {"growing_fds": fds, "growing_memory": memory, "growing_map": entries}
        self._process = psutil.Process()
        self._maps: dict[str, Callable[[], int]] = {}
        self._samples: dict[tuple[str, str], deque[int]] = {}
        self._declared: weakref.WeakSet[Any] = weakref.WeakSet()
        self._since = 0
        self._begun = False
        self._found: dict[str, Findings] = {}
        self._known: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    # --- what is looked at ------------------------------------------------------------------------

    def declare(self, thing: Any) -> None:
        """Says that the service looks after this thing itself: it is no finding."""
        self._declared.add(thing)

    def watch(self, name: str, thing: Sized | Callable[[], int]) -> None:
        """Samples how many entries a map has, at each look.

        Args:
            name: shown in the finding.
            thing: a dict, list or set, or what returns a count.
        """
        self._maps[name] = thing if callable(thing) else thing.__len__
        self._samples.pop(("growing_map", name), None)

    def sample(self) -> None:
        """Takes one sample for the trends; each look does it too."""
        counts: dict[tuple[str, str], int] = {
            ("growing_map", name): count() for name, count in self._maps.items()
        }
        counts["growing_fds", "process"] = self._process.num_fds()
        counts["growing_memory", "process"] = self._process.memory_info().rss
        for key, count in counts.items():
            self._samples.setdefault(key, deque(maxlen=SAMPLES)).append(count)

    # --- a look -----------------------------------------------------------------------------------

    def look(self, *, collect: bool = False) -> list[Finding]:
        """Looks for leaks now.

        Args:
            collect: run the garbage collector first, so that what hangs in a circle counts as
                dropped; it takes as long as it takes.
        """
        creations.refresh()
        if not self._begun:
            creations.find_older()
        # Before the collector takes a task that waits for what nobody has any more.
        found = list(self._tasks())
        if collect:
            gc.collect()
        declared = self._declared_ids()
        found += self._clients(declared)
        found += self._handlers(declared)
        found += self._dropped()
        self.sample()
        found += self._trends()
        self._publish(found)
        return found

    def _declared_ids(self) -> set[int]:
        ids = {id(thing) for thing in self._declared}
        for book in list(books):
            ids.update(id(thing) for thing in book.things())
        if self._host is not None:
            ids.update(id(entry.obj) for entry in self._host.entries.values())
        return ids

    def _concerns(self, note: Creation) -> bool:
        """It was made since `begin`, if that was called."""
        return note.number > self._since and not (self._begun and note.older)

    def _finding(self, kind: str, note: Creation, what: str, made: Any = None) -> Finding:
        id = f"{note.site or note.type}#{note.number}"
        weak = None if made is None else weakref.ref(made)
        return Finding(kind, id[:400], what, note.site, weak, note)

    def _clients(self, declared: set[int]) -> Iterator[Finding]:
        held: set[int] = set()
        for note, session in creations.live("http_session"):
            if session.closed:
                continue
            held.add(id(session.connector))
            if self._concerns(note) and id(session) not in declared:
                what = "an aiohttp ClientSession is open and nobody declared it"
                yield self._finding("leaked_http_session", note, what, session)
        for note, connector in creations.live("http_connector"):
            if connector.closed or id(connector) in held or id(connector) in declared:
                continue
            if self._concerns(note):
                what = f"an aiohttp {note.type} is open and no session has it"
                yield self._finding("leaked_http_connector", note, what, connector)

    def _handlers(self, declared: set[int]) -> Iterator[Finding]:
        for handler in unattached():
            note = creations.of(handler)
            if note is None or not self._concerns(note) or id(handler) in declared:
                continue
            what = f"a {note.type} has {_name(handler)} open and no logger has it"
            yield self._finding("leaked_log_handler", note, what, handler)

    def _dropped(self) -> Iterator[Finding]:
        for note in list(creations.dropped):
            if note.closed or not self._concerns(note) or note.sort == "http_connector":
                continue  # What a connector had open goes with it; its session is told of.
            sort = "an ADK" if note.sort == "runner" else "a"
            what = f"{sort} {note.type} was dropped and never closed"
            yield self._finding(f"leaked_{note.sort}", note, what)

    def _tasks(self) -> Iterator[Finding]:
        def concerns(task: asyncio.Task[Any]) -> bool:
            note = creations.of(task)
            return not self._begun or (note is not None and self._concerns(note))

        # One by one: a list of them would hold them, and so hide that nobody else does.
        for task in forsaken_tasks((task for _, task in creations.live("task")), concerns):
            note = creations.of(task) or Creation("task", task.get_name(), 0)
            name = getattr(task.get_coro(), "__qualname__", task.get_name())
            what = f"a task runs {name} and nobody awaits it or holds it"
            yield self._finding("leaked_task", note, what, task)

    def _trends(self) -> Iterator[Finding]:
        for (kind, name), samples in self._samples.items():
            if not only_grows(samples, self._limits[kind]):
                continue
            first, last = samples[0], samples[-1]
            if kind == "growing_map":
                what = f"{name} only grows: from {first} to {last} entries"
            elif kind == "growing_fds":
                what = f"open file descriptors only grow: from {first} to {last}"
            else:
                what = f"memory only grows: from {first >> 20} to {last >> 20} MiB"
            yield Finding(kind, name, what)

    # --- drift ------------------------------------------------------------------------------------

    def _publish(self, found: Sequence[Finding]) -> None:
        """Brings the inventory of the host up to date, and tells the log of the service what is new."""
        for one in found:
            if one.ref not in self._known:
                log.warning("leak found", ref=one.ref, what=str(one))
        self._known = {one.ref for one in found}
        if self._host is None:
            return
        for kind, registry in self._found.items():
            now = {one.id: one for one in found if one.kind == kind}
            for id in [id for id in registry if id not in now]:
                del registry[id]
            for id, one in now.items():
                if id not in registry:
                    registry[id] = one

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begins to note what is made; `close` ends it."""
        creations.start(tracing=self._tracing)
        if self._host is not None:
            for kind, end in KINDS.items():
                self._found[kind] = findings = Findings(kind, teardown=end)
                self._host.add(findings)
        return self

    def begin(self) -> None:
        """From here on only what is made later is a finding, and trends begin anew."""
        self._since, self._begun = creations.last, True
        self._samples.clear()

    def close(self) -> None:
        """Ends what `start` began; findings leave the inventory."""
        creations.stop(tracing=self._tracing)
        found, self._found = self._found, {}
        for registry in found.values():
            if self._host is not None and registry.host is self._host:
                self._host.remove(registry)

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                self.look()
            except Exception:
                log.exception("a look for leaks failed")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self.start()
        self._task = asyncio.create_task(self._look_on(), name="agent-reconciler leak probe")
        return self

    async def __aexit__(self, *exc: object) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.close()


def _name(handler: Any) -> str:
    return str(getattr(handler, "baseFilename", "a file")).rpartition("/")[2]
