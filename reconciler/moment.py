"""Moments of the past as people write them: a time, or the id of a log entry.

The command line and the page take the same words, and refuse the same ones with the same message.
Everything is Redis time, in UTC.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

from store.errors import BadMoment
from store.position import id_key

_ENTRY_ID = re.compile(r"\d{10,15}-\d{1,19}")
_LAST_OF_MS = 2**63


def clock(ms: int) -> str:
    """Redis time for people, UTC, to the millisecond."""
    try:
        moment = datetime.fromtimestamp(ms / 1000, UTC)
    except (ValueError, OverflowError):
        return f"{ms} ms after 1970"  # Beyond the year 9999: somebody's typing error.
    return moment.strftime("%Y-%m-%d %H:%M:%S.") + f"{ms % 1000:03d}"


def span(ms: float) -> str:
    """A span of time for people."""
    seconds = ms / 1000
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{max(ms, 0):.0f} ms"


def check_past(until: tuple[int, int], now_ms: int, what: str = "--at") -> None:
    """Raises BadMoment when a moment has not come yet."""
    if until[0] > now_ms:
        raise BadMoment(
            f"{what} {clock(until[0])} UTC is in the future; it is {clock(now_ms)} UTC now"
        )


def parse_moment(text: str, what: str = "--at") -> tuple[int, int]:
    """A time or an entry id, as the last entry id that belongs to it: (ms, n).

    Args:
        text: ISO 8601 (UTC unless it says otherwise), a time of today, seconds since 1970, or the id
            of a log entry.
        what: it was given as, for the message.

    Raises:
        BadMoment: it is neither.
    """
    text = written = text.strip()
    if _ENTRY_ID.fullmatch(text):
        return id_key(text)
    if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?", text):
        today = time.strftime("%Y-%m-%d", time.gmtime())
        written = f"{today}T{text.zfill(len(text) + (text[1] == ':'))}"
    try:
        moment = datetime.fromisoformat(written)  # 20261121 is a date, not a number of seconds.
    except ValueError:
        if re.fullmatch(r"\d{1,11}(\.\d+)?", text):
            return round(float(text) * 1000), _LAST_OF_MS
        raise BadMoment(
            f"{what} {text!r} is neither a time nor an entry id: write 2026-11-21T14:03:00, 14:03:00, "
            "seconds since 1970, or 1763733780000-0"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    # Before 1970 there is no entry, and no entry id.
    return max(0, round(moment.timestamp() * 1000)), _LAST_OF_MS
