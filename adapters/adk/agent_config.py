"""Agent configurations as values: the same configuration is the same text, whatever its shape.

Agents and runners are shared by this text. Its hash is only a short name for it; whoever finds a name
taken compares the texts. What has no value of its own (a function, a model object with inner state)
counts by identity: never shared by mistake, and shared by all who pass the very object.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from hashlib import sha256
from pathlib import PurePath
from typing import Any

from google.adk.agents import BaseAgent
from google.adk.models import BaseLlm
from pydantic import BaseModel

_ID_CHARS = 16


def canonical(config: Any) -> str:
    """A configuration as a text that is equal exactly when the configuration is.

    The order of keys and of set members does not matter; lists and tuples are alike; `1`, `1.0`,
    `True` and `"1"` are not. Pydantic models and dataclasses go by class and fields.

    Args:
        config: JSON, and whatever else an agent is made from. An object that counts by identity must
            stay alive as long as the text is compared.

    Raises:
        ValueError: it contains itself.
    """
    try:
        return _text(config)
    except RecursionError:
        raise ValueError(
            "the agent configuration contains itself, or is nested too deeply"
        ) from None


def config_id(text: str) -> str:
    """A short name for a canonical text: 64 bits of its SHA-256, in hex."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_ID_CHARS]


def _text(value: Any) -> str:
    match value:
        case Enum():
            return f"<enum {_name(type(value))}.{value.name}>"
        case None | bool() | int() | float() | str() if type(value) in _PLAIN:
            # Strings are quoted, so nothing below can be mistaken for one.
            return json.dumps(value)
        case bytes():
            return f"<bytes {value.hex()}>"
        case PurePath():
            return f"<path {json.dumps(str(value))}>"
        case Mapping():
            items = sorted((_text(key), _text(item)) for key, item in value.items())
            return "{" + ",".join(f"{key}:{item}" for key, item in items) + "}"
        case list() | tuple():
            return "[" + ",".join(map(_text, value)) + "]"
        case AbstractSet():
            return "<set " + ",".join(sorted(map(_text, value))) + ">"
        case BaseAgent() | BaseLlm():
            return _identity(value)  # They know their parents, and hold connections.
        case BaseModel() if not value.__pydantic_private__:
            fields = {name: getattr(value, name) for name in type(value).model_fields}
            fields |= value.model_extra or {}
            return f"<{_name(type(value))} {_text(fields)}>"
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            shown = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return f"<{_name(type(value))} {_text(shown)}>"
        case _:
            return _identity(value)


def _identity(value: Any) -> str:
    return f"<object {_name(type(value))} {id(value):x}>"


_PLAIN = {type(None), bool, int, float, str}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
