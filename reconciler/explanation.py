"""Explains one life in sentences: alive or not, since when, because of what, and what comes next. Pure.

Everything said here stands in the log, in the policy, or in the plan that a worker would make now;
nothing is guessed. The sentences are for somebody who has never seen this resource and is in a hurry:
first what it is, then why, then what happens next and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

from reconciler.drift import Drift
from reconciler.ending import how_it_ended
from reconciler.fold import Attempt, ProcessState, Resource
from reconciler.keepers import Keeper, keepers
from reconciler.life import Life, Trial, Worker
from reconciler.moment import clock, span
from reconciler.phrases import began, some_of, uses_so_far, worker_name
from reconciler.plan import Plan, retry_at
from reconciler.policy import Policy

Verdict = Literal[
    "alive", "in_use", "about_to_go", "due", "refused", "failing", "stuck", "ghost",
    "torn_down", "removed", "lost", "stopped", "deleted",
]  # fmt: skip

SOON_MS = 60_000
"""What has less than this left is said to be about to go."""

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
        ending, said = how_it_ended(life)
        return Explanation(life.ref, life.process, ending, tuple(said), life)
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
            f"{began(life)}."]  # fmt: skip
    said.append(uses_so_far(life, now))
    if life.uses:
        said.append(f"It uses {some_of(life.uses)} and keeps that alive.")
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
            f"It is kept alive by {some_of(names)}, which {'uses' if len(names) == 1 else 'use'} it{more}: "
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
        f"{worker_name(trial.worker)} ordered its teardown at {clock(asked.at_ms)} UTC (order "
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
            said.append(f"{worker_name(around.holder)} sends the order at its next pass.")
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
