"""The graph of one process: who uses what, who owns what, which index entries name what. Pure.

The events give each edge at its lower end only (a session says that it uses a runner); planning a
teardown needs the other end. `graph_of` derives it from the state, at the cost of everything alive;
`ProcessWatch` keeps it as events come, at the cost of the change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from reconciler.fold import ProcessState
from store.messages import IndexEntry, Inventory

Refs = dict[str, None]
"""References, in the order in which they came: a set with an order, so that plans are repeatable."""


@dataclass(slots=True)
class Graph:
    """The edges of one process, seen from above.

    Attributes:
        users: reference -> what uses it.
        owned: reference -> what is owned by it.
        named: reference -> index entries that name it.
    """

    users: dict[str, Refs] = field(default_factory=dict)
    owned: dict[str, Refs] = field(default_factory=dict)
    named: dict[str, dict[IndexEntry, None]] = field(default_factory=dict)

    def users_of(self, ref: str) -> Iterable[str]:
        return self.users.get(ref, ())

    def owned_by(self, ref: str) -> Iterable[str]:
        return self.owned.get(ref, ())

    def naming(self, ref: str) -> Iterable[IndexEntry]:
        return self.named.get(ref, ())

    def link(self, ref: str, uses: Iterable[str], owner: str | None) -> None:
        """Enters the edges of a resource."""
        for used in uses:
            if used != ref:
                self.users.setdefault(used, {})[ref] = None
        if owner is not None and owner != ref:
            self.owned.setdefault(owner, {})[ref] = None

    def unlink(self, ref: str, uses: Iterable[str], owner: str | None) -> None:
        """Takes the edges of a resource out."""
        for used in uses:
            _discard(self.users, used, ref)
        if owner is not None:
            _discard(self.owned, owner, ref)


def _discard(edges: dict[str, Refs], end: str, ref: str) -> None:
    refs = edges.get(end)
    if refs is not None:
        refs.pop(ref, None)
        if not refs:
            del edges[end]


def graph_of(process: ProcessState, inventory: Inventory | None = None) -> Graph:
    """Derives the graph of what is alive."""
    graph = Graph()
    for ref, resource in process.resources.items():
        graph.link(ref, resource.uses, resource.owned_by)
    for entry in inventory.entries if inventory is not None else ():
        graph.named.setdefault(entry.target, {})[entry] = None
    return graph


def circles(edges: Mapping[str, Sequence[str]]) -> list[set[str]]:
    """Strongly connected components: Tarjan's algorithm (1972), without recursion.

    Args:
        edges: node -> where it leads; nodes that are no key of it do not count.

    Returns:
        The components, those that lead to others first; one that is in no circle is alone in its own.
    """
    found: list[set[str]] = []
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    for root in edges:
        if root in number:
            continue
        todo = [(root, iter(edges[root]))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while todo:
            ref, following = todo[-1]
            for kept in following:
                if kept not in edges:
                    continue
                if kept not in number:
                    number[kept] = low[kept] = len(number)
                    stack.append(kept)
                    on_stack.add(kept)
                    todo.append((kept, iter(edges[kept])))
                    break
                if kept in on_stack:
                    low[ref] = min(low[ref], number[kept])
            else:
                todo.pop()
                if todo:
                    low[todo[-1][0]] = min(low[todo[-1][0]], low[ref])
                if low[ref] == number[ref]:
                    at = stack.index(ref)
                    circle, stack[at:] = set(stack[at:]), []
                    on_stack -= circle
                    found.append(circle)
    return found[::-1]
