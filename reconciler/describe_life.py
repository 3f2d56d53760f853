"""Lives and explanations as plain values, for `--json` and for whoever shows them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from reconciler.explanation import Explanation
from reconciler.life import Life, Trial


def describe_explanation(explanation: Explanation) -> dict[str, Any]:
    """An explanation as plain values."""
    life = explanation.life
    return {
        "ref": explanation.ref,
        "process": explanation.process,
        "verdict": explanation.verdict,
        "alive": life.alive,
        "sentences": list(explanation.sentences),
        "until_ms": explanation.until_ms,
        "next_try_ms": explanation.next_try_ms,
        "keepers": [
            {
                "why": keeper.why,
                "ref": keeper.ref,
                "until_ms": None if keeper.until_ms == inf else int(keeper.until_ms),
            }
            for keeper in explanation.keepers
        ],
        "life": describe_life(life),
    }


def describe_life(life: Life) -> Mapping[str, Any]:
    """A life as plain values."""
    end = life.ended
    return {
        "ref": life.ref,
        "process": life.process,
        "began_ms": life.began.at_ms,
        "began": life.began.type,
        "began_id": life.began.id,
        "trace_id": life.began.trace_id or None,
        "user": life.user,
        "uses": list(life.uses),
        "owned_by": life.owned_by,
        "use_count": life.use_count,
        "used": [{"at_ms": at_ms, "by": by} for at_ms, by in life.used],
        "users": [
            {"ref": user.ref, "since_ms": user.since_ms, "until_ms": user.until_ms}
            for user in (*life.users_ended, *life.users.values())
        ],
        "orders": [_describe_trial(trial) for trial in life.trials],
        "ended_ms": end.at_ms if end else None,
        "end": end.type if end else None,
        "end_id": end.id if end else None,
        "reason": end.reason if end else None,
        "order_id": (end.order_id or None) if end else None,
    }


def _describe_trial(trial: Trial) -> dict[str, Any]:
    outcome = trial.outcome
    return {
        "order_id": trial.asked.order_id,
        "at_ms": trial.asked.at_ms,
        "sort": trial.sort,
        "reason": trial.asked.reason,
        "worker": trial.worker.name,
        "partition": trial.worker.partition,
        "epoch": trial.worker.epoch,
        "outcome": outcome.type if outcome else None,
        "outcome_ms": outcome.at_ms if outcome else None,
        "outcome_reason": outcome.reason if outcome else None,
    }
