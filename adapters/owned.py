"""Objects with an owner: closed with it, and closed once, whoever asks.

The ground of the bindings to clients of all sorts. An owner is a reference (`component/search`) or
any object of the service; an object is watched through a weak reference, and gone when it has been
collected. With a host each thing is a resource, `owned_by` its owner, and the reconciler ends it;
without one this does it by itself.

The one thing to know: a weak reference calls back in the middle of whatever allocates, so what is
called there takes no lock and records nothing; it only leaves a note for the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from adapters.entry import current_order
from adapters.executor import Refusal, close
from adapters.host import Host
from adapters.registry import Registry, Teardown
from store.errors import NotAlive

T = TypeVar("T")

CLOSE_SECONDS = 10.0
"""Time that one close may take when everything is closed."""

books: weakref.WeakSet[Owned[Any]] = weakref.WeakSet()
"""All that is alive in this process: what they hold is declared, and no leak."""

_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class _Ending:
    """The close of one thing, which several may wait for; it is given up with the last of them."""

    task: asyncio.Task[None]
    waiting: int = 0
    given_up: bool = False


class Owned(Generic[T]):
    """Things of one kind, each with its owner.

    Args:
        kind: of the resources.
        host: that shows them to the reconciler; None does without one.
        teardown: closes one, `(id, thing)`; plain or async. None calls its `aclose` or `close`.
        busy: says why a thing may not be closed by an order just now; None or "" when it may.
        close_timeout: seconds that one close may take in `aclose`.
    """

    def __init__(
        self,
        kind: str,
        *,
        host: Host | None = None,
        teardown: Teardown | None = None,
        busy: Callable[[T], str | None] | None = None,
        close_timeout: float = CLOSE_SECONDS,
    ) -> None:
        self.kind = kind
        self.closed = False
        self._host = host
        self._teardown = teardown or close
        self._busy = busy
        self._close_timeout = close_timeout
        self._registry = Registry(kind, teardown=self._end, name=f"{kind} of {type(self).__name__}")
        self._of_owner: dict[str, set[str]] = defaultdict(set)
        self._owner_of: dict[str, str] = {}
        self._watched: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._gone: deque[tuple[int, str]] = deque()
        self._ending: dict[str, _Ending] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        if host is not None:
            host.add(self._registry)
        books.add(self)

    def __len__(self) -> int:
        return len(self._registry)

    def things(self) -> list[T]:
        """What is held now."""
        return list(self._registry.values())

    # --- owners ---------------------------------------------------------------------------------

    def owner_ref(self, owner: object) -> str | None:
        """The reference of an owner; an object gets one, and is watched from then on.

        Raises:
            NotAlive: the host knows no such resource, so nothing would ever end what it owns.
            TypeError: the object cannot be watched.
        """
        if owner is None:
            return None
        if isinstance(owner, str):
            if self._host is not None and owner not in self._host.entries:
                raise NotAlive(
                    f"{owner} is not alive in {self._host.process}, so it cannot own a {self.kind}: "
                    "record it first, or leave the owner out"
                )
            return owner
        watched = self._watched.get(id(owner))
        if watched is not None and watched[0]() is owner:
            return watched[1]
        number = id(owner)
        ref = f"object/{type(owner).__name__}-{next(_numbers)}"
        try:
            weak = weakref.ref(owner, lambda _: self._owner_gone(number, ref))
        except TypeError:
            raise TypeError(
                f"a {type(owner).__name__} cannot be watched (no weak references): name the owner "
                "by a reference, kind/id"
            ) from None
        self._watched[number] = (weak, ref)
        if self._host is not None:
            self._host.record("created", ref)
        return ref

    def _owner_gone(self, number: int, ref: str) -> None:
        # Called by the garbage collector, see the top of this file.
        self._gone.append((number, ref))
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # The loop is closed: `aclose` settles it.
                self._loop.call_soon_threadsafe(self.settle)

    def settle(self) -> None:
        """Draws the consequences of owners that have been collected."""
        while self._gone:
            number, ref = self._gone.popleft()
            watched = self._watched.get(number)
            if watched is not None and watched[1] == ref:
                del self._watched[number]
            if self._host is not None:
                self._host.record("cleaned_up", ref, reason="the object was garbage collected")
            elif self._of_owner.get(ref):
                task = asyncio.get_running_loop().create_task(self._close_quietly(ref))
                self._background.add(task)
                task.add_done_callback(self._background.discard)

    async def _close_quietly(self, owner: str) -> None:
        with contextlib.suppress(ExceptionGroup):  # Each was logged by whoever failed to close.
            await self.close_owned(owner)

    # --- things ---------------------------------------------------------------------------------

    def add(self, thing: T, owner: object = None, *, label: str | None = None) -> str:
        """Takes a thing in.

        Args:
            thing: to be closed.
            owner: a reference, or an object; None is whoever closes this.
            label: shown in the id; the owner where none is given.

        Returns:
            The id.

        Raises:
            NotAlive: this was closed already, or the owner is not alive.
        """
        self.check_open()
        ref = self.owner_ref(owner)
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
        id = f"{label or ref or 'shared'}#{next(_numbers)}"
        self._registry[id] = thing
        if ref is not None:
            self._owned_by(id, ref)
        return id

    def _owned_by(self, id: str, owner: str) -> None:
        self._of_owner[owner].add(id)
        self._owner_of[id] = owner
        if self._host is not None:
            self._host.link(f"{self.kind}/{id}", owned_by=owner)

    def abandon(self, id: str, reason: str) -> None:
        """Says that nobody has this thing any more: with a host, the reconciler ends it."""
        if self._host is not None and id not in self._owner_of:
            self._owned_by(id, f"nobody/{reason}")

    def check_open(self) -> None:
        """Raises NotAlive once this was closed."""
        if self.closed:
            raise NotAlive(
                f"{type(self).__name__} was closed: no {self.kind} can be had from it any more; "
                "make a new one, or close it later"
            )

    def get(self, id: str) -> T | None:
        """The thing with this id, while it is held."""
        thing: T | None = self._registry.get(id)
        return thing

    def drop(self, id: str) -> None:
        """Forgets a thing that has been closed by other means."""
        owner = self._owner_of.pop(id, None)
        if owner is not None:
            ids = self._of_owner[owner]
            ids.discard(id)
            if not ids:
                del self._of_owner[owner]
        self._registry.pop(id, None)

    # --- the end --------------------------------------------------------------------------------

    async def _end(self, id: str, thing: T) -> None:
        """Closes one, once: who comes second waits for the first.

        Raises:
            Refusal: an order asks for it while it is busy.
        """
        if current_order.get() is not None and self._busy is not None:
            why = self._busy(thing)
            if why:
                raise Refusal(f"busy: {why}")
        while (ending := self._ending.get(id)) is not None and ending.given_up:
            await asyncio.wait([ending.task])
        if ending is None:
            if id not in self._registry:
                return
            ending = self._ending[id] = _Ending(asyncio.ensure_future(self._close(id, thing)))
            ending.task.add_done_callback(lambda _: self._ending.pop(id, None))
        ending.waiting += 1
        try:
            await asyncio.shield(ending.task)
        finally:
            ending.waiting -= 1
            if not ending.waiting and not ending.task.done():
                ending.given_up = True
                ending.task.cancel()

    async def _close(self, id: str, thing: T) -> None:
        result = self._teardown(id, thing)
        if result is not None:
            await result
        self.drop(id)

    async def close_owned(self, owner: object) -> None:
        """Closes what an owner has, side by side.

        Raises:
            ExceptionGroup: some could not be closed; each names its reference. The others are.
        """
        ref = owner if isinstance(owner, str) else self.owner_ref(owner)
        await self._close_all(list(self._of_owner.get(ref or "", ())))

    async def _close_all(self, ids: list[str]) -> None:
        things = [(id, self._registry[id]) for id in ids if id in self._registry]
        results = await asyncio.gather(
            *(asyncio.wait_for(self._end(id, thing), self._close_timeout) for id, thing in things),
            return_exceptions=True,
        )
        errors: list[Exception] = []
        for (id, _), result in zip(things, results, strict=True):
            error = result
            if isinstance(error, TimeoutError):
                error = TimeoutError(f"no end after {self._close_timeout:g} s; it was cancelled")
            if isinstance(error, asyncio.CancelledError):
                error = RuntimeError("its close was cancelled")
            if isinstance(error, Exception):
                error.add_note(f"closing {self.kind}/{id}")
                errors.append(error)
        if errors:
            raise ExceptionGroup(f"{len(errors)} of {len(things)} {self.kind} not closed", errors)

    async def aclose(self) -> None:
        """Closes everything. A second call does nothing.

        Raises:
            ExceptionGroup: some could not be closed; they are let go all the same.
        """
        if self.closed:
            return
        self.closed = True
        self._gone.clear()
        try:
            await self._close_all(list(self._registry))
        finally:
            for id in list(self._registry):
                self.drop(id)
            for _, ref in self._watched.values():
                if self._host is not None:
                    self._host.record("cleaned_up", ref, reason="nothing of it is looked after")
            self._watched.clear()
            if self._host is not None and self._registry.host is self._host:
                self._host.remove(self._registry)

    async def __aenter__(self) -> Self:
        self.check_open()
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
