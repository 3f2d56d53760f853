"""One live resource as its process knows it, and what marks it as used or as ending.

An entry is what an order is checked against: the very object, the seq of its last event, and how many
hold it. It changes only within one tick together with the event that tells of the change.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters.registry import Registry
from store.messages import Order
from store.tracing import Origin

if TYPE_CHECKING:
    from adapters.holdings import Holdings

current_order: ContextVar[Order | None] = ContextVar("agent_reconciler_order", default=None)
"""The order that the running code carries out: what it removes was removed because of that."""


@dataclass(slots=True)
class Entry:
    """One live resource of this process.

    Attributes:
        ref: `kind/id`.
        seq: of its last event.
        registry: that holds it; None where it was only recorded.
        key: under which.
        obj: the very object.
        uses, owned_by: as recorded.
        in_use: acquired by how many, through the host.
        held: acquired by how many besides, by the service's own count.
        mark: of its last use, as its registry's `used` tells it.
        kept_until: somebody asked for a stay until then, by the monotonic clock in s; 0 is nobody.
        terminating: the order that is ending it, or empty.
        heir: the entry of the same object after the service took it out of its registry unclosed.
        origin: the request that made it, where somebody said.
    """

    ref: str
    seq: int
    registry: Registry | None = None
    key: Any = None
    obj: Any = None
    uses: tuple[str, ...] = ()
    owned_by: str | None = None
    in_use: int = 0
    held: int = 0
    mark: Any = None
    kept_until: float = 0.0
    terminating: str = ""
    heir: Entry | None = None
    origin: Origin | None = None

    @property
    def holders(self) -> int:
        """Acquired by how many, by whichever count."""
        return self.in_use + self.held


class Use:
    """Holds a resource acquired: `with host.acquire(ref):` or `async with`. Yields the object."""

    def __init__(self, holdings: Holdings, ref: str) -> None:
        self._holdings = holdings
        self._ref = ref
        self._entry: Entry | None = None

    def __enter__(self) -> Any:
        self._entry = self._holdings.begin_use(self._ref)
        return self._entry.obj

    def __exit__(self, *exc: object) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._holdings.end_use(entry)

    async def __aenter__(self) -> Any:
        return self.__enter__()

    async def __aexit__(self, *exc: object) -> None:
        self.__exit__()
