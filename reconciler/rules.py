"""Rules of a user, guarded: one that raises ends nothing, is told of, and counts as saying nothing."""

from __future__ import annotations

from reconciler.fold import ProcessState, Resource
from reconciler.policy import Policy, Rule
from store.logs import Trouble, get_logger

log = get_logger("reconciler.rules")


def guarded(policy: Policy) -> Policy:
    """The same policy, with rules that never raise."""
    if not policy.rules:
        return policy
    return policy.model_copy(update={"rules": tuple(map(_guarded, policy.rules))})


def _guarded(rule: Rule) -> Rule:
    name = getattr(rule, "__qualname__", repr(rule))
    trouble = Trouble(log, "a rule of the policy failed; it counts as saying nothing")

    def never_raises(resource: Resource, process: ProcessState, now_ms: int) -> str | None:
        try:
            return rule(resource, process, now_ms)
        except Exception as error:
            trouble.say(rule=name, ref=resource.ref, error=f"{type(error).__name__}: {error}")
            return None

    return never_raises
