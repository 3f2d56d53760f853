"""How a life ended, in sentences: by an order, by its service, or with its process. Pure."""

from __future__ import annotations

from typing import Any, Literal

from reconciler.life import Life, Worker
from reconciler.moment import clock, span
from reconciler.phrases import began, uses_so_far, worker_name
from store.messages import NO_PROCESS

Ending = Literal["torn_down", "removed", "lost", "stopped", "deleted"]


def how_it_ended(life: Life) -> tuple[Ending, list[str]]:
    """In which way a life ended, and the sentences that tell of it.

    Args:
        life: one that has ended.
    """
    end = life.ended
    assert end is not None
    if life.process == NO_PROCESS:
        by = worker_name(Worker.of(end.process), start=False)
        return "deleted", [
            "It is a conversation: no process held it, and of its life the log tells the end only.",
            f"The log was told at {clock(end.at_ms)} UTC by {by}: {end.reason}.",
        ]
    said = [
        f"It lived for {span(end.at_ms - life.began.at_ms)}, from {clock(life.began.at_ms)} to "
        f"{clock(end.at_ms)} UTC: {began(life)}.",
        uses_so_far(life, end.at_ms),
    ]
    former = life.last_user()
    if former is not None and former.end is not None and former.end.at_ms <= end.at_ms:
        said.append(_cause(f"{former.ref}, the last that used it,", former.end))
    if life.owner_ended is not None:
        said.append(_cause(f"Its owner {life.owned_by}", life.owner_ended))
    ending: Ending
    if end.type in {"process_lost", "process_stopped"}:
        lost = end.type == "process_lost"
        ending = "lost" if lost else "stopped"
        said += _end_of_process(life, lost=lost)
    elif end.order_id:
        ending = "torn_down"
        said += _by_order(life)
    else:
        ending = "removed"
        said.append(
            f"No order ended it, its service did, at {clock(end.at_ms)} UTC (event {end.seq}): "
            f"{end.reason or 'without a reason'}."
        )
    for entry, moment in life.entries:
        said.append(
            f"{entry}, which named it, was removed at {clock(moment.at_ms)} UTC"
            f"{f' by order {moment.order_id}' if moment.order_id else ''}."
        )
    return ending, said


def _end_of_process(life: Life, *, lost: bool) -> list[str]:
    end = life.ended
    assert end is not None
    if not lost:
        return [f"Its process stopped in good order at {clock(end.at_ms)} UTC, and it with that."]
    by = worker_name(Worker.of(end.process), start=False)
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
        f"{worker_name(trial.worker)} found {what} to be {sort} at {clock(asked.at_ms)} UTC and sent order "
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
