"""Goes through the log one event at a time, forward and back, with the state at each. Pure.

Folding has no inverse, so each step forward first notes what its event is going to touch: the
resource, what that uses, its attempts, the numbers of its process. A step back puts just that back.
A step so costs the same whether ten or a million resources are alive, in either direction.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reconciler.fold import Event, FleetState, ProcessState, Resource, target_of

BACK_KEPT = 10_000
"""Steps that can be taken back."""


@dataclass(slots=True)
class _Undo:
    """What one event touched, as it was before."""

    entry_id: str
    event: Event
    holder: str
    process: ProcessState | None
    numbers: tuple[int, int, int]
    fleet: tuple[int, int, int]
    resources: dict[str, Resource | None]
    target: str
    attempts: dict[str, Any]
    gone: dict[str, int | None]
    memory: dict[str, int]


class Stepper:
    """A state that can be taken forward and back.

    Args:
        state: where to begin; it is changed in place.
        kept: how many steps can be taken back.
    """

    def __init__(self, state: FleetState, kept: int = BACK_KEPT) -> None:
        self.state = state
        self._undo: deque[_Undo] = deque(maxlen=kept)

    def __len__(self) -> int:
        """How many steps can be taken back now."""
        return len(self._undo)

    def forward(self, entry_id: str, event: Event) -> None:
        """Folds one event."""
        state = self.state
        holder = event.holder or event.process
        process = state.processes.get(holder)
        attrs = event.attrs or {}
        registry = attrs.get("registry")
        target = target_of(
            event.ref, None if registry is None else str(registry), str(attrs.get("key"))
        )
        undo = _Undo(
            entry_id, event, holder, process,
            (0, 0, 0) if process is None else (process.started_ms, process.last_ms, process.seq),
            (state.events, state.lost, state.stopped),
            {}, target, {}, {}, {},
        )  # fmt: skip
        if process is not None:
            resource = process.resources.get(event.ref)
            touched = {event.ref, *(event.uses or ()), *(() if resource is None else resource.uses)}
            undo.resources = {ref: copy.copy(process.resources.get(ref)) for ref in touched}
            undo.attempts = {
                name: copy.copy(process.attempts.get(name)) for name in {target, event.ref}
            }
            undo.gone = {name: process.gone.get(name) for name in {target, event.ref}}
            # When the oldest memories make room, the fold goes on with another dict.
            undo.memory = process.gone
        self._undo.append(undo)
        state.apply(event, int(entry_id.partition("-")[0]))

    def back(self) -> bool:
        """Takes the last step back; False when there is none that is remembered."""
        if not self._undo:
            return False
        undo = self._undo.pop()
        state = self.state
        state.events, state.lost, state.stopped = undo.fleet
        process = undo.process
        if process is None:
            state.processes.pop(undo.holder, None)
            return True
        state.processes[undo.holder] = process
        process.started_ms, process.last_ms, process.seq = undo.numbers
        _restore(process.resources, undo.resources)
        _restore(process.attempts, undo.attempts)
        process.gone = undo.memory
        _restore(process.gone, undo.gone)
        return True

    @property
    def last(self) -> tuple[str, Event] | None:
        """Entry id and event of the step that was taken last; None at the beginning."""
        return (self._undo[-1].entry_id, self._undo[-1].event) if self._undo else None


def _restore(values: dict[str, Any], before: Mapping[str, Any]) -> None:
    for name, value in before.items():
        if value is None:
            values.pop(name, None)
        else:
            values[name] = value
