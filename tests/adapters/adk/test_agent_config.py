"""Canonical agent configurations: equal texts for equal values, and for nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, PrivateAttr

from adapters.adk.agent_config import canonical, config_id

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


def shuffled(value: Any) -> Any:
    """The same value with the keys of its dicts the other way round."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=60)
@given(JSON, JSON)
def test_equal_texts_are_equal_values(one: Any, other: Any) -> None:
    """On JSON the text is equal exactly when the sorted JSON is; the order of keys is nothing."""
    assert canonical(shuffled(one)) == canonical(one)
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (canonical(one) == canonical(other)) == same


class Colour(Enum):
    RED = 1


@dataclass
class Settings:
    temperature: float
    names: tuple[str, ...] = ()


class Model(BaseModel):
    name: str
    inner: Any = None


class Other(Model):
    pass


class Stateful(BaseModel):
    name: str
    _calls: int = PrivateAttr(default=0)


def a_tool() -> None:
    """A function counts by identity."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), [1, 2]),
        ({"a", "b"}, {"b", "a"}),
        (Settings(1.0, ("a",)), Settings(1.0, ("a",))),
        (Model(name="x", inner={"b": 1, "a": 2}), Model(name="x", inner={"a": 2, "b": 1})),
        (Colour.RED, Colour.RED),
        (Path("/a"), Path("/a")),
        ([a_tool], [a_tool]),
        (b"x", b"x"),
    ],
)
def test_equal(one: Any, other: Any) -> None:
    """These are the same configuration."""
    assert canonical({"x": one}) == canonical({"x": other})
    assert config_id(canonical(one)) == config_id(canonical(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True), (1, 1.0), (1, "1"), (None, "null"), ({1: "a"}, {"1": "a"}), ("x", b"x"),
        (Model(name="x"), Other(name="x")), (Model(name="x"), {"name": "x", "inner": None}),
        (Stateful(name="x"), Stateful(name="x")), (Colour.RED, 1), (Path("/a"), "/a"),
        (lambda: 1, lambda: 1), ([], {}), (set(), []), (Settings(1.0), Settings(2.0)),
    ],
)  # fmt: skip
def test_different(one: Any, other: Any) -> None:
    """These are not."""
    assert canonical({"x": one}) != canonical({"x": other})


def test_one_that_contains_itself() -> None:
    """It is refused in words."""
    config: dict[str, Any] = {}
    config["self"] = config
    with pytest.raises(ValueError, match="contains itself"):
        canonical(config)
