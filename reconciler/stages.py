"""Stages: the order in which a set of teardowns is safe. Pure.

A session goes before the runner it uses, a runner before its agent, an owner before what it owns. Where
resources use each other in a circle there is no order: its members go together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from reconciler.fold import ProcessState
from reconciler.graph import Refs, circles

_KIND_STAGE = {"session": 0, "runner": 1, "agent": 2}
_OWNED_STAGE = 3


def stage_of_kind(kind: str) -> int:
    """The earliest stage at which resources of a kind go."""
    return _KIND_STAGE.get(kind, _OWNED_STAGE)


def before(
    process: ProcessState,
    ref: str,
    going: Collection[str],
    users: Mapping[str, Refs],
) -> tuple[str, ...]:
    """What else of the plan must be gone before `ref` may go."""
    owner = process.resources[ref].owned_by
    earlier = [user for user in users.get(ref, ()) if user in going]
    if owner is not None and owner in going and owner != ref:
        earlier.append(owner)
    return tuple(earlier)


def stages_of(
    process: ProcessState, going: Collection[str], users: Mapping[str, Refs]
) -> tuple[dict[str, int], dict[str, set[str]]]:
    """A stage for each: after its users, after its owner, and not before its kind's turn.

    In a circle there is no order: its members are of one stage, and what hangs on it comes later.

    Returns:
        The stages, and for each member of a circle the whole circle.
    """
    earlier = {ref: before(process, ref, going, users) for ref in going}
    left: dict[str, int] = {ref: len(refs) for ref, refs in earlier.items()}
    after: dict[str, list[str]] = defaultdict(list)
    for ref, refs in earlier.items():
        for one in refs:
            after[one].append(ref)
    stages = {ref: stage_of_kind(process.resources[ref].kind) for ref in going}
    free = [ref for ref, count in left.items() if count == 0]
    while free:
        ref = free.pop()
        for following in after[ref]:
            stages[following] = max(stages[following], stages[ref] + 1)
            left[following] -= 1
            if left[following] == 0:
                free.append(following)
    tangled = {ref for ref, count in left.items() if count}
    circle_of: dict[str, set[str]] = {}
    for together in circles({ref: after[ref] for ref in tangled}):
        outside = [one for ref in together for one in earlier[ref] if one not in together]
        stage = max(stages[ref] for ref in together)
        stage = max([stage, *(stages[one] + 1 for one in outside)])
        stages.update(dict.fromkeys(together, stage))
        if len(together) > 1:
            circle_of.update(dict.fromkeys(together, together))
    return stages, circle_of
