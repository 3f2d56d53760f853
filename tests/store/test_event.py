"""The event model and its codec."""

from __future__ import annotations

import json
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from store import EventType, LifecycleEvent, MalformedEntry
from store.event import (
    DIGEST_CHARS,
    EVENT_TYPES,
    NO_DIGEST,
    SCHEMA,
    EventRow,
    FoldRow,
    KnownType,
    chain,
    check_ref,
    decode,
    decode_fold_row,
    decode_row,
    encode,
    process_id,
    split_digest,
)
from tests.support import event, row

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
refs = st.builds("{}/{}".format, texts.filter(lambda t: "/" not in t), texts)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts
events = st.builds(
    LifecycleEvent,
    type=st.sampled_from(EventType),
    ref=refs,
    process=texts,
    seq=st.integers(1, 2**53),
    at=st.floats(0, 2e9),
    holder=st.none() | texts,
    uses=st.none() | st.lists(refs, max_size=3).map(tuple),
    owned_by=st.none() | refs,
    reason=st.none() | texts,
    order_id=st.none() | texts,
    attrs=st.none() | st.dictionaries(texts, scalars, max_size=3),
    trace_id=st.none() | texts,
)


def as_row(model: LifecycleEvent) -> EventRow:
    values = {name: getattr(model, name) for name in EventRow.__struct_fields__}
    return EventRow(**values | {"type": str(model.type)})


class TestTwoShapes:
    """`LifecycleEvent` and `EventRow` are the same thing."""

    def test_same_fields_in_both(self):
        """Both shapes have the same fields, so the fold reads either."""
        assert list(EventRow.__struct_fields__) == list(LifecycleEvent.model_fields)

    def test_the_fold_reads_a_part(self):
        """What the fold reads of an event has the names, types and defaults of the event."""
        names = FoldRow.__struct_fields__
        assert set(names) <= set(EventRow.__struct_fields__)
        of_row = {f.name: (f.type, f.default) for f in msgspec.structs.fields(EventRow)}
        of_fold = {f.name: (f.type, f.default) for f in msgspec.structs.fields(FoldRow)}
        assert of_fold == {name: of_row[name] for name in names} | {"type": of_fold["type"]}

    def test_same_defaults_in_both(self):
        """What is left out means the same in both shapes, and is of the present schema."""
        assert as_row(event(1)) == row(1)
        assert row(1).schema_version == SCHEMA

    @given(events)
    def test_either_shape_reads_what_the_other_wrote(self, model: LifecycleEvent):
        """An event written in one shape is read in the other, unchanged."""
        by_model, _ = encode(model, NO_DIGEST)
        by_row, _ = encode(as_row(model), NO_DIGEST)
        expected = as_row(model)
        for payload in (by_model, by_row):
            found = decode_row(payload)
            assert msgspec.structs.replace(found, digest="") == expected
            assert decode(payload).model_copy(update={"digest": ""}) == model
            for name in FoldRow.__struct_fields__:
                assert getattr(decode_fold_row(payload), name) == getattr(expected, name)


class TestModel:
    """What a user of the public model may and may not say."""

    @pytest.mark.parametrize("ref", ["", "session", "/x", "session/", "s/" + "x" * 511])
    def test_reference_is_kind_and_id(self, ref: str):
        """A reference without a kind, without an id, or too long is refused."""
        with pytest.raises(ValueError, match="is not a reference"):
            check_ref(ref)
        with pytest.raises(ValidationError, match="is not a reference"):
            event(1, ref=ref)
        with pytest.raises(ValidationError, match="is not a reference"):
            event(1, uses=(ref,))
        with pytest.raises(ValidationError, match="is not a reference"):
            event(1, owned_by=ref)

    def test_longest_reference(self):
        """A reference of exactly the limit is one; an id may hold slashes."""
        assert check_ref("s/" + "x" * 510)
        assert event(1, ref="log_handler/a/b").kind == "log_handler"

    def test_immutable(self):
        """An event is a fact: it cannot be changed."""
        with pytest.raises(ValidationError):
            event(1).seq = 2

    @pytest.mark.parametrize(
        "wrong", [{"seq": 0}, {"process": ""}, {"type": "exploded"}, {"attrs": {"a": {"b": 1}}}]
    )
    def test_wrong_values_are_refused(self, wrong: dict[str, object]):
        """Sequence numbers begin at 1, a process has a name, types are known, attrs are flat."""
        with pytest.raises(ValidationError):
            LifecycleEvent(**{"type": "created", "ref": "a/b", "process": "p", "seq": 1} | wrong)

    def test_process_ids_differ(self):
        """Two incarnations within a millisecond have different names."""
        ids = [process_id("svc") for _ in range(100)]
        assert len(set(ids)) == 100
        assert all(one.startswith("svc@") for one in ids)


class TestNewerSchema:
    """An event that a newer version wrote."""

    NEWER = b'{"type":"created","ref":"a/b","process":"p","seq":1,"schema_version":9,"mood":"good"}'

    def test_unknown_fields_are_kept(self):
        """What this version does not know is not fatal, and is still there after a round trip."""
        found = decode(self.NEWER)
        assert found.model_extra == {"mood": "good"}
        again, _ = encode(found, NO_DIGEST)
        assert json.loads(again)["mood"] == "good"

    def test_hot_path_reads_it_too(self):
        """The hot paths read what they know of it."""
        assert decode_row(self.NEWER).ref == "a/b"

    def test_unknown_type_is_fatal_only_in_the_present_schema(self):
        """A newer type is let through to the fold; in the present schema it is an error."""
        newer = self.NEWER.replace(b"created", b"dreamed")
        assert decode_row(newer).type == decode_fold_row(newer).type == "dreamed"
        with pytest.raises(MalformedEntry, match="dreamed"):
            decode_row(newer.replace(b'"schema_version":9', b'"schema_version":1'))


class TestDigest:
    """The chain that finds edited, removed and reordered events."""

    def chained(self, count: int) -> list[bytes]:
        payloads, digest = [], NO_DIGEST
        for n in range(1, count + 1):
            payload, digest = encode(row(n), digest)
            payloads.append(payload)
        return payloads

    def verify(self, payloads: list[bytes]) -> list[bool]:
        good, before = [], NO_DIGEST
        for payload in payloads:
            body, digest = split_digest(payload)
            good.append(chain(before, body) == digest)
            before = digest
        return good

    def test_stands_last_and_covers_the_body(self):
        """The digest is the last member, and can be cut off without parsing."""
        payload, digest = encode(event(1), NO_DIGEST)
        body, found = split_digest(payload)
        assert found == digest
        assert len(digest) == DIGEST_CHARS
        assert list(json.loads(payload))[-1] == "digest"
        assert json.loads(body) == {k: v for k, v in json.loads(payload).items() if k != "digest"}

    def test_intact_chain(self):
        """An untouched log is good all along."""
        assert self.verify(self.chained(5)) == [True] * 5

    def test_edited(self):
        """An edited event is found where it stands."""
        payloads = self.chained(5)
        payloads[2] = payloads[2].replace(b"session/s", b"session/t")
        assert self.verify(payloads) == [True, True, False, True, True]

    def test_removed(self):
        """A removed event is found at the one after it."""
        payloads = self.chained(5)
        del payloads[2]
        assert self.verify(payloads) == [True, True, False, True]

    def test_reordered(self):
        """Events that changed places are found."""
        payloads = self.chained(4)
        payloads[1], payloads[2] = payloads[2], payloads[1]
        assert self.verify(payloads) == [True, False, False, False]

    def test_no_digest(self):
        """A payload without a digest is said to have none."""
        with pytest.raises(MalformedEntry, match="digest"):
            split_digest(b'{"type":"created"}')


class TestMalformed:
    """What is not an event."""

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"hello",
            b"\xff\xfe",
            b"[]",
            b"null",
            b"[" * 100_000,
            b'{"type":"created","ref":"a/b","process":"p"}',
            b'{"type":"created","ref":"a/b","process":"p","seq":"1x"}',
            b'{"type":"created","ref":"a/b","process":"p","seq":0}',
            b'{"type":"created","ref":"ab","process":"p","seq":1}',
            b'{"type":"created","ref":"a/b","process":"","seq":1}',
            b'{"type":"exploded","ref":"a/b","process":"p","seq":1}',
            b'{"type":"created","ref":"a/b","process":"p","seq":1,"uses":"a"}',
        ],
    )
    def test_all_readers_refuse_it(self, payload: bytes):
        """No reader takes it, and all say so with the same error."""
        for read in (decode, decode_row, decode_fold_row):
            with pytest.raises(MalformedEntry):
                read(payload)

    @given(st.binary(max_size=200))
    def test_any_bytes(self, payload: bytes):
        """Whatever the bytes, a reader either reads an event or raises MalformedEntry."""
        for read in (decode, decode_row, decode_fold_row):
            try:
                read(payload)
            except MalformedEntry:
                continue

    def test_types_are_listed_once(self):
        """What the hot paths take for a type is exactly the types of the model."""
        assert (
            frozenset(t.value for t in EventType) == EVENT_TYPES == frozenset(get_args(KnownType))
        )
