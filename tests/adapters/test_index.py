"""Indexes: which entry names what, and what is dropped of one that dangles."""

from __future__ import annotations

from collections import defaultdict

import pytest

from adapters import Host, Index
from store.messages import IndexEntry
from tests.adapters.unstarted import unstarted


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
