"""How the past is printed: what was alive, what changed, and the life of one resource."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reconciler.changes import Change, Changes
from reconciler.cli.output import ago, clock, console, table
from reconciler.describe_life import describe_life
from reconciler.fold import FleetState
from reconciler.life import Life
from reconciler.phrases import counted

_SHOWN = 20


def show_alive(state: FleetState, at_ms: int) -> None:
    """Tables of what was alive at a moment."""
    rows = [
        (
            r.ref,
            process.id,
            clock(r.created_ms),
            f"{ago(at_ms - r.used_ms)} before",
            "yes" if r.in_use else "",
            ", ".join(r.uses),
            r.owned_by,
        )
        for process in state.processes.values()
        for r in process.resources.values()
    ]
    title = (
        f"alive at {clock(at_ms)} UTC: {counted(len(rows), 'resource')} in "
        f"{counted(len(state.processes), 'process', 'processes')}"
    )
    out = console()
    if not rows:
        out.print(f"{title} ({counted(state.events, 'event')})")
        return
    columns = ["resource", "process", "created", "last used", "in use", "uses", "owned by"]
    spare = ["created", "in use", "owned by", "uses", "process"]
    out.print(table(title, columns, rows, spare))


# --- what changed ---------------------------------------------------------------------------------


def describe_changes(changes: Changes, bounds: tuple[int | None, int]) -> dict[str, Any]:
    """What changed between two moments, as plain values."""
    return {
        "from_ms": bounds[0],
        "to_ms": bounds[1],
        "events": changes.events,
        "alive_before": dict(changes.before),
        "alive_after": dict(changes.after),
        "appeared": {kind: dict(how) for kind, how in changes.appeared.items()},
        "went": {kind: dict(why) for kind, why in changes.went.items()},
        "refused": dict(changes.refused),
        "failed": dict(changes.failed),
        "processes": changes.processes,
        "arrivals": [_describe_change(one) for one in changes.arrivals],
        "departures": [_describe_change(one) for one in changes.departures],
    }


def _describe_change(change: Change) -> dict[str, Any]:
    return {
        "id": change.id,
        "at_ms": change.at_ms,
        "ref": change.ref,
        "process": change.process,
        "type": change.type,
        "reason": change.reason,
        "order_id": change.order_id,
        "lived_ms": change.lived_ms,
    }


def show_changes(changes: Changes, bounds: tuple[int | None, int]) -> None:
    """Tables of what changed between two moments."""
    out = console()
    begin = f"{clock(bounds[0])} UTC" if bounds[0] is not None else "the beginning"
    title = f"from {begin} to {clock(bounds[1])} UTC: {counted(changes.events, 'event')}"
    came = {kind: how.total() for kind, how in changes.appeared.items()}
    went = {kind: why.total() for kind, why in changes.went.items()}
    after = changes.after
    kinds = sorted(changes.before.keys() | after.keys() | came.keys() | went.keys())
    if not kinds and not any(changes.processes.values()):
        out.print(f"{title}, nothing appeared and nothing went")
        return
    rows: list[tuple[Any, ...]] = [
        (
            kind, changes.before[kind], came.get(kind, 0), went.get(kind, 0), after[kind],
            changes.refused[kind] or "", changes.failed[kind] or "",
        )
        for kind in kinds
    ]  # fmt: skip
    columns = ["kind", "before#", "appeared#", "went#", "after#", "refused#", "failed#"]
    out.print(title, soft_wrap=True)
    out.print(table("", columns, rows))
    rows = [
        (kind, count, reason)
        for kind, why in sorted(changes.went.items())
        for reason, count in why.most_common()
    ]
    if rows:
        out.print(table("why they went", ["kind", "how many#", "reason"], rows))
    latest = sorted([*changes.arrivals, *changes.departures], key=lambda one: one.at_ms)[-_SHOWN:]
    rows = [
        (
            clock(one.at_ms), "went" if one.lived_ms is not None else "appeared", one.ref,
            one.process, ago(one.lived_ms) if one.lived_ms is not None else "",
            one.reason, one.order_id,
        )
        for one in latest
    ]  # fmt: skip
    if rows:
        columns = ["at", "", "resource", "process", "lived", "why", "order"]
        spare = ["order", "process", "lived"]
        out.print(table(f"the last {len(rows)}", columns, rows, spare))
    for what, names in changes.processes.items():
        for name in names:
            out.print(f"process {name} {'was lost' if what == 'lost' else what}")


# --- one life -------------------------------------------------------------------------------------


def describe_lives(lives: Sequence[Life]) -> list[Any]:
    """The lives of a resource, as plain values."""
    return [describe_life(life) for life in lives]


def show_lives(lives: Sequence[Life], at_ms: int) -> None:
    """The lives of a resource, one below the other."""
    for life in lives:
        _show_life(life, at_ms)


def _show_life(life: Life, at_ms: int) -> None:
    out = console()
    end = life.ended
    until = f"to {clock(end.at_ms)}" if end else "and on"
    lived = ago((end.at_ms if end else at_ms) - life.began.at_ms)
    out.print(f"{life.ref} in {life.process}: {clock(life.began.at_ms)} {until} UTC, {lived}")
    made = f"{life.began.type} with event {life.began.seq}"
    made += f", trace {life.began.trace_id}" if life.began.trace_id else ""
    made += f": {life.began.reason}" if life.began.reason else ""
    facts = [("made", made), ("user", life.user), ("uses", ", ".join(life.uses))]
    keepers = [life.owned_by, *life.users] if end is None else [life.owned_by]
    facts.append(("kept alive by", ", ".join(filter(None, keepers))))
    facts.append(("used", _times(life.use_count)))
    for user in [*life.users_ended, *life.users.values()][-_SHOWN:]:
        to = f"to {clock(user.until_ms)}" if user.until_ms is not None else "and on"
        facts.append(("used by", f"{user.ref}, {clock(user.since_ms)} {to}"))
    for trial in life.trials:
        outcome = trial.outcome
        came = f"{outcome.type}: {outcome.reason}" if outcome else "no outcome yet"
        by = f"{trial.worker.name}, epoch {trial.worker.epoch}"
        facts.append(
            ("order", f"{trial.asked.order_id} by {by}, {clock(trial.asked.at_ms)}: {came}")
        )
    if end is not None:
        order = f" by order {end.order_id}" if end.order_id else ""
        facts.append(("ended", f"{end.type}{order}: {end.reason or 'without a reason'}"))
    for name, value in facts:
        if value:
            out.print(f"  {name:<14}{value}", soft_wrap=True)


def _times(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count} times")
