"""Drift with what is being done about it, in one sentence each. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from reconciler.drift import DriftItem
from reconciler.fleet import Fleet
from reconciler.fold import Attempt, target_of
from reconciler.plan import Step, Waiting
from reconciler.web.shapes import DriftNow, DriftRow
from store.messages import Action
from store.namespace import Namespace

_VERBS = {
    Action.TEARDOWN: "torn down",
    Action.DROP_ENTRY: "dropped from its index",
    Action.CLOSE_GHOST: "closed in the log",
    Action.ADOPT: "adopted into the log",
}
_Key = tuple[str, str]


def drift_now(
    fleet: Fleet,
    leases: Mapping[int, str],
    namespace: Namespace,
    *,
    process: str | None = None,
    limit: int,
) -> DriftNow:
    """The drift of a fleet, or of one process: how much, and what is being done about the first of it.

    Args:
        fleet: as it was read.
        leases: partition -> the worker that holds it.
        namespace: tells the partition of a process.
        process: only this one; None is all.
        limit: of rows.
    """
    steps: dict[_Key, Step] = {(s.process, s.target): s for s in fleet.plan.steps}
    waiting: dict[_Key, Waiting] = {
        (w.item.process, _target(w.item)): w for w in fleet.plan.waiting
    }
    items = [item for item in fleet.drift if process in (None, item.process)]
    rows = []
    for item in items[:limit]:
        key = (item.process, _target(item))
        state = fleet.state.processes.get(item.process)
        attempt = state.attempts.get(key[1]) if state is not None else None
        holder = leases.get(namespace.partition_of(item.process))
        row = DriftRow(
            item.sort, item.process, item.ref, item.reason, "due", "",
            since_ms=item.since_ms, registry=item.registry, key=item.key,
        )  # fmt: skip
        _say(row, steps.get(key), waiting.get(key), attempt, holder)
        rows.append(row)
    return DriftNow(fleet.now_ms, len(items), rows)


def _target(item: DriftItem) -> str:
    return target_of(item.ref, item.registry, item.key)


def _say(
    row: DriftRow,
    step: Step | None,
    waiting: Waiting | None,
    attempt: Attempt | None,
    holder: str | None,
) -> None:
    """Fills in what is being done."""
    if waiting is not None:
        row.failures, row.next_ms = waiting.failures, waiting.until_ms
    if attempt is not None:
        row.order_id = attempt.order_id
    times = f"{row.failures} times" if row.failures != 1 else "once"
    if waiting is not None and waiting.until_ms == 0:
        row.state, row.doing = "held", f"left alone: {waiting.reason}"
    elif waiting is not None and attempt is not None and attempt.pending:
        row.state, row.doing = "under_way", f"order {attempt.order_id} is under way"
    elif holder is None:
        row.state, row.doing = "nobody", "nothing: no worker holds its partition"
    elif waiting is not None and attempt is not None:
        how = "refused" if attempt.refused else "failed"
        row.state = "stuck" if waiting.stuck else "retrying"
        row.doing = f"{how} {times} ({waiting.reason}); tried again"
    elif step is not None:
        row.doing = f"about to be {_VERBS[step.action]} by {holder.partition('@')[0]}"
    else:
        row.doing = "about to be looked at"
