"""The recorder: numbered, in order, sent again as it was until it is acknowledged."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from time import perf_counter_ns

import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, use_span

from adapters import trace_id
from adapters.outbox import BATCH, Outbox
from adapters.recorder import Recorder, origin
from store.event import NO_DIGEST, EventRow, chain, decode, decode_row, split_digest


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(Outbox("p"), lambda: None)


def drained(recorder: Recorder) -> list[bytes]:
    """Everything in the outbox, batch by batch, each acknowledged."""
    payloads: list[bytes] = []
    while len(recorder):
        payloads += recorder.outbox.batch()[1]
        recorder.outbox.acknowledge()
    return payloads


class TestRecord:
    """Numbers without gaps."""

    def test_numbers(self, recorder: Recorder):
        """Events are numbered 1, 2, 3 … in the order of recording, and carry what was said."""
        assert recorder.record("created", "session/s", uses=["runner/r"], attrs={"user": "u"}) == 1
        assert recorder.record("reused", "session/s", reason="why") == 2
        first, second = map(decode_row, drained(recorder))
        assert (first.seq, first.uses, first.attrs) == (1, ("runner/r",), {"user": "u"})
        assert (second.seq, second.type, second.reason) == (2, "reused", "why")

    def test_wakes(self):
        """Whoever sends is woken for each event."""
        woken: list[int] = []
        recorder = Recorder(Outbox("p"), lambda: woken.append(1))
        recorder.record("created", "a/b")
        assert woken == [1]

    @pytest.mark.parametrize(("type", "ref"), [("exploded", "a/b"), ("created", "ab")])
    def test_wrong_event_takes_no_number(self, recorder: Recorder, type: str, ref: str):
        """An event that cannot be is refused at once, and leaves no gap."""
        with pytest.raises(ValueError, match="is not a"):
            recorder.record(type, ref)
        assert recorder.record("created", "a/b") == 1

    def test_trace(self, recorder: Recorder):
        """Events carry the trace id that was set for the request they were recorded in."""
        token = trace_id.set("t-1")
        recorder.record("created", "a/b")
        trace_id.reset(token)
        recorder.record("created", "a/c")
        assert [decode_row(p).trace_id for p in drained(recorder)] == ["t-1", None]

    def test_trace_of_a_span(self, recorder: Recorder):
        """Where none was set, it is that of the OpenTelemetry span; what was set goes first."""
        context = SpanContext(0xABC, 0xDEF, is_remote=True)
        with use_span(NonRecordingSpan(context)):
            assert origin() == (f"{0xABC:032x}", context)
            recorder.record("created", "session/a")
            token = trace_id.set("mine")
            recorder.record("created", "session/b")
            assert origin() == ("mine", None)
            trace_id.reset(token)
        assert origin() is None
        recorder.record("created", "session/c", trace="given")
        traces = [decode_row(p).trace_id for p in drained(recorder)]
        assert traces == [f"{0xABC:032x}", "mine", "given"]

    def test_from_many_threads(self, recorder: Recorder):
        """Threads that record at once, while batches are taken, leave neither gap nor double."""
        start = threading.Barrier(5)

        def work(name: int) -> None:
            start.wait()
            for n in range(2000):
                recorder.record("created", f"a/{name}-{n}")

        payloads: list[bytes] = []
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(work, n) for n in range(4)]
            start.wait()
            while not all(f.done() for f in futures):
                payloads += drained(recorder)
            for future in futures:
                future.result()
        payloads += drained(recorder)
        rows = [decode_row(p) for p in payloads]
        assert [row.seq for row in rows] == list(range(1, 8001))
        assert len({row.ref for row in rows}) == 8000


class TestBatch:
    """Group commit: the same batch until it is acknowledged."""

    def test_same_bytes_until_acknowledged(self, recorder: Recorder):
        """A batch that is sent again is the same, although more was recorded meanwhile."""
        recorder.record("created", "a/1")
        first = recorder.outbox.batch()
        recorder.record("created", "a/2")
        assert recorder.outbox.batch() == first
        recorder.outbox.acknowledge()
        seq, payloads = recorder.outbox.batch()
        assert (seq, [decode_row(p).ref for p in payloads]) == (2, ["a/2"])

    def test_bounded(self, recorder: Recorder):
        """A batch holds so many events at the most; the rest comes after."""
        for n in range(BATCH + 1):
            recorder.record("created", f"a/{n}")
        assert len(recorder.outbox.batch()[1]) == BATCH
        recorder.outbox.acknowledge()
        assert len(recorder.outbox.batch()[1]) == len(recorder) == 1

    def test_empty(self, recorder: Recorder):
        """Nothing recorded is an empty batch."""
        assert recorder.outbox.batch() == (1, [])

    def test_chained(self, recorder: Recorder):
        """The digests chain across batches."""
        before = NO_DIGEST
        for n in range(3 * BATCH):
            recorder.record("created", f"a/{n}")
        for payload in drained(recorder):
            body, digest = split_digest(payload)
            assert chain(before, body) == digest
            before = digest

    @pytest.mark.parametrize(
        ("ref", "attrs"), [("a/b", {"x": object()}), ("a/b", {"x": "\ud800"}), ("a/\ud800", None)]
    )
    def test_what_cannot_be_encoded(self, recorder: Recorder, ref: str, attrs: dict):  # type: ignore[type-arg]
        """An event with a value that cannot be written goes without its details; the rest follows."""
        recorder.record("created", "a/1")
        recorder.record("created", ref, attrs=attrs)
        recorder.record("created", "a/3")
        events = [decode(p) for p in drained(recorder)]
        assert [event.seq for event in events] == [1, 2, 3]
        assert "could not be encoded" in (events[1].reason or "")


class TestCost:
    """What recording takes from the caller."""

    def test_a_few_times_the_cost_of_making_the_event(self, recorder: Recorder):
        """The median of `record` is within a small factor of building the event alone.

        Turn by turn, and the best turn counts: others work on the machine too.
        """

        def cost(call: object) -> float:
            samples = []
            for _ in range(1000):
                began = perf_counter_ns()
                call()  # type: ignore[operator]
                samples.append(perf_counter_ns() - began)
            return median(samples)

        ref = "session/abc"
        ratios = []
        for _ in range(7):
            making = cost(lambda: EventRow("created", ref, "p", 1, 0.0, None, ("runner/r",)))
            recording = cost(lambda: recorder.record("created", ref, uses=("runner/r",)))
            ratios.append(recording / making)
        assert min(ratios) < 12
