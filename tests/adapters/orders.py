"""Orders as a worker would send them now, and what a host answers."""

from __future__ import annotations

from typing import Any

from adapters import Host
from store.event import EventRow
from store.messages import Action, Order
from tests.support import waiting

Outcome = tuple[str, str]


class Closing:
    """Something that can be closed."""

    def __init__(self) -> None:
        self.closed = 0

    async def aclose(self) -> None:
        self.closed += 1


def order(host: Host, ref: str, **more: Any) -> Order:
    """A teardown as the worker would order it now, unless told otherwise."""
    entry = host.entries.get(ref)
    values: dict[str, Any] = {
        "id": f"o-{ref}", "process": host.process, "action": Action.TEARDOWN, "ref": ref,
        "seq": entry.seq if entry is not None else 0, "reason": "idle",
    }  # fmt: skip
    return Order(**values | more)


async def carried_out(host: Host, *orders: Order) -> dict[str, list[Outcome]]:
    """Carries orders out; the answer is (type, reason) of the events with their ids."""
    seq = host.recorder.seq
    rows: list[EventRow] = []
    record = host.recorder.record

    def listening(type: str, ref: str, **more: Any) -> int:
        number = record(type, ref, **more)
        rows.append(waiting(host.recorder)[-1])
        return number

    host.recorder.record = listening  # type: ignore[method-assign]
    try:
        await host.execute(orders)
    finally:
        host.recorder.record = record  # type: ignore[method-assign]
    assert host.recorder.seq == seq + len(rows)
    answers: dict[str, list[Outcome]] = {}
    for row in rows:
        if row.order_id is not None:
            answers.setdefault(row.order_id, []).append((row.type, row.reason or ""))
    return answers


async def outcome(host: Host, one: Order) -> Outcome:
    """The one outcome of an order."""
    [answer] = (await carried_out(host, one))[one.id]
    return answer
