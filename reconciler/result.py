"""What a forced reconciliation found and did: the object that `reconcile --json` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from reconciler.plan import Plan, Step, Waiting
from store.messages import Action

Row = dict[str, Any]

LISTS = (
    "orphans",
    "dangling",
    "ghosts",
    "untracked",
    "torn_down",
    "corrected",
    "refused",
    "failed",
)
_LIST_OF = {
    "orphan": "orphans",
    "dangling": "dangling",
    "ghost": "ghosts",
    "untracked": "untracked",
}
_Key = tuple[str, str, str]


class Result:
    """Collects findings and outcomes.

    Attributes:
        processes: that were looked at.
        silent: of those, the ones that gave no fresh inventory in time; what they had published was
            used.
    """

    def __init__(self, processes: Iterable[str]) -> None:
        self.processes = list(processes)
        self.silent: set[str] = set()
        self._found: dict[_Key, Row] = {}
        self._outcomes: dict[_Key, Row] = {}
        self._left: dict[_Key, Row] = {}

    def found(self, plan: Plan) -> None:
        """Takes up what a plan wants done, and what it leaves alone."""
        for step in plan.steps:
            self._found.setdefault(_step_key(step), _row(step) | {"sort": step.sort})
        for waiting in plan.waiting:
            row = _waiting_row(waiting)
            self._found.setdefault(_key(row), row)

    def outcome(self, step: Step, type: str, reason: str) -> None:
        """Takes up how one order ended."""
        row = _row(step)
        if type == "cleanup_failed":
            row |= {"list": "failed", "reason": reason}
        elif type == "cleanup_refused":
            row |= {"list": "refused", "reason": reason}
        elif step.action in {Action.CLOSE_GHOST, Action.ADOPT}:
            row["list"] = "corrected"
        else:
            row["list"] = "torn_down"
        self._outcomes[_step_key(step)] = row

    def settle(self, plan: Plan) -> None:
        """Compares with what a last look found: what is gone is done, what is there is left."""
        still = {_step_key(step): _row(step) for step in plan.steps}
        still |= {_key(row): row for row in map(_waiting_row, plan.waiting)}
        for key, row in self._found.items():
            if key in still:
                if key not in self._outcomes:
                    self._left[key] = row
            else:
                # Gone, by its order or along with another: what was found is no more.
                outcome = self._outcomes.setdefault(key, dict(row))
                if outcome.get("list") != "corrected":
                    outcome["list"] = "torn_down"

    def as_dict(self) -> dict[str, Any]:
        """The object that is printed; see the README for its members."""
        lists: dict[str, list[Row]] = {name: [] for name in LISTS}
        for row in self._found.values():
            plain = {k: v for k, v in row.items() if k not in {"sort", "list"}}
            lists[_LIST_OF[row["sort"]]].append(plain)
        for row in self._outcomes.values():
            lists[row["list"]].append({k: v for k, v in row.items() if k not in {"sort", "list"}})
        left = [{k: v for k, v in row.items() if k != "sort"} for row in self._left.values()]
        return {
            "processes": self.processes,
            **lists,
            "waiting": left,
            "silent": sorted(self.silent),
        }


def merge(objects: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of several partitions as one."""
    merged: dict[str, Any] = {
        "processes": [],
        **{name: [] for name in LISTS},
        "waiting": [],
        "silent": [],
    }
    for one in objects:
        for name, values in merged.items():
            values.extend(one.get(name, []))
    return merged


def exit_status(result: Mapping[str, Any], *, dry_run: bool) -> int:
    """0 when nothing is left to do, 1 when something is."""
    if dry_run:
        return int(any(result[name] for name in _LIST_OF.values()))
    return int(bool(result["refused"] or result["failed"] or result["waiting"]))


def _row(step: Step) -> Row:
    row: Row = {
        "ref": step.ref, "process": step.process, "reason": step.reason, "action": str(step.action),
    }  # fmt: skip
    if step.registry is not None:
        row |= {"registry": step.registry, "key": step.key}
    return row


def _waiting_row(waiting: Waiting) -> Row:
    item = waiting.item
    row: Row = {
        "ref": item.ref, "process": item.process, "reason": item.reason, "waits": waiting.reason,
        "failures": waiting.failures, "stuck": waiting.stuck, "sort": item.sort,
    }  # fmt: skip
    if item.registry is not None:
        row |= {"registry": item.registry, "key": item.key}
    return row


def _key(row: Row) -> _Key:
    return row["process"], row["ref"], f"{row.get('registry')}\0{row.get('key')}"


def _step_key(step: Step) -> _Key:
    return step.process, step.ref, f"{step.registry}\0{step.key}"
