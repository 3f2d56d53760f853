"""Observed mappings: a service's dict, which tells of every change of itself in the same tick."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters import Host, Index, Registry
from adapters.registry import ObservedDict, observable
from reconciler.fold import FleetState
from store import connect
from store.messages import IndexEntry
from tests.support import waiting

keys = st.sampled_from(["a", "b", "c", "d"])
values = st.integers(0, 3) | st.just([])


def unstarted() -> Host:
    """A host that was not started: events gather in its outbox."""
    return Host(connect("redis://nowhere"), name="svc")


def alive(host: Host) -> set[str]:
    """What the events recorded so far say is alive."""
    state = FleetState()
    for row in waiting(host.recorder):
        state.apply(row, 0)
    return {ref for process in state.processes.values() for ref in process.resources}


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


def types_of(host: Host) -> list[str]:
    return [row.type for row in waiting(host.recorder)]


class TestRegistry:
    """A primary registry."""

    def test_replaced_by_another_object(self):
        """Another object under the same key ends the old resource and begins a new one."""
        host = unstarted()
        registry = host.registry("runner")
        first = object()
        registry["r"] = first
        registry["r"] = first
        registry["r"] = object()
        assert types_of(host) == ["created", "reused", "cleaned_up", "created"]

    def test_links(self):
        """What an entry uses, who owns it and whose it is stand in its event."""
        host = unstarted()
        registry = host.registry(
            "session",
            uses=lambda id, s: [f"runner/{s}"],
            owned_by=lambda id, s: f"tenant/{s}",
            user=lambda id, s: f"user-{id}",
        )
        registry["x"] = "r1"
        row = waiting(host.recorder)[-1]
        assert (row.uses, row.owned_by, row.attrs) == (
            ("runner/r1",), "tenant/r1", {"user": "user-x"},
        )  # fmt: skip

    def test_owner_that_is_not_known_yet(self):
        """The owner is asked for again until it is known, and then recorded."""
        host = unstarted()
        owners: dict[str, str] = {}
        locks = host.registry("lock", owned_by=lambda id, _: owners.get(id))
        locks["l"] = object()
        assert waiting(host.recorder)[-1].attrs == {"awaits_owner": True}
        owners["l"] = "runner/r"
        host.inventory()
        assert waiting(host.recorder)[-1].owned_by == "runner/r"
        seq = host.recorder.seq
        host.inventory()
        assert host.recorder.seq == seq

    def test_own_ids(self):
        """The id may be made from the key."""
        host = unstarted()
        registry = host.registry("session", id=lambda key: ":".join(key))
        registry["app", "ann"] = 1
        assert set(host.entries) == {"session/app:ann"}

    def test_a_change_never_fails_because_of_us(self):
        """A function of the service that raises does not make its dict fail."""
        host = unstarted()
        registry = host.registry("session", uses=lambda id, s: [f"runner/{s.runner}"])
        registry["x"] = "has no runner"
        assert registry == {"x": "has no runner"}
        assert del_and_return(registry, "x") == {}

    def test_key_that_cannot_be_a_reference(self):
        """An entry whose key makes no reference is left alone; the others are looked after."""
        host = unstarted()
        registry = host.registry("session")
        registry[""] = 1
        registry["x" * 600] = 2
        registry["\ud800"] = 3
        registry["good"] = 4
        assert "session/good" in host.inventory().held
        assert all(ref.isascii() and len(ref) > len("session/") for ref in host.inventory().held)

    @pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda d: d.copy(), dict])
    def test_copies_are_plain(self, make: Callable[[Any], Any]):
        """A copy is a dict like any other: what is done to it is nobody's business."""
        host = unstarted()
        registry = host.registry("session", {"a": [1]})
        seq = host.recorder.seq
        made = make(registry)
        made["b"] = 2
        assert (made, registry) == ({"a": [1], "b": 2}, {"a": [1]})
        assert not isinstance(made, ObservedDict)
        assert host.recorder.seq == seq

    def test_pickle(self):
        """It can be pickled, as its content."""
        assert pickle.loads(pickle.dumps(unstarted().registry("s", {"a": 1}))) == {"a": 1}

    def test_belongs_to_one_host(self):
        """A registry that has a host already is refused."""
        registry = unstarted().registry("s")
        with pytest.raises(ValueError, match="belongs to a host already"):
            unstarted().add(registry)

    def test_removed(self):
        """Letting a registry go closes its resources and gives a dict of the original sort back."""
        host = unstarted()
        registry = host.registry("session", defaultdict(list, {"a": [1]}))
        plain = host.remove(registry)
        assert (type(plain), plain) == (defaultdict, {"a": [1]})
        assert alive(host) == set()
        registry["b"] = 1
        assert alive(host) == set()


def del_and_return(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    del mapping[key]
    return mapping


class Service:
    """A service with dicts of its own."""

    def __init__(self) -> None:
        self.runners: Any = {"r": object()}
        self.index: Any = {"a": "r"}


class TestObserve:
    """In place, without the service's code changing."""

    def test_in_place(self):
        """The attribute holds the same content, observed, and what was in it is adopted."""
        host, service = unstarted(), Service()
        before = dict(service.runners)
        registry = host.observe(service, "runners", kind="runner")
        assert service.runners is registry
        assert registry == before
        assert types_of(host) == ["adopted"]
        service.runners.pop("r")
        assert types_of(host) == ["adopted", "cleaned_up"]

    def test_index(self):
        """The same for an index; its name is the attribute's."""
        host, service = unstarted(), Service()
        index = host.observe_index(service, "index", names="runner")
        assert service.index is index
        assert list(index.known()) == [IndexEntry("index", "a", "runner/r")]

    @pytest.mark.parametrize("value", [OrderedDict(), [], None, ObservedDict()])
    def test_only_dicts(self, value: object):
        """What is not a plain dict, or is observed already, is refused."""
        with pytest.raises(TypeError, match="observed"):
            observable(value, "x")


class TestIndex:
    """An index: its entries name resources that live elsewhere."""

    @staticmethod
    def named(host: Host) -> set[tuple[str, str]]:
        return {(entry.key, entry.target) for entry in host.inventory().entries}

    def test_follows_every_change(self):
        """Whatever changes an entry, what it names is known in the same tick."""
        host = unstarted()
        index = host.index("i", "runner", content={"a": "1"})
        index["b"] = "2"
        index["a"] = "3"
        index.setdefault("c", "4")
        index |= {"d": None}
        index.pop("b")
        assert {(e.key, e.target) for e in index.known()} == {("a", "runner/3"), ("c", "runner/4")}
        index.clear()
        assert list(index.known()) == []
        assert len(host.book) == 0

    def test_list_changed_in_place(self):
        """A list that the service changes in place is noticed by a rescan."""
        host = unstarted()
        index = host.index("i", "session", content=defaultdict(list))
        index["a"].append("1")
        index["a"].append("2")
        assert list(index.known()) == []
        assert self.named(host) == {("a", "session/1"), ("a", "session/2")}
        index["a"].remove("1")
        assert self.named(host) == {("a", "session/2")}

    def test_changed_behind_its_back(self):
        """Entries that were set or removed past the observer are noticed by a rescan."""
        host = unstarted()
        index = host.index("i", "session", content={"a": "1"})
        dict.__delitem__(index, "a")
        dict.__setitem__(index, "b", "2")
        assert self.named(host) == {("b", "session/2")}

    def test_key_that_names_something(self):
        """A key can name a resource; its entry then goes as a whole."""
        host = unstarted()
        index = host.index("i", key_names="session", content={"s": {"any": "thing"}})
        assert list(index.known()) == [IndexEntry("i", "s", "session/s", True)]
        assert index.drop("s", "session/s")
        assert index == {}

    def test_must_name_something(self):
        """An index that names nothing cannot be meant."""
        with pytest.raises(ValueError, match="say what it names"):
            Index("i")

    def test_name_is_taken(self):
        """Two indexes of one host have different names."""
        host = unstarted()
        host.index("i", "runner")
        with pytest.raises(ValueError, match="there is an index named i already"):
            host.index("i", "runner")

    def test_let_go(self):
        """An index that is let go takes its entries out of the inventory."""
        host = unstarted()
        index = host.index("i", "runner", content={"a": "1"})
        assert host.remove(index) == {"a": "1"}
        assert self.named(host) == set()
        assert len(host.book) == 0

    def test_a_function_that_raises_stops_nothing(self):
        """A `targets` that raises for one entry does not stop the look at other registries."""
        host = unstarted()
        host.index("bad", targets=lambda key, value: [f"runner/{value.id}"]).update(a=None)
        good = host.index("good", "session", content=defaultdict(list))
        good["a"].append("1")
        assert self.named(host) == {("a", "session/1")}


class TestDrop:
    """Removing from an index what names something dead."""

    @pytest.mark.parametrize(
        ("value", "left"),
        [
            ("dead", None),
            (["dead"], None),
            (["dead", "live", "dead"], ["live"]),
            (("dead", "live"), ("live",)),
            ({"dead", "live"}, {"live"}),
            (frozenset({"dead", "live"}), frozenset({"live"})),
            (frozenset({"dead"}), None),
        ],
    )
    def test_what_is_left(self, value: object, left: object):
        """One id goes with its entry; of several only the dead goes, and the entry with the last."""
        host = unstarted()
        index = host.index("i", "session", content={"k": value, "other": "dead"})
        assert index.drop("k", "session/dead")
        assert dict(index) == ({"other": "dead"} | ({} if left is None else {"k": left}))
        assert ("k", "session/dead") not in TestIndex.named(host)

    def test_list_object_stays(self):
        """A list that the service holds on to is changed in place."""
        held = ["dead", "live"]
        index = unstarted().index("i", "session", content={"k": held})
        assert index.drop("k", "session/dead")
        assert index["k"] is held
        assert held == ["live"]

    def test_empty_list_under_a_living_key(self):
        """When the key names something that lives, its entry stays, empty."""
        index = unstarted().index("i", "session", key_names="runner", content={"r": ["dead"]})
        assert index.drop("r", "session/dead")
        assert index == {"r": []}

    def test_keys_of_other_types(self):
        """Keys are compared as text, and all that look the same lose what is dead."""
        index = unstarted().index("i", "session", content={1: "dead", "1": "dead", 2: "dead"})
        assert index.drop("1", "session/dead")
        assert index == {2: "dead"}

    def test_nothing_to_drop(self):
        """An entry that is gone, or names something else by now, is left alone."""
        host = unstarted()
        index = host.index("i", "session", content={"k": "live", "l": "dead"})
        dict.__delitem__(index, "l")
        assert not index.drop("k", "session/dead")
        assert not index.drop("l", "session/dead")
        assert not index.drop("m", "session/dead")
        assert index == {"k": "live"}

    def test_defaultdict_makes_no_default(self):
        """Looking for an entry to drop does not make one."""
        index = unstarted().index("i", "session", content=defaultdict(list, {"k": ["dead"]}))
        dict.__delitem__(index, "k")
        assert not index.drop("k", "session/dead")
        assert index == {}

    def test_item_that_cannot_be_told(self):
        """Where no item of the value names the dead by itself, that is an error, not a success."""
        index = unstarted().index(
            "i", targets=lambda key, value: ["session/dead"] if len(value) > 1 else [],
            content={"k": ["x", "y"]},
        )  # fmt: skip
        with pytest.raises(ValueError, match="names session/dead"):
            index.drop("k", "session/dead")
