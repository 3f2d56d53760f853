"""An observed dict is the dict that it was, call by call, and its events tell its content."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters import Registry
from tests.adapters.unstarted import alive, unstarted

keys = st.sampled_from(["a", "b", "c", "d"])
values = st.integers(0, 3) | st.just([])


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """What a call returned, or which error it raised."""
    try:
        return "returned", call()
    except Exception as error:
        return "raised", type(error)


class SameAsADict(RuleBasedStateMachine):
    """Whatever is done to it, an observed dict behaves like the dict it replaced."""

    @initialize(default=st.booleans(), content=st.dictionaries(keys, values))
    def begin(self, default: bool, content: dict[str, Any]) -> None:
        self.plain: dict[str, Any] = defaultdict(list, content) if default else dict(content)
        self.host = unstarted()
        self.registry = self.host.add(Registry("item", copy.copy(self.plain)))

    def both(self, do: Callable[[dict[str, Any]], Any]) -> None:
        seq = self.host.recorder.seq
        before = dict(self.plain)
        assert outcome(lambda: do(self.registry)) == outcome(lambda: do(self.plain))
        if list(before) != list(self.plain):
            assert self.host.recorder.seq > seq, "the change was not recorded in the same tick"

    @rule(key=keys, value=values)
    def set_item(self, key: str, value: Any) -> None:
        self.both(lambda d: d.__setitem__(key, value))

    @rule(key=keys)
    def get_item(self, key: str) -> None:
        self.both(lambda d: d[key])

    @rule(key=keys)
    def delete(self, key: str) -> None:
        self.both(lambda d: d.__delitem__(key))

    @rule(key=keys)
    def pop(self, key: str) -> None:
        self.both(lambda d: d.pop(key))

    @rule(key=keys, default=values)
    def pop_with_default(self, key: str, default: Any) -> None:
        self.both(lambda d: d.pop(key, default))

    @rule()
    def popitem(self) -> None:
        self.both(lambda d: d.popitem())

    @rule()
    def clear(self) -> None:
        self.both(lambda d: d.clear())

    @rule(key=keys, value=values)
    def setdefault(self, key: str, value: Any) -> None:
        self.both(lambda d: d.setdefault(key, value))
        self.both(lambda d: d.setdefault(key))

    @rule(more=st.dictionaries(keys, values), named=values)
    def update(self, more: dict[str, Any], named: Any) -> None:
        self.both(lambda d: d.update(more))
        self.both(lambda d: d.update(list(more.items())))
        self.both(lambda d: d.update(more, a=named))
        self.both(lambda d: d.update())

    @rule(more=st.dictionaries(keys, values))
    def inplace_or(self, more: dict[str, Any]) -> None:
        self.registry |= more
        self.plain |= more
        assert self.host.registries == [self.registry]

    @rule(key=keys)
    def errors(self, key: str) -> None:
        wrong: list[Callable[[Any], Any]] = [
            lambda d: d.update(1),
            lambda d: d.update({}, {}),
            lambda d: d.pop(),
            lambda d: d.pop(key, 1, 2),
            lambda d: d.__setitem__([], 1),
            lambda d: d.pop([], None),
            lambda d: d.setdefault([], 1),
        ]
        for do in wrong:
            self.both(do)

    @invariant()
    def same_content(self) -> None:
        if not hasattr(self, "plain"):
            return
        assert self.registry == self.plain
        assert list(self.registry.items()) == list(self.plain.items())
        assert (self.registry | {"z": 1}) == (self.plain | {"z": 1})

    @invariant()
    def events_tell_the_content(self) -> None:
        if not hasattr(self, "plain"):
            return
        refs = {f"item/{key}" for key in self.plain}
        assert alive(self.host) == refs
        assert set(self.host.entries) == refs
        assert self.host.inventory().held == refs
        assert len(self.host.book) == self.registry.noted == len(refs)


TestSameAsADict = SameAsADict.TestCase
TestSameAsADict.settings = settings(max_examples=40, stateful_step_count=25)
