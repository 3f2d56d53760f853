"""Observed mappings: a service's dict, which tells of every change of itself in the same tick."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.observed_dict import ObservedDict, observable
from store.messages import IndexEntry
from tests.adapters.unstarted import alive, types_of, unstarted
from tests.support import log_lines, waiting


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

    def test_one_reference_as_text(self):
        """A text is one reference, not one for each of its letters."""
        host = unstarted()
        host.registry("session", uses=lambda id, s: f"runner/{s}")["x"] = "r1"
        assert waiting(host.recorder)[-1].uses == ("runner/r1",)
        host.record("created", "session/y", uses="runner/r2")
        assert waiting(host.recorder)[-1].uses == ("runner/r2",)
        host.link("session/y", uses="runner/r3")
        assert waiting(host.recorder)[-1].uses == ("runner/r3",)

    def test_what_is_no_reference(self, caplog: pytest.LogCaptureFixture):
        """It is refused, and in a registry named in the log: it would stand in the log for ever."""
        host = unstarted()
        host.registry("session", uses=lambda id, s: ["r1"], name="sessions of mine")["x"] = 1
        assert alive(host) == set()
        (line,) = log_lines(caplog)
        assert line["registry"] == "sessions of mine"
        for links in ({"uses": ["r1"]}, {"uses": "r1"}, {"owned_by": "r1"}):
            with pytest.raises(ValueError, match="is not a reference"):
                host.record("created", "session/y", **links)  # type: ignore[arg-type]
        assert waiting(host.recorder) == []

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

    def test_such_a_key_from_the_beginning(self):
        """The same where the dict has such a key before it is observed."""
        host = unstarted()
        registry = host.registry("session", {"a": 1, "": 2, "x" * 600: 3, "b": 4})
        assert alive(host) == {"session/a", "session/b"}
        assert len(registry) == 4

    def test_a_defaultdict_stays_one(self):
        """Copies and unions of one that makes defaults make defaults."""
        registry = unstarted().registry("session", defaultdict(list, a=[1]))
        for made in (registry.copy(), registry | {"b": 2}, {"b": 2} | registry):
            assert type(made) is type(defaultdict(list) | {}) or "b" in made
            assert not isinstance(made, ObservedDict)
        assert registry.copy()["new"] == (registry | {})["new"] == []
        assert ({"b": 2} | registry) == {"a": [1], "b": 2}

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

    @pytest.mark.parametrize("weakly", [True, False])
    def test_assigned_anew(self, caplog: pytest.LogCaptureFixture, weakly: bool):
        """A new dict in the attribute is observed at the next look; what is not in it has gone."""
        host = unstarted()
        service: Any = Service() if weakly else SimpleNamespace(**vars(Service()))
        kept = service.runners["r"]
        runners = host.observe(service, "runners", kind="runner")
        host.observe_index(service, "index", names="runner")
        runners["old"] = object()
        service.runners, service.index = {"r": kept, "new": object()}, {"b": "new"}
        entry = host.entries["runner/old"]
        assert not host.holds(entry)  # An order on it is refused meanwhile.
        found = host.inventory()
        assert service.runners is runners
        assert alive(host) == {"runner/r", "runner/new"}
        assert [(one.key, one.target) for one in found.entries] == [("b", "runner/new")]
        del service.runners["new"]
        assert alive(host) == {"runner/r"}
        assert caplog.text.count("assigned a new dict") == 2
        service.runners = None
        host.inventory()
        assert (alive(host), service.runners) == (set(), None)
        service.runners = {"r": kept}
        host.inventory()
        assert (alive(host), service.runners) == ({"runner/r"}, runners)
        service.runners = OrderedDict()
        host.inventory()
        assert caplog.text.count("what it holds is no longer looked after") == 1

    def test_assigned_anew_with_other_defaults(self):
        """It makes the defaults of the dict that was assigned, or none."""
        host, service = unstarted(), Service()
        host.observe(service, "runners", kind="runner")
        service.runners = defaultdict(list)
        host.inventory()
        assert service.runners["new"] == []
        service.runners = {"r": 1}
        host.inventory()
        with pytest.raises(KeyError):
            service.runners["other"]
        assert alive(host) == {"runner/r"}

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
