"""HTTP as a script would do it, with nothing but the standard library."""

from __future__ import annotations

import json
import urllib.request
from typing import Any


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> Any:
    """The JSON that a POST of JSON is answered with."""
    kind = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), kind)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def get(url: str, *, decode: bool = True) -> Any:
    """What a GET is answered with, as JSON or as text."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
        return json.loads(text) if decode else text
