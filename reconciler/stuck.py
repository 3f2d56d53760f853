"""Teardowns that failed so often that somebody should look. Pure.

A plan lists what waits for its next try; in the moment of the try it does not wait. What is stuck
stays stuck until it is gone, so this looks at the attempts themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from reconciler.fold import ProcessState
from reconciler.plan import retry_at
from reconciler.policy import Policy


@dataclass(frozen=True, slots=True)
class Stuck:
    """One teardown that is stuck.

    Attributes:
        ref, process: which, where.
        target: its name among the attempts of the process.
        entry: the index entry, where it is one: `registry[key]`.
        failures: so far.
        reason: of the last one.
        next_try_ms: Redis time of the next try; it may have passed.
    """

    ref: str
    process: str
    target: str
    entry: str | None
    failures: int
    reason: str
    next_try_ms: int


def find_stuck(processes: Iterable[ProcessState], policy: Policy) -> Iterator[Stuck]:
    """The teardowns that failed at least `stuck_after` times; what was used since does not count."""
    for process in processes:
        for target, attempt in process.attempts.items():
            if attempt.failures < policy.stuck_after:
                continue
            ref, *of_entry = target.split("\0")
            resource = process.resources.get(ref)
            if not of_entry and resource is not None and attempt.seq != resource.seq:
                continue
            entry = f"{of_entry[0]}[{of_entry[1]}]" if of_entry else None
            reason = attempt.reason or "no answer came"
            at = retry_at(target, attempt, policy)
            yield Stuck(ref, process.id, target, entry, attempt.failures, reason, at)
