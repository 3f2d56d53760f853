"""A fleet and its resources as plain values: one shape for the command line and the page.

`status --json`, `replay --json` and the JSON API print what is made here, so that they cannot
disagree about what they count.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from reconciler.fleet import Fleet
from reconciler.fold import Resource
from reconciler.stuck import find_stuck


def describe(fleet: Fleet) -> dict[str, Any]:
    """A fleet as plain values."""
    processes = []
    for name, process in fleet.state.processes.items():
        summary = fleet.summaries.get(name)
        processes.append(
            {
                "process": name,
                "started_ms": process.started_ms,
                "last_event_ms": process.last_ms,
                "events": process.seq,
                "resources": dict(Counter(r.kind for r in process.resources.values())),
                "in_use": sum(1 for r in process.resources.values() if r.in_use),
                "registries": {r.name: r.count for r in summary.registries} if summary else {},
                "rss": summary.rss if summary else None,
                "fds": summary.fds if summary else None,
                "outbox": summary.outbox if summary else None,
                "spilled": summary.spilled if summary else None,
                "dropped": summary.dropped if summary else None,
                "outbox_problem": summary.outbox_problem if summary else None,
            }
        )
    drift = fleet.drift
    return {
        "now_ms": fleet.now_ms,
        "processes": processes,
        "resources": dict(
            Counter(r.kind for p in fleet.state.processes.values() for r in p.resources.values())
        ),
        "drift": {
            "orphans": len(drift.orphans),
            "dangling": len(drift.dangling),
            "ghosts": len(drift.ghosts),
            "untracked": len(drift.untracked),
        },
        "waiting": len(fleet.plan.waiting),
        "stuck": [
            {
                "ref": one.ref,
                "process": one.process,
                "entry": one.entry,
                "failures": one.failures,
                "reason": one.reason,
                "next_try_ms": one.next_try_ms,
            }
            for one in find_stuck(fleet.state.processes.values(), fleet.policy)
        ],
        "workers": fleet.workers,
        "quarantined": fleet.quarantined,
        "events": fleet.state.events,
        "processes_lost": fleet.state.lost,
        "processes_stopped": fleet.state.stopped,
    }


def describe_resource(process: str, resource: Resource) -> dict[str, Any]:
    """A live resource as plain values."""
    return {
        "ref": resource.ref,
        "process": process,
        "created_ms": resource.created_ms,
        "used_ms": resource.used_ms,
        "uses": list(resource.uses),
        "owned_by": resource.owned_by,
        "in_use": resource.in_use,
        "seq": resource.seq,
    }
