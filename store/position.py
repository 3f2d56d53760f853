"""Positions in a partition: entry ids, as Redis writes them and as they are compared.

An entry id is `ms-n`: Redis time in milliseconds, and a counter within it. Ranges are written as XRANGE
takes them: `-`, `+`, an id, `(` before an id that is itself left out.
"""

from __future__ import annotations

START = "0-0"
"""The position before the first entry."""
_LAST = 2**64 - 1

Key = tuple[int, int]
RawEntry = tuple[bytes, list[bytes] | None]
"""What XRANGE answers for one entry: id, and [field, value, …]."""


def id_key(entry_id: str) -> Key:
    """An entry id as a value that sorts as Redis sorts it.

    Raises:
        ValueError: it is not an entry id.
    """
    ms, _, n = entry_id.partition("-")
    return int(ms), int(n or 0)


def ms_of(entry_id: str) -> int:
    """The Redis time in an entry id, in ms."""
    return int(entry_id[: entry_id.index("-")])


def key_id(key: Key) -> str:
    """The entry id of a value of `id_key`."""
    return f"{key[0]}-{key[1]}"


def lowest(low: str) -> Key:
    """The lowest id of a range, itself in it."""
    if low == "-":
        return 0, 0
    if low.startswith("("):
        ms, n = id_key(low[1:])
        return (ms, n + 1) if n < _LAST else (ms + 1, 0)
    return id_key(low)


def highest(high: str) -> Key:
    """The highest id of a range, itself in it."""
    if high == "+":
        return _LAST, _LAST
    if high.startswith("("):
        ms, n = id_key(high[1:])
        return (ms, n - 1) if n else (ms - 1, _LAST)
    return id_key(high) if "-" in high else (int(high), _LAST)
