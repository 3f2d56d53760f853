"""The snapshot: a fold that is broken off, stored and gone on with is the fold of everything."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.fold import GONE_MOST, fold
from reconciler.snapshot import FOLD, OtherFold, decode_state, encode_state
from store.event import EventRow
from store.snapshots import DamagedSnapshot, newest_first, seal, unseal
from tests.reconciler.model import fleets, orders
from tests.support import row


class TestState:
    """`encode_state` and `decode_state`."""

    @given(fleets(), st.data())
    def test_snapshot_and_tail_are_everything(
        self, entries: list[tuple[int, EventRow]], data: st.DataObject
    ):
        """Folding the rest onto a decoded snapshot gives what folding everything gives."""
        at = data.draw(st.integers(0, len(entries)))
        snapshot = decode_state(encode_state(fold(entries[:at])))
        whole = fold(entries)
        found = fold(entries[at:], snapshot)
        assert found == whole
        assert orders(found) == orders(whole)

    def test_what_is_forgotten_first(self):
        """What is gone is forgotten in the order of its going, also after a snapshot."""
        ends = [(1, row(seq, "cleaned_up", f"a/{seq}")) for seq in range(2, GONE_MOST + 2)]
        state = fold([(1, row(1)), *ends])
        last = (2, row(GONE_MOST + 2, "cleaned_up", "a/last"))
        gone = fold([last], decode_state(encode_state(state))).processes["p"].gone
        assert list(gone) == list(fold([last], state).processes["p"].gone)
        assert "a/2" not in gone

    @pytest.mark.parametrize(
        "data", [b"", b"\xff", msgspec.msgpack.encode([FOLD + 1, [], 0, 0, 0])]
    )
    def test_of_another_fold(self, data: bytes):
        """What another version made, or nobody, is refused and never half read."""
        with pytest.raises(OtherFold):
            decode_state(data)


class TestSeal:
    """`seal` and `unseal`."""

    @given(st.binary(), st.integers(0), st.integers(0, 7))
    def test_any_change_is_found(self, data: bytes, where: int, bit: int):
        """A sealed snapshot comes back whole, and with any bit changed not at all."""
        sealed = bytearray(seal("5-1", data))
        assert unseal("5-1", bytes(sealed)) == data
        sealed[where % len(sealed)] ^= 1 << bit
        with pytest.raises(DamagedSnapshot):
            unseal("5-1", bytes(sealed))

    def test_of_another_entry(self):
        """A snapshot that was put under another entry id is not taken for it."""
        with pytest.raises(DamagedSnapshot, match="belongs to entry 5-1"):
            unseal("5-2", seal("5-1", b"x"))

    def test_newest_first(self):
        """Positions sort by number, those after a moment and those that are none are left out."""
        assert newest_first(["9-1", "10-0", "x", "9-11", "11-0"], (10, 5)) == [
            "10-0",
            "9-11",
            "9-1",
        ]
