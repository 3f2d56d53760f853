"""Values for the tests of the pure core, and a model of a fleet that carries out a whole plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from reconciler.fold import FleetState, ProcessState
from reconciler.graph import graph_of
from reconciler.plan import Plan
from store.event import EventRow
from store.messages import Action, IndexEntry, Inventory
from tests.support import row

P = "p"
KINDS = ("session", "runner", "agent", "lock")
REFS = [f"{kind}/{n}" for kind in KINDS for n in range(3)]
NOW = 10_000_000
refs = st.sampled_from(REFS)


@st.composite
def histories(
    draw: st.DrawFn, max_size: int = 25, *, attempts: bool = True
) -> list[tuple[int, EventRow]]:
    """A log of one process with any graph of uses and owners, circles included, and its times."""
    entries = []
    at = NOW - draw(st.integers(0, 9_000_000))
    kinds = ["created", "created", "created", "reused", "cleaned_up"]
    if attempts:
        kinds += ["cleanup_requested", "cleanup_failed", "cleanup_refused"]
    for seq in range(1, draw(st.integers(1, max_size)) + 1):
        at = min(NOW, at + draw(st.integers(0, 1_000_000)))
        type = draw(st.sampled_from(kinds))
        more: dict[str, Any] = {}
        if type in {"created", "reused"}:
            more = {
                "uses": draw(st.none() | st.lists(refs, max_size=2).map(tuple)),
                "owned_by": draw(st.none() | refs),
                "attrs": draw(
                    st.none()
                    | st.fixed_dictionaries(
                        {},
                        optional={
                            "in_use": st.integers(0, 2),
                            "keep_alive_s": st.integers(1, 9000),
                            "user": st.sampled_from("uv"),
                            "awaits_owner": st.just(True),
                        },
                    )
                ),
            }
        elif type != "cleaned_up":
            more = {"order_id": draw(st.sampled_from(["o1", "o2"])), "reason": "because"}
            if type == "cleanup_requested":
                more["attrs"] = {"expected_seq": draw(st.integers(0, seq))}
        entries.append((at, row(seq, type, draw(refs), **more)))
    return entries


@st.composite
def fleets(draw: st.DrawFn) -> list[tuple[int, EventRow]]:
    """A log of two processes and a worker, with all that the fold takes note of."""
    types = ["created", "created", "reused", "adopted", "cleaned_up", "cleanup_requested",
             "cleanup_failed", "cleanup_refused", "process_lost", "process_stopped"]  # fmt: skip
    entries, seqs, at = [], {"p": 0, "q": 0, "w": 0}, 1000
    for _ in range(draw(st.integers(0, 40))):
        at += draw(st.integers(0, 1))
        type = draw(st.sampled_from(types))
        host = draw(st.sampled_from("pq"))
        writer = "w" if type in {"cleanup_requested", "process_lost"} else host
        seqs[writer] += 1
        attrs = draw(st.none() | st.fixed_dictionaries({}, optional={
            "in_use": st.integers(0, 2) | st.just(2**80), "keep_alive_s": st.integers(1, 9000),
            "user": st.sampled_from("uv"), "awaits_owner": st.just(True), "registry": st.just("r"),
            "key": st.sampled_from("kl"), "expected_seq": st.integers(0, 40),
        }))  # fmt: skip
        entries.append((at, row(
            seqs[writer], type, draw(refs), process=writer, attrs=attrs,
            holder=host if writer != host else draw(st.sampled_from([None, None, host])),
            uses=draw(st.none() | st.lists(refs, max_size=2).map(tuple)),
            owned_by=draw(st.none() | refs), order_id=draw(st.sampled_from([None, "o1", "o2"])),
            reason=draw(st.none() | st.text(max_size=5).filter(lambda t: t.isprintable())),
        )))  # fmt: skip
    return entries


@st.composite
def inventories(draw: st.DrawFn, state: FleetState) -> dict[str, Inventory]:
    """What the process might hold: nearly what the log says, with additions and losses."""
    process = state.processes.get(P)
    alive = list(process.resources) if process is not None else []
    some = st.lists(st.sampled_from(alive or REFS), max_size=2)
    held = set(alive) - set(draw(some))
    held |= set(draw(st.lists(refs, max_size=1)))
    entries = draw(
        st.lists(
            st.builds(IndexEntry, st.just("index"), st.sampled_from("abc"), refs),
            max_size=6,
            unique=True,
        )
    )
    seq = process.seq if process is not None else 0
    kinds = frozenset(draw(st.sampled_from([KINDS, KINDS, KINDS[:2], ()])))
    held = {ref for ref in held if ref.partition("/")[0] in kinds}
    return {P: Inventory(P, seq, frozenset(held), tuple(entries), kinds)}


def apply(
    plan: Plan, state: FleetState, inventories: Mapping[str, Inventory], now_ms: int = NOW
) -> tuple[FleetState, dict[str, Inventory]]:
    """A fleet in which every step of a plan was carried out, each with its event."""
    state = state.copy()
    after = dict(inventories)
    for step in plan.steps:
        inventory = after.get(step.process) or Inventory(step.process, 0)
        held, entries = set(inventory.held), list(inventory.entries)
        type, attrs = "cleaned_up", None
        if step.action == Action.ADOPT:
            type = "adopted"
        elif step.action == Action.DROP_ENTRY:
            attrs = {"registry": step.registry, "key": step.key}
            entries = [
                e
                for e in entries
                if (e.registry, e.key, e.target) != (step.registry, step.key, step.ref)
            ]
        else:
            held.discard(step.ref)
        seq = state.processes[step.process].seq + 1
        state.apply(row(seq, type, step.ref, process=step.process, attrs=attrs), now_ms)
        if step.process in after:
            after[step.process] = Inventory(
                step.process, seq, frozenset(held), tuple(entries), inventory.kinds
            )
    return state, after


def orders(state: FleetState) -> list[object]:
    """The orders in which things stand, which equality of dicts does not see."""
    return [(list(p.resources), list(p.gone), list(p.attempts)) for p in state.processes.values()]


def users_of(process: ProcessState) -> dict[str, list[str]]:
    """Who uses what, among the living."""
    users = graph_of(process).users
    return {used: list(refs) for used, refs in users.items() if used in process.resources}
