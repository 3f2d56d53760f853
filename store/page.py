"""A page: a stretch of one partition as it was read, decoded for the fold.

Decoding goes by columns, because a call or a tuple for each entry costs as much as the decoding
itself: ids, times, payloads and events are lists of the same length. A page with an entry that is no
event is decoded again, entry by entry, so that exactly that one is set aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from store.errors import MalformedEntry
from store.event import EventRow, FoldRow, decode_fold_row, decode_fold_rows, decode_row
from store.position import Key, RawEntry, id_key, ms_of

_NOT_ONE_FIELD = "the entry has no field e, or more than that"
_decode_numbers = msgspec.json.Decoder(list[int]).decode


@dataclass(slots=True)
class Page:
    """A stretch of one partition.

    Attributes:
        partition: which.
        after: the position that it begins after.
        position: id of the last entry read; read on from there.
        ids: of the entries that are events, in order.
        times: of the same entries, in ms of Redis time.
        payloads: of the same entries, encoded.
        events: the same, decoded as far as the fold reads them.
        malformed: (entry id, why), of entries that are not events.
        end: there was nothing after it when it was read.
    """

    partition: int
    after: str
    position: str
    ids: Sequence[bytes] = ()
    times: Sequence[int] = ()
    payloads: Sequence[bytes] = ()
    events: Sequence[FoldRow] = ()
    malformed: list[tuple[str, str]] = field(default_factory=list)
    end: bool = False

    @property
    def entries(self) -> int:
        """How many entries were read, malformed ones included."""
        return len(self.events) + len(self.malformed)

    @property
    def rows(self) -> list[tuple[str, EventRow]]:
        """(entry id, event), in order and wholly decoded: for those who look at single events.

        An event that is malformed in what the fold does not read is left out.
        """
        rows = []
        for entry_id, payload in zip(self.ids, self.payloads, strict=True):
            with suppress(MalformedEntry):
                rows.append((entry_id.decode(), decode_row(payload)))
        return rows

    def since(self, position: Key) -> Page:
        """What of it comes after a position (see `id_key`)."""
        if id_key(self.after) >= position:
            return self
        # Ids ascend: what is passed over is at the beginning.
        skip = sum(id_key(name.decode()) <= position for name in self.ids)
        malformed = [item for item in self.malformed if id_key(item[0]) > position]
        return Page(
            self.partition, self.after, self.position,
            self.ids[skip:], self.times[skip:], self.payloads[skip:], self.events[skip:],
            malformed, self.end,
        )  # fmt: skip


def parse_page(partition: int, raw: Sequence[RawEntry], after: str) -> Page:
    """Decodes what XRANGE or XREAD answered (list of [id, [field, value, …]])."""
    page = Page(partition, after, after)
    if not raw:
        return page
    page.position = raw[-1][0].decode()
    try:
        payloads = [payload for _, (field, payload) in raw if field == b"e"]  # type: ignore[misc]
        if len(payloads) != len(raw):
            raise MalformedEntry(_NOT_ONE_FIELD)
        page.events = decode_fold_rows(payloads)
        page.ids, page.payloads = [entry_id for entry_id, _ in raw], payloads
        page.times = times_of(page.ids)
    except (MalformedEntry, msgspec.MsgspecError, ValueError, TypeError):
        _parse_each(page, raw)
    return page


def times_of(ids: Sequence[bytes]) -> list[int]:
    """The Redis times in entry ids, in ms: all in one go, `1-0, 1-1` being read as `[1,0,1,1]`.

    Raises:
        ValueError: one is not an entry id.
    """
    numbers = _decode_numbers(b"[%b]" % b",".join(ids).replace(b"-", b","))
    if len(numbers) != 2 * len(ids):
        raise ValueError("an entry id is not ms-n")
    return numbers[::2]


def _parse_each(page: Page, raw: Sequence[RawEntry]) -> None:
    ids, times, payloads, events = [], [], [], []
    for entry_id, fields in raw:
        name = entry_id.decode()
        try:
            payload = payload_of(fields)
            events.append(decode_fold_row(payload))
        except MalformedEntry as error:
            page.malformed.append((name, str(error)))
        else:
            ids.append(entry_id)
            times.append(ms_of(name))
            payloads.append(payload)
    page.ids, page.times, page.payloads, page.events = ids, times, payloads, events


def payload_of(fields: Sequence[bytes] | None) -> bytes:
    """The encoded event of an entry.

    Raises:
        MalformedEntry: the entry is not one of ours.
    """
    if not fields or len(fields) != 2 or fields[0] != b"e":
        raise MalformedEntry(_NOT_ONE_FIELD)
    return fields[1]
