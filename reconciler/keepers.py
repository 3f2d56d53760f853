"""What keeps a resource alive, and until when: `desired_until`, told apart into its reasons. Pure.

`desired_until` gives one number per resource. This names where the number comes from: the resource's
own idle time, a stay, whoever has it acquired, what uses it, what owns it. The latest of them is what
would end it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from reconciler.desired import desired_until
from reconciler.fold import ProcessState
from reconciler.policy import Policy

Why = Literal["in use", "idle", "stay", "awaits owner", "owner", "user", "for ever"]


@dataclass(frozen=True, slots=True)
class Keeper:
    """One reason for which a resource is desired.

    Attributes:
        why: `in use` acquired; `idle` its own idle time; `stay` somebody asked for it; `awaits owner`
            it is to get an owner; `owner`, `user` the resource `ref` keeps it; `for ever` its kind
            has no idle time.
        until_ms: Redis time until which it does, `inf` for ever.
        ref: the owner or user.
        after_ms: idle time added to the end of a user.
    """

    why: Why
    until_ms: float
    ref: str | None = None
    after_ms: float = 0.0


def keepers(ref: str, process: ProcessState, policy: Policy) -> list[Keeper]:
    """The reasons for which a live resource is desired, the one that lasts longest first.

    Args:
        ref: alive in the process.
        process: its process.
        policy: what is desired.
    """
    resource = process.resources[ref]
    until = desired_until(process, policy)
    found: list[Keeper] = []
    if resource.in_use > 0:
        found.append(Keeper("in use", inf))
    if resource.keep_until_ms:
        found.append(Keeper("stay", float(resource.keep_until_ms)))
    idle = policy.idle_ms(resource.kind)
    owner = resource.owned_by
    if owner is not None:
        if owner in process.resources and owner != ref:
            found.append(Keeper("owner", until[owner], owner))
    elif resource.awaits_owner:
        wait = policy.owner_timeout
        limit = inf if wait is None else resource.used_ms + wait * 1000
        found.append(Keeper("awaits owner", limit))
    elif idle is None:
        found.append(Keeper("for ever", inf))
    else:
        found.append(Keeper("idle", resource.used_ms + idle))
    after = idle or 0.0
    for name, other in process.resources.items():
        if name != ref and ref in other.uses:
            found.append(Keeper("user", until[name] + after, name, after))
    found.sort(key=lambda keeper: -keeper.until_ms)
    return found
