"""`replay --step`: the log one event at a time, forward and back, with the state beside it.

Keys come from the terminal, one by one, or from a pipe: then the same keys are the script, and each
step is printed below the one before.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from reconciler.changes import alive_by_kind
from reconciler.cli.log import line
from reconciler.cli.output import ago, clock, console, emit
from reconciler.describe import describe_resource
from reconciler.fold import FleetState
from reconciler.phrases import counted
from reconciler.steps import BACK_KEPT, Stepper
from store.event import LogEntry

KEYS = "n → next   p ← back   N ten on   P ten back   e end   q quit"
_NEXT = {"n", " ", "\r", "\n", "\x1b[C", "\x1b[B"}
_BACK = {"p", "b", "\x1b[D", "\x1b[A"}
_QUIT = {"q", "\x03", "\x04", "\x1b", ""}
_TEN = 10


class Walk:
    """Where one is in the log, and what is alive there.

    Args:
        state: at the beginning.
        entries: what comes after it, in the order of the log.
        resource: stop only at events about this one; None stops at each.

    Attributes:
        number: steps from the beginning.
        alive: how many of each kind are.
        came: by how many these differ from where one was before.
    """

    def __init__(
        self, state: FleetState, entries: AsyncIterator[LogEntry], resource: str | None = None
    ) -> None:
        self.number = 0
        self.alive = alive_by_kind(state)
        self.came: Counter[str] = Counter()
        self._stepper = Stepper(state)
        self._entries = entries
        self._resource = resource
        self._behind: deque[tuple[LogEntry, Counter[str]]] = deque(maxlen=BACK_KEPT)
        self._ahead: list[LogEntry] = []

    @property
    def state(self) -> FleetState:
        return self._stepper.state

    @property
    def entry(self) -> LogEntry | None:
        """The event that was folded last; None at the beginning."""
        return self._behind[-1][0] if self._behind else None

    async def forward(self) -> bool:
        """One stop on; False at the end of the log."""
        moved = False
        while (entry := await self._following()) is not None:
            moved = True
            self._fold(entry)
            if self._resource in (None, entry.event.ref):
                break
        return moved and entry is not None

    def back(self) -> bool:
        """One stop back; False at the beginning, or where it is no longer remembered."""
        moved = False
        while self._behind and self._stepper.back():
            moved = True
            entry, self.alive = self._behind.pop()
            self._ahead.append(entry)
            self.number -= 1
            if self._resource is None or (
                self.entry is not None and self.entry.event.ref == self._resource
            ):
                break
        return moved

    async def _following(self) -> LogEntry | None:
        return self._ahead.pop() if self._ahead else await anext(self._entries, None)

    def _fold(self, entry: LogEntry) -> None:
        event, processes = entry.event, self.state.processes
        holder = event.holder or event.process
        process = processes.get(holder)
        was = process is not None and event.ref in process.resources
        self._behind.append((entry, self.alive))
        self._stepper.forward(entry.id, event)
        self.number += 1
        after = processes.get(holder)
        alive = self.alive.copy()
        if after is None:
            alive -= Counter(r.kind for r in process.resources.values()) if process else Counter()
        elif (event.ref in after.resources) != was:
            alive[event.kind] += -1 if was else 1
        self.alive = +alive

    def describe(self) -> dict[str, Any]:
        """Where one is, as plain values."""
        entry = self.entry
        found = [] if entry is None else list(self.state.find(entry.event.ref))
        return {
            "step": self.number,
            "id": entry.id if entry else None,
            "event": entry.event.model_dump(mode="json", exclude_none=True) if entry else None,
            "alive": dict(self.alive),
            "processes": len(self.state.processes),
            "resource": [describe_resource(p.id, resource) for p, resource in found],
        }


def difference(after: Counter[str], before: Counter[str]) -> Counter[str]:
    return Counter({k: after[k] - before[k] for k in after | before if after[k] != before[k]})


async def walk(steps: Walk, *, as_json: bool) -> None:
    """Goes where the keys say, until `q` or the end of the keys."""
    with _Keys() as keys:
        await _walk(steps, keys, as_json=as_json)


async def _walk(steps: Walk, keys: _Keys, *, as_json: bool) -> None:
    out = console()
    _show(out, steps, as_json=as_json)
    while (key := await asyncio.to_thread(keys.next)) not in _QUIT:
        before = steps.alive
        if key in _NEXT or key == "N":
            moved = await _several(steps, _TEN if key == "N" else 1)
        elif key in _BACK or key == "P":
            moved = _several_back(steps, _TEN if key == "P" else 1)
        elif key == "e":
            moved = await _several(steps, None)
        else:
            continue
        steps.came = difference(steps.alive, before)
        _show(out, steps, as_json=as_json, edge=None if moved else _edge(key))


async def _several(steps: Walk, count: int | None) -> bool:
    moved, taken = False, 0
    while (count is None or taken < count) and await steps.forward():
        moved, taken = True, taken + 1
    return moved


def _several_back(steps: Walk, count: int) -> bool:
    moved = False
    for _ in range(count):
        moved |= steps.back()
    return moved


def _edge(key: str) -> str:
    return "that was the first" if key in _BACK or key == "P" else "that was the last"


class _Keys:
    """Keys, one by one: of the terminal, without Return and without echo, or of a pipe.

    The terminal is set once for the whole walk, so that what is typed ahead is not lost. Ctrl-C comes
    as a key like the others: nothing is left to interrupt a read that waits.
    """

    def __init__(self) -> None:
        self._typed = ""
        self._before: list[Any] | None = None

    def __enter__(self) -> _Keys:
        if sys.stdin.isatty():
            import termios

            self._before = termios.tcgetattr(sys.stdin)
            mode = termios.tcgetattr(sys.stdin)
            mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, mode)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            import termios

            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def next(self) -> str:
        """The next key; empty at the end of a pipe."""
        if self._before is None:
            return sys.stdin.read(1)
        if not self._typed:
            self._typed = os.read(sys.stdin.fileno(), 64).decode(errors="replace")
        length = 3 if self._typed.startswith("\x1b[") else 1
        key, self._typed = self._typed[:length], self._typed[length:]
        return key


def _show(out: Console, steps: Walk, *, as_json: bool, edge: str | None = None) -> None:
    if as_json:
        emit(steps.describe())
        sys.stdout.flush()
        return
    if out.is_terminal:
        out.clear()
    out.print(_picture(steps, keys=out.is_terminal), soft_wrap=True)
    if edge is not None:
        out.print(edge)


def _picture(steps: Walk, *, keys: bool) -> Group:
    entry = steps.entry
    head = Text(f"[{steps.number}] ", style="bold")
    if entry is None:
        head.append("before the first event")
    else:
        head.append_text(line(entry))
        head.append(f"  {entry.id}", style="dim")
    parts: list[Any] = [head, _alive(steps)]
    if entry is not None:
        found = list(steps.state.find(entry.event.ref))
        for process, resource in found:
            facts = {
                "resource": resource.ref,
                "process": process.id,
                "created": clock(resource.created_ms),
                "last used": f"{ago(entry.at_ms - resource.used_ms)} before",
                "in use": resource.in_use or "",
                "uses": ", ".join(resource.uses),
                "owned by": resource.owned_by or "",
                "seq": resource.seq,
            }
            parts += [Text(f"    {name}: {value}") for name, value in facts.items() if value != ""]
        if not found and not entry.event.ref.startswith("process/"):
            parts.append(Text(f"    {entry.event.ref} is not alive"))
    if keys:
        parts += [Text(""), Text(KEYS, style="dim")]
    return Group(*parts)


def _alive(steps: Walk) -> Text:
    text = Text(f"    alive in {counted(len(steps.state.processes), 'process', 'processes')}: ")
    kinds = sorted(steps.alive.keys() | steps.came.keys())
    for number, kind in enumerate(kinds):
        text.append(f"{', ' if number else ''}{steps.alive[kind]} {kind}")
        if change := steps.came[kind]:
            text.append(f" ({change:+d})", style="green" if change > 0 else "red")
    if not kinds:
        text.append("nothing")
    return text
