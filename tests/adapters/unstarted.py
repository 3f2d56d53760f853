"""A host that was not started, and what it recorded so far."""

from __future__ import annotations

from adapters import Host
from reconciler.fold import FleetState
from store import connect
from tests.support import waiting


def unstarted() -> Host:
    """A host that was not started: events gather in its outbox."""
    return Host(connect("redis://nowhere"), name="svc")


def alive(host: Host) -> set[str]:
    """What the events recorded so far say is alive."""
    state = FleetState()
    for row in waiting(host.recorder):
        state.apply(row, 0)
    return {ref for process in state.processes.values() for ref in process.resources}


def types_of(host: Host) -> list[str]:
    return [row.type for row in waiting(host.recorder)]
