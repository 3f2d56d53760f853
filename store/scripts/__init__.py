"""The Lua scripts: every change that touches more than one key, or must be refused as a whole.

Each script stands in a file of its own with a head that names its KEYS, ARGV and answer. They are
loaded once per connection and called by SHA; a server that forgot them (restart, failover) is sent
the text again. A line `-- with: name` puts the functions of another file before the script.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources


@cache
def source(name: str) -> str:
    """The text of `name`.lua in this package."""
    text = resources.files(__name__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
    return "".join(map(source, re.findall(r"(?m)^-- with: (\w+)$", text))) + text
