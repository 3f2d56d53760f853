"""Who made it: notes each ClientSession, connector, FileHandler, ADK runner and task as it is made.

The constructors of these classes are wrapped while somebody watches, and restored when the last one
stops. A note holds its object weakly, so that nothing lives longer for being watched. With tracing a
note says where in the service's own code the object was made; that costs some microseconds each.

The one thing to know: an object that is collected leaves its note in `dropped`, from inside the
garbage collector; nothing there may take a lock.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from adapters import heap
from store.logs import get_logger

log = get_logger("adapters.creation")

DROPPED_KEPT = 1024
"""Notes of objects that were dropped unclosed, at the most."""

SORTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "http_session": ("aiohttp.client", "ClientSession", ("close", "detach")),
    "http_connector": ("aiohttp.connector", "BaseConnector", ("close", "_close")),
    "log_handler": ("logging", "FileHandler", ("close",)),
    "runner": ("google.adk.runners", "Runner", ("close",)),
}
"""Sort -> module, class, and the methods that end one. A module that nobody imported is left alone."""

_NOT_THE_SERVICE = ("aiohttp", "asyncio", "logging", "google.adk", "contextlib", "functools")
"""Modules whose frames are not where a service makes something; so is this package."""


@dataclass(slots=True, eq=False)
class Creation:
    """The note of one object.

    Attributes:
        sort: a key of `SORTS`, or `task`.
        type: name of its class.
        number: in order of creation.
        site: `file:line in function`; empty where it was not traced.
        older: it was there before anybody watched, whatever its number.
        closed: one of its closing methods was called.
        remains: of a runner: its attributes, to close in its place what it held.
    """

    sort: str
    type: str
    number: int
    site: str = ""
    older: bool = False
    closed: bool = False
    remains: dict[str, Any] | None = None
    weak: weakref.ref[Any] | None = field(default=None, repr=False)

    @property
    def object(self) -> Any:
        """The object, None when it has been collected."""
        return self.weak() if self.weak is not None else None


class Creations:
    """The notes of this process; there is one, `creations`."""

    def __init__(self) -> None:
        self.dropped: deque[Creation] = deque(maxlen=DROPPED_KEPT)
        self._notes: dict[int, Creation] = {}
        self._undo: dict[tuple[type, str], Callable[[], None]] = {}
        self._last = 0
        self._watching = 0
        self._tracing = 0
        self._older_found = False
        self._listeners: list[Callable[[Creation], None]] = []
        self._passed_over: tuple[str, ...] = ("<frozen",)

    # --- watching -------------------------------------------------------------------------------

    def start(self, *, tracing: bool = False) -> None:
        """Begins to take notes; each `start` wants its `stop`, with the same arguments."""
        self._watching += 1
        self._tracing += tracing
        self.refresh()

    def stop(self, *, tracing: bool = False) -> None:
        """Ends one `start`; the last one restores the classes."""
        self._watching -= 1
        self._tracing -= tracing
        if self._watching == 0:
            for undo in self._undo.values():
                undo()
            self._undo.clear()
            self._notes.clear()
            self.dropped.clear()
            self._older_found = False

    def listen(self, listener: Callable[[Creation], None]) -> Callable[[], None]:
        """Has `listener` called with each new note, in the tick of the creation. Returns the end."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def refresh(self) -> None:
        """Wraps the classes of modules that have been imported meanwhile."""
        for sort, (module, name, closers) in SORTS.items():
            cls = getattr(sys.modules.get(module), name, None)
            if cls is not None and (cls, "__init__") not in self._undo:
                self._wrap_init(cls, sort)
                for closer in closers:
                    self._wrap_closer(cls, closer)
        self._passed_over = ("<frozen", *_files())
        loop = getattr(sys.modules.get("asyncio.base_events"), "BaseEventLoop", None)
        if self._tracing and loop is not None and (loop, "create_task") not in self._undo:
            self._wrap_create_task(loop)

    def _replace(self, cls: type, name: str, new: Any) -> None:
        own = name in cls.__dict__
        original = getattr(cls, name)

        def undo() -> None:
            if own:
                setattr(cls, name, original)
            else:
                delattr(cls, name)

        setattr(cls, name, new)
        self._undo[cls, name] = undo

    def _wrap_init(self, cls: type, sort: str) -> None:
        original = cls.__init__  # type: ignore[misc]

        @functools.wraps(original)
        def init(made: Any, *args: Any, **kwargs: Any) -> None:
            original(made, *args, **kwargs)
            self._note(made, sort)

        self._replace(cls, "__init__", init)

    def _wrap_closer(self, cls: type, name: str) -> None:
        original = getattr(cls, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def closing(made: Any, *args: Any, **kwargs: Any) -> Any:
            note = self._notes.get(id(made))
            if note is not None:
                note.closed = True
                note.remains = None
            return original(made, *args, **kwargs)

        self._replace(cls, name, closing)

    def _wrap_create_task(self, cls: Any) -> None:
        original = cls.create_task

        @functools.wraps(original)
        def create_task(loop: Any, *args: Any, **kwargs: Any) -> Any:
            task = original(loop, *args, **kwargs)
            self._note(task, "task")
            return task

        self._replace(cls, "create_task", create_task)

    # --- notes ----------------------------------------------------------------------------------

    def _note(self, made: Any, sort: str, *, older: bool = False) -> None:
        key = id(made)
        self._last += 1
        note = Creation(sort, type(made).__name__, self._last, older=older)
        if self._tracing and not older:
            frame = _site_frame(self._passed_over)
            note.site = _place(frame) if frame is not None else ""
        if sort == "runner":
            note.remains = dict(vars(made))
        note.weak = weakref.ref(made, lambda _: self._collected(key, note))
        self._notes[key] = note
        for listener in list(self._listeners):
            # Within a constructor of the service, perhaps in a thread of its own: it must not fail.
            try:
                listener(note)
            except Exception:
                log.exception("a creation could not be noted", sort=sort, type=note.type)

    def _collected(self, key: int, note: Creation) -> None:
        if self._notes.get(key) is note:
            del self._notes[key]
        note.weak = None
        if not note.closed and note.sort != "task" and self._watching:
            self.dropped.append(note)

    def find_older(self) -> None:
        """Notes what was made before anybody watched, from the heap: once, it takes some ten ms."""
        if self._older_found:
            return
        self._older_found = True
        classes = {}
        for sort, (module, name, _) in SORTS.items():
            cls = getattr(sys.modules.get(module), name, None)
            if cls is not None:
                classes[cls] = sort
        sorts: dict[type, str | None] = {}
        for found in heap.objects():
            kind = type(found)
            if kind not in sorts:
                sorts[kind] = next((s for c, s in classes.items() if c in kind.__mro__), None)
            of = sorts[kind]
            if of is not None and id(found) not in self._notes and vars(found):
                self._note(found, of, older=True)

    @property
    def last(self) -> int:
        """Number of the last note."""
        return self._last

    def live(self, sort: str) -> Iterator[tuple[Creation, Any]]:
        """What was made of a sort and still lives, with its note."""
        for note in list(self._notes.values()):
            if note.sort == sort and (made := note.object) is not None:
                yield note, made

    def of(self, made: Any) -> Creation | None:
        """The note of an object, if there is one."""
        note = self._notes.get(id(made))
        return note if note is not None and note.object is made else None


creations = Creations()


def _files() -> Iterator[str]:
    """Where the code of `_NOT_THE_SERVICE` and of this package is."""
    yield os.path.dirname(__file__) + os.sep
    for name in _NOT_THE_SERVICE:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            yield os.path.dirname(file) + os.sep if file.endswith("__init__.py") else file


def _site_frame(passed_over: tuple[str, ...]) -> Any:
    """The frame of the service's own code that is making something."""
    frame = sys._getframe(2)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(passed_over):
            return frame
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _place(frame: Any) -> str:
    path = frame.f_code.co_filename
    here = os.getcwd() + os.sep
    short = (
        path.removeprefix(here) if path.startswith(here) else os.sep.join(path.split(os.sep)[-3:])
    )
    return f"{short}:{frame.f_lineno} in {frame.f_code.co_name}"
