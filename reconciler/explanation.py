"""Explains one life in sentences: alive or not, since when, because of what, and what comes next. Pure.

Everything said here stands in the log, in the policy, or in the plan that a worker would make now;
nothing is guessed. The sentences are for somebody who has never seen this resource and is in a hurry:
first what it is, then why, then what happens next and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from reconciler.drift import Drift
from reconciler.fold import Attempt, ProcessState, Resource
from reconciler.keepers import Keeper, keepers
from reconciler.life import Life, Trial, Worker
from reconciler.moment import clock, span
from reconciler.plan import Plan, retry_at
from reconciler.policy import Policy
from store.messages import NO_PROCESS

Verdict = Literal[
    "alive", "in_use", "about_to_go", "due", "refused", "failing", "stuck", "ghost",
    "torn_down", "removed", "lost", "stopped", "deleted",
]  # fmt: skip

SOON_MS = 60_000
"""What has less than this left is said to be about to go."""
_SHOWN = 3

_HEADS: dict[Verdict, str] = {
    "alive": "alive",
    "in_use": "alive and in use",
    "about_to_go": "alive, idle and about to go",
    "due": "alive, and due to be torn down",
    "refused": "alive; its teardown was refused",
    "failing": "alive; its teardown failed and is tried again",
    "stuck": "alive; its teardown failed and is stuck",
    "ghost": "alive in the log only",
    "torn_down": "torn down",
    "removed": "ended by its service",
    "lost": "lost with its process",
    "stopped": "ended with its process",
    "deleted": "deleted as data",
}


@dataclass(frozen=True, slots=True)
class Around:
    """What is known besides the life itself.

    Attributes:
        now_ms: Redis time.
        policy: that the workers run with.
        process: its process as folded; None when that has ended.
        drift, plan: of that process now.
        partition: of that process.
        holder: the worker that acts for the partition; None when nobody does.
    """

    now_ms: int
    policy: Policy
    process: ProcessState | None
    drift: Drift
    plan: Plan
    partition: int
    holder: Worker | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """One life, explained.

    Attributes:
        ref, process: whose.
        verdict: in one word.
        sentences: in the order in which to read them.
        until_ms: when it goes if nothing happens; None for never, or where it has gone.
        keepers: what keeps it alive, the longest first.
        next_try_ms: when its teardown is tried again; None when it is not.
        life: what it was made from.
    """

    ref: str
    process: str
    verdict: Verdict
    sentences: tuple[str, ...]
    life: Life
    until_ms: int | None = None
    keepers: tuple[Keeper, ...] = ()
    next_try_ms: int | None = None

    @property
    def head(self) -> str:
        return f"{self.ref} in {self.process}: {_HEADS[self.verdict]}"


def explain(life: Life, around: Around) -> Explanation:
    """Explains a life."""
    process = around.process
    resource = process.resources.get(life.ref) if process is not None else None
    if life.ended is not None or process is None or resource is None:
        return _ended(life)
    return _alive(life, around, process, resource)


# --- alive ----------------------------------------------------------------------------------------


def _alive(life: Life, around: Around, process: ProcessState, resource: Resource) -> Explanation:
    now = around.now_ms
    reasons = keepers(life.ref, process, around.policy)
    until = max((keeper.until_ms for keeper in reasons), default=0.0)
    attempt = process.attempts.get(life.ref)
    if attempt is not None and attempt.seq != resource.seq:
        attempt = None  # It was used since: that order no longer counts.
    orphan = next((i.reason for i in around.drift.orphans if i.ref == life.ref), None)
    ghost = any(i.ref == life.ref for i in around.drift.ghosts)
    verdict = _verdict(resource, attempt, until, now, around, ghost=ghost, orphan=bool(orphan))
    said = [f"It is alive since {clock(life.began.at_ms)} UTC, for {span(now - life.began.at_ms)}: "
            f"{_began(life)}."]  # fmt: skip
    said.append(_uses_so_far(life, now))
    if life.uses:
        said.append(f"It uses {_list(life.uses)} and keeps that alive.")
    said += _what_keeps(reasons, resource, now)
    if ghost:
        said.append(
            "Its registry does not hold it any more, so it is drift (a ghost): the log is corrected."
        )
    if orphan is not None:
        said.append(f"It is drift (an orphan), because {orphan}.")
    next_try: int | None = None
    trial = life.trials[-1] if life.trials else None
    if trial is not None:
        said.append(_tried(trial))
    if attempt is not None:
        next_try = retry_at(life.ref, attempt, around.policy)
    said += _what_next(life.ref, attempt, next_try, until, around, orphan=orphan, ghost=ghost)
    return Explanation(
        life.ref, life.process, verdict, tuple(said), life,
        until_ms=None if until == inf else int(until), keepers=tuple(reasons), next_try_ms=next_try,
    )  # fmt: skip


def _verdict(
    resource: Resource,
    attempt: Attempt | None,
    until: float,
    now: int,
    around: Around,
    *,
    ghost: bool,
    orphan: bool,
) -> Verdict:
    if ghost:
        return "ghost"
    if attempt is not None and not attempt.pending:
        if attempt.failures >= around.policy.stuck_after:
            return "stuck"
        return "refused" if attempt.refused else "failing"
    if resource.in_use > 0:
        return "in_use"
    if orphan:
        return "due"
    return "about_to_go" if until - now <= SOON_MS else "alive"


def _what_keeps(reasons: Sequence[Keeper], resource: Resource, now: int) -> list[str]:
    alive = [keeper for keeper in reasons if keeper.until_ms > now]
    if not alive:
        return ["Nothing keeps it alive any more."]
    users = [keeper for keeper in alive if keeper.why == "user"]
    said = []
    for keeper in alive:
        match keeper.why:
            case "in use":
                said.append(
                    f"It is acquired by {resource.in_use}: nothing tears it down before it is let go."
                )
            case "stay":
                said.append(f"A stay was asked for, until {clock(int(keeper.until_ms))} UTC.")
            case "awaits owner":
                said.append(
                    f"It waits for an owner that was announced, {_until(keeper.until_ms, now)}."
                )
            case "idle":
                said.append(f"Its own idle time keeps it alive {_until(keeper.until_ms, now)}.")
            case "owner":
                said.append(f"Its owner {keeper.ref} keeps it, {_until(keeper.until_ms, now)}.")
            case "for ever":
                said.append(
                    "Its kind has no idle limit and nothing owns it: only its service ends it."
                )
            case "user":
                pass
    if users:
        names = [keeper.ref or "" for keeper in users]
        after = users[0].after_ms
        more = f", and {after / 1000:g} s after that" if after else ""
        said.append(
            f"It is kept alive by {_list(names)}, which {'uses' if len(names) == 1 else 'use'} it{more}: "
            f"{_until(users[0].until_ms, now)}."
        )
    return said


def _until(until_ms: float, now: int) -> str:
    if until_ms == inf:
        return "for as long as it is held"
    return f"until {clock(int(until_ms))} UTC ({span(until_ms - now)} from now)"


def _tried(trial: Trial) -> str:
    asked, outcome = trial.asked, trial.outcome
    text = (
        f"{_worker(trial.worker)} ordered its teardown at {clock(asked.at_ms)} UTC (order "
        f"{asked.order_id}), because {asked.reason or 'it was no longer desired'}; "
    )
    if outcome is None:
        return f"{text}the host has not answered yet."
    took = span(outcome.at_ms - asked.at_ms)
    if outcome.type == "cleanup_refused":
        return f"{text}the host refused after {took}: {outcome.reason}."
    if outcome.type == "cleanup_failed":
        return f"{text}it failed after {took}: {outcome.reason}."
    return f"{text}that was done after {took}."


def _what_next(
    ref: str,
    attempt: Attempt | None,
    next_try: int | None,
    until: float,
    around: Around,
    *,
    orphan: str | None,
    ghost: bool,
) -> list[str]:
    """What would end it, and when; or what is in the way."""
    if orphan is None and not ghost:
        return _when_desired(attempt, until, around.now_ms)
    said = []
    if attempt is not None and next_try is not None:
        said.append(_next_try(attempt, next_try, around))
    else:
        waiting = next((w for w in around.plan.waiting if w.item.ref == ref), None)
        if waiting is not None and not waiting.until_ms:
            said.append(f"It has to wait: {waiting.reason}.")
        elif around.holder is not None:
            said.append(f"{_worker(around.holder)} sends the order at its next pass.")
    if around.holder is None:
        said.append(
            f"But no worker acts for partition {around.partition}: nothing is torn down until one "
            "runs; start it with `agent-reconciler worker`."
        )
    return said


def _when_desired(attempt: Attempt | None, until: float, now: int) -> list[str]:
    said = []
    if attempt is not None and not attempt.pending:
        said.append("By now it is desired again: nothing is tried until it is not.")
    if until == inf:
        said.append("As things are, no time limit ends it.")
    else:
        said.append(
            f"If nothing uses it before, it is torn down at {clock(int(until))} UTC, "
            f"{span(until - now)} from now."
        )
    return said


def _next_try(attempt: Attempt, next_try: int, around: Around) -> str:
    if attempt.pending:
        return f"Without an answer, it is tried again at {clock(next_try)} UTC."
    when = f"at {clock(next_try)} UTC" if next_try > around.now_ms else "at the next pass"
    if attempt.failures >= around.policy.stuck_after:
        return (
            f"It did not succeed {attempt.failures} times in a row and is reported as stuck: "
            f"somebody should look. The next try is {when}; `agent-reconciler reconcile` tries at once."
        )
    count = f"{attempt.failures} of {around.policy.stuck_after} failures"
    return f"The next try is {when} ({count} until it is reported as stuck)."


# --- ended ----------------------------------------------------------------------------------------


def _ended(life: Life) -> Explanation:
    end = life.ended
    assert end is not None
    if life.process == NO_PROCESS:
        by = _worker(Worker.of(end.process), start=False)
        told = (
            "It is a conversation: no process held it, and of its life the log tells the end only.",
            f"The log was told at {clock(end.at_ms)} UTC by {by}: {end.reason}.",
        )
        return Explanation(life.ref, life.process, "deleted", told, life)
    said = [
        f"It lived for {span(end.at_ms - life.began.at_ms)}, from {clock(life.began.at_ms)} to "
        f"{clock(end.at_ms)} UTC: {_began(life)}.",
        _uses_so_far(life, end.at_ms),
    ]
    former = life.last_user()
    if former is not None and former.end is not None and former.end.at_ms <= end.at_ms:
        said.append(_cause(f"{former.ref}, the last that used it,", former.end))
    if life.owner_ended is not None:
        said.append(_cause(f"Its owner {life.owned_by}", life.owner_ended))
    verdict: Verdict
    if end.type in {"process_lost", "process_stopped"}:
        lost = end.type == "process_lost"
        verdict = "lost" if lost else "stopped"
        said += _end_of_process(life, lost=lost)
    elif end.order_id:
        verdict = "torn_down"
        said += _by_order(life)
    else:
        verdict = "removed"
        said.append(
            f"No order ended it, its service did, at {clock(end.at_ms)} UTC (event {end.seq}): "
            f"{end.reason or 'without a reason'}."
        )
    for entry, moment in life.entries:
        said.append(
            f"{entry}, which named it, was removed at {clock(moment.at_ms)} UTC"
            f"{f' by order {moment.order_id}' if moment.order_id else ''}."
        )
    return Explanation(life.ref, life.process, verdict, tuple(said), life)


def _end_of_process(life: Life, *, lost: bool) -> list[str]:
    end = life.ended
    assert end is not None
    if not lost:
        return [f"Its process stopped in good order at {clock(end.at_ms)} UTC, and it with that."]
    by = _worker(Worker.of(end.process), start=False)
    said = [
        f"Its process was declared lost at {clock(end.at_ms)} UTC by {by}: "
        f"{end.reason or 'it was not heard of in time'}.",
        "All that the process held was closed in the log with it; there was nothing left to tear down.",
    ]
    if life.ref.startswith("session/"):
        said.append("The conversation itself is data in Redis, and can go on in another process.")
    return said


def _by_order(life: Life) -> list[str]:
    end, trial = life.ended, life.end_trial
    assert end is not None
    if trial is None:
        return [
            f"It was ended at {clock(end.at_ms)} UTC by order {end.order_id}, whose beginning the log "
            f"no longer has: {end.reason}."
        ]
    asked = trial.asked
    sort = "a ghost" if trial.sort == "ghost" else f"an {trial.sort}"
    what = "it" if asked.ref == life.ref else asked.ref
    said = []
    tries = life.trials_count - (asked.ref == life.ref)
    if tries:
        before = [t for t in life.trials if t is not trial and t.outcome is not None]
        last = (
            f", the last time because {before[-1].outcome.reason}"
            if before and before[-1].outcome
            else ""
        )
        said.append(f"{tries} earlier {'order' if tries == 1 else 'orders'} did not end it{last}.")
    said.append(
        f"{_worker(trial.worker)} found {what} to be {sort} at {clock(asked.at_ms)} UTC and sent order "
        f"{asked.order_id}, because {asked.reason}."
    )
    went = "" if asked.ref == life.ref else f"It went along with {asked.ref}. "
    said.append(
        f"{went}The host carried the order out after {span(end.at_ms - asked.at_ms)}, at "
        f"{clock(end.at_ms)} UTC (event {end.seq}): outcome {end.type}."
    )
    return said


def _cause(what: str, end: Any) -> str:
    by = f" by order {end.order_id}" if end.order_id else ""
    return f"{what} ended at {clock(end.at_ms)} UTC{by}: {end.reason or 'without a reason'}."


# --- words ----------------------------------------------------------------------------------------


def _began(life: Life) -> str:
    began = life.began
    how = {
        "created": "created",
        "adopted": "adopted into the log",
    }.get(began.type, "first heard of")
    text = f"{how} with event {began.seq} of its process"
    if life.user:
        text += f", for user {life.user}"
    if began.trace_id:
        text += f", by the request with trace {began.trace_id}"
    if began.reason:
        text += f" ({began.reason})"
    return text


def _uses_so_far(life: Life, now: int) -> str:
    if life.last_use is None:
        return "It was never used after that."
    at_ms, by, moment = life.last_use
    whose = f"event {moment.seq}" if by == life.ref else f"through {by}, event {moment.seq}"
    times = "once" if life.use_count == 1 else f"{life.use_count} times"
    before = "ago" if life.ended is None else "before its end"
    return f"It was used {times} after that, the last time {span(now - at_ms)} {before} ({whose})."


def _worker(worker: Worker, *, start: bool = True) -> str:
    name = f"{'W' if start else 'w'}orker {worker.name}"
    if worker.epoch is None:
        return name
    return f"{name} (partition {worker.partition}, epoch {worker.epoch})"


def _list(names: Sequence[str]) -> str:
    shown = list(names[:_SHOWN])
    if len(names) > _SHOWN:
        return f"{', '.join(shown)} and {len(names) - _SHOWN} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]])) if shown else ""
