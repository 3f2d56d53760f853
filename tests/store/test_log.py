"""The log on a real Redis: append, read, follow, quarantine."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

import pytest
import redis

from store import EventLog, Fenced, LifecycleEvent, SequenceGap, Store
from store.event import NO_DIGEST, chain, decode_row, encode, split_digest
from store.log import PAGE, START, Appended, _merge, id_key, parse_page
from store.namespace import open_namespace
from tests.support import batch, entries_of, event, row


async def payloads(log: EventLog, process: str = "p") -> list[bytes]:
    namespace = await log.namespace()
    raw = await log._store.redis.xrange(namespace.partition_keys(process).log)
    return [fields[1] for _, fields in raw]


async def put_raw(log: EventLog, partition: int, fields: dict[str, bytes | str]) -> str:
    key = (await log.namespace()).keys.partition(partition).log
    added: bytes = await log._store.redis.xadd(key, fields)
    return added.decode()


async def seqs(log: EventLog, process: str = "p") -> list[int]:
    return [entry.event.seq for entry in await entries_of(log, process=process)]


class TestAppend:
    """Idempotent on (process, seq)."""

    async def test_what_is_appended_is_read(self, log: EventLog):
        """Events come back as they were, in order, with Redis time."""
        events = batch(1, 3)
        assert await log.append(events) == Appended(3, 3)
        found = await entries_of(log)
        assert [e.event.model_copy(update={"digest": ""}) for e in found] == events
        assert all(e.at_ms > 1_600_000_000_000 for e in found)

    async def test_same_batch_twice(self, log: EventLog):
        """The same batch again adds nothing: one copy is in the log."""
        await log.append(batch(1, 3))
        assert await log.append(batch(1, 3)) == Appended(3, 0)
        assert await seqs(log) == [1, 2, 3]

    async def test_same_batch_from_another_client(self, store: Store, namespace: str):
        """A client that knows nothing of what was sent before may send it again."""
        await EventLog(store, namespace).append(batch(1, 3))
        assert await EventLog(store, namespace).append(batch(1, 3)) == Appended(3, 0)

    async def test_same_batch_at_the_same_time(self, store: Store, namespace: str):
        """Ten clients that send the same batch at once leave one copy."""
        logs = [EventLog(store, namespace) for _ in range(10)]
        done = await asyncio.gather(*(one.append(batch(1, 5)) for one in logs))
        assert sum(appended.added for appended in done) == 5
        assert await seqs(logs[0]) == [1, 2, 3, 4, 5]

    async def test_partially_seen_batch(self, log: EventLog):
        """Of a batch of which the log has a part, the rest is added."""
        await log.append(batch(1, 3))
        assert await log.append(batch(2, 5)) == Appended(5, 2)
        assert await seqs(log) == [1, 2, 3, 4, 5]

    async def test_gap_is_refused(self, log: EventLog):
        """A batch beyond the next seq is refused as a whole; the message names the expected seq."""
        await log.append(batch(1, 2))
        with pytest.raises(SequenceGap, match="expects seq 3 next") as caught:
            await log.append(batch(4, 6))
        assert caught.value.expected == 3
        assert await seqs(log) == [1, 2]

    async def test_first_batch_must_start_at_one(self, log: EventLog):
        """A process that the log never heard of begins at 1."""
        with pytest.raises(SequenceGap, match="expects seq 1 next"):
            await log.append(batch(2, 2))

    async def test_empty_batch(self, log: EventLog):
        """An empty batch is nothing."""
        assert await log.append([]) == Appended(0, 0)

    @pytest.mark.parametrize(
        "wrong",
        [
            [event(1), event(3)],
            [event(1), event(1)],
            [event(1), event(2, process="q")],
        ],
    )
    async def test_mixed_batch(self, log: EventLog, wrong: list[LifecycleEvent]):
        """A batch that skips a number or mixes processes is an error of the caller."""
        with pytest.raises(ValueError, match="one process with seq ascending by one"):
            await log.append(wrong)

    async def test_processes_do_not_disturb_each_other(self, log: EventLog):
        """Each process has sequence numbers of its own."""
        await log.append(batch(1, 2, "p"))
        await log.append(batch(1, 1, "q"))
        await log.append(batch(3, 3, "p"))
        assert await seqs(log, "p") == [1, 2, 3]
        assert await seqs(log, "q") == [1]
        assert (await log.last_seq("p"), await log.last_seq("x")) == (3, 0)

    async def test_lost_process_is_fenced(self, log: EventLog, store: Store):
        """A process that was declared lost cannot append any more."""
        await log.append(batch(1, 1))
        await store.redis.hset((await log.namespace()).partition_keys("p").seqs, "p", "lost")
        with pytest.raises(Fenced):
            await log.append(batch(2, 2))
        assert await seqs(log) == [1]

    async def test_chain_goes_on_across_batches_and_clients(self, store: Store, namespace: str):
        """However the events were sent, the digests chain from the first to the last."""
        await EventLog(store, namespace).append(batch(1, 2))
        second = EventLog(store, namespace)
        await second.append(batch(1, 1))
        await second.append(batch(2, 4))
        await second.append(batch(3, 5))
        await EventLog(store, namespace).append(batch(6, 6))
        before = NO_DIGEST
        for payload in await payloads(second):
            body, digest = split_digest(payload)
            assert chain(before, body) == digest
            before = digest


class TestRead:
    """From a position on, over all partitions."""

    async def test_after_a_position(self, log: EventLog):
        """The entry of the position is not read, the ones after it are; `until` is read."""
        await log.append(batch(1, 5))
        ids = [entry.id for entry in await entries_of(log)]
        assert [e.event.seq for e in await entries_of(log, after=ids[1])] == [3, 4, 5]
        assert [e.event.seq for e in await entries_of(log, after=ids[1], until=ids[3])] == [3, 4]
        assert await entries_of(log, after=ids[4]) == []

    async def test_more_than_a_page(self, log: EventLog):
        """A long log is read to its end, each entry once."""
        await log.append(batch(1, 2500))
        assert await seqs(log) == list(range(1, 2501))

    async def test_merged_by_time(self, log: EventLog):
        """Partitions are merged in the order of Redis time; each process stays in its own order."""
        for n in range(1, 4):
            for name in "abcdefgh":
                await log.append(batch(n, n, name))
        found = await entries_of(log)
        assert len({entry.partition for entry in found}) > 1
        keys = [(id_key(e.id), e.partition) for e in found]
        assert keys == sorted(keys)
        for name in "abcdefgh":
            assert [e.event.seq for e in found if e.event.process == name] == [1, 2, 3]

    async def test_one_partition(self, log: EventLog):
        """One partition can be read alone."""
        await log.append(batch(1, 1, "p"))
        partition = (await log.namespace()).partition_of("p")
        assert [e.event.seq for e in await entries_of(log, partition=partition)] == [1]
        assert await entries_of(log, partition=(partition + 1) % 16) == []

    async def test_ids_sort_as_numbers(self):
        """Entry ids are compared as Redis does: 9-10 comes after 9-9, and 10-0 after both."""
        assert sorted(["10-0", "9-10", "9-9"], key=id_key) == ["9-9", "9-10", "10-0"]

    async def test_merge_of_nothing(self):
        """Merging no streams, or empty ones, gives nothing."""
        assert [entry async for entry in _merge([])] == []

    async def test_last(self, log: EventLog):
        """`last` is the id of the last entry of each partition, 0-0 where there is none."""
        await log.append(batch(1, 2))
        namespace = await log.namespace()
        mine = namespace.partition_of("p")
        last = await log.last()
        assert last[mine] == (await entries_of(log))[-1].id
        assert {at for p, at in last.items() if p != mine} == {START}
        assert await log.last(mine) == {mine: last[mine]}

    async def test_page(self, log: EventLog):
        """A page ends where it was told to; an empty page means that the end was reached."""
        await log.append(batch(1, 3))
        partition = (await log.namespace()).partition_of("p")
        page = await log.page(partition, count=2)
        assert [r.seq for _, r in page.rows] == [1, 2]
        page = await log.page(partition, page.position)
        assert [r.seq for _, r in page.rows] == [3]
        end = await log.page(partition, page.position)
        assert (end.rows, end.position) == ([], page.position)

    async def test_next_page_is_asked_for_ahead(self, log: EventLog):
        """While a page is folded, and the event loop stands still, Redis makes the next one ready."""
        await log.append(batch(1, PAGE + 1))
        partition = (await log.namespace()).partition_of("p")
        path = log._store.redis.connection_pool.connection_kwargs["path"]
        with redis.Redis(unix_socket_path=path) as watching:

            def reads() -> int:
                stats: Any = watching.info("commandstats")
                return int(stats.get("cmdstat_xrange", {"calls": 0})["calls"])

            before, deadline = reads(), time.monotonic() + 10
            async with aclosing(log.pages(partition)) as pages:  # type: ignore[type-var]
                page = await anext(pages)
                assert len(page.events) == PAGE
                while reads() < before + 2:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)  # noqa: ASYNC251 - the loop is to stand still


class TestFollow:
    """Events as they come."""

    async def test_from_the_present_end(self, log: EventLog):
        """Without a position, only what comes from now on is given."""
        await log.append(batch(1, 2))
        following = log.follow()
        task = asyncio.ensure_future(anext(following))
        # The follower reads its position before it waits: sent again until it has been seen.
        seq = 3
        while not task.done():
            await log.append(batch(seq, seq))
            seq += 1
            await asyncio.wait([task], timeout=0.05)
        assert (await task).event.seq >= 3
        await following.aclose()

    async def test_from_a_position(self, log: EventLog):
        """From the start, history comes first and then what is new."""
        await log.append(batch(1, 2))
        following = log.follow(START)
        async with asyncio.timeout(5):
            assert [(await anext(following)).event.seq for _ in range(2)] == [1, 2]
            await log.append(batch(3, 3))
            assert (await anext(following)).event.seq == 3
        await following.aclose()

    async def test_malformed_is_passed_over(self, log: EventLog):
        """An entry that is not an event does not stop a follower."""
        await log.append(batch(1, 1))
        partition = (await log.namespace()).partition_of("p")
        await put_raw(log, partition, {"e": "rubbish"})
        await log.append(batch(2, 2))
        following = log.follow({partition: START})
        async with asyncio.timeout(5):
            assert [(await anext(following)).event.seq for _ in range(2)] == [1, 2]
        await following.aclose()


class TestMalformedEntry:
    """Entries that are not events."""

    async def test_skipped_and_listed(self, log: EventLog):
        """A reader passes over it; a page lists it with the reason; the raw entry stays."""
        await log.append(batch(1, 1))
        partition = (await log.namespace()).partition_of("p")
        bad = [
            await put_raw(log, partition, {"e": "rubbish"}),
            await put_raw(log, partition, {"x": "1"}),
            await put_raw(log, partition, {"e": encode(row(9), NO_DIGEST)[0], "x": "1"}),
            await put_raw(log, partition, {"e": b"\xff\x00"}),
        ]
        await log.append(batch(2, 2))
        assert await seqs(log) == [1, 2]
        page = await log.page(partition)
        assert [r.seq for _, r in page.rows] == [1, 2]
        assert [entry_id for entry_id, _ in page.malformed] == bad
        assert all(reason for _, reason in page.malformed)
        assert len(await payloads(log)) == 6

    @pytest.mark.parametrize(
        "bad",
        [
            (b'{"type":"created"}', b'{"type":"created","ref":"a/x","process":"p","seq":9}'),
            (b"%s,%s", b""),
            (b'{"a":1', b'"b":2}'),
        ],
    )
    async def test_neighbours_are_read(self, log: EventLog, bad: tuple[bytes, bytes]):
        """Whatever stands in an entry, those beside it are read as they are, each under its own id."""
        good = [encode(row(seq), NO_DIGEST)[0] for seq in (1, 2, 3)]
        raw = [
            (b"%d-0" % number, [b"e", payload.replace(b"%s", good[0])])
            for number, payload in enumerate((good[0], bad[0], good[1], bad[1], good[2]), 1)
        ]
        page = parse_page(0, raw, START)
        assert [page.rows[0], page.rows[-1]] == [
            ("1-0", decode_row(good[0])), ("5-0", decode_row(good[2])),
        ]  # fmt: skip
        assert {name: one.seq for name, one in page.rows}["3-0"] == 2
        assert list(page.times) == [int(name.partition(b"-")[0]) for name in page.ids]
        assert page.entries == 5

    async def test_quarantine(self, log: EventLog):
        """What is set aside is listed by id with its reason, from all partitions."""
        await log.quarantine(0, [("1-0", "no digest")])
        await log.quarantine(5, [("2-0", "not JSON")])
        await log.quarantine(5, [])
        assert await log.quarantined() == {"1-0": "no digest", "2-0": "not JSON"}

    async def test_deleted_entry(self):
        """An entry that Redis reports without content is malformed, not a crash."""
        page = parse_page(0, [(b"1-0", None)], START)
        assert (page.rows, list(page.events), page.position) == ([], [], "1-0")
        assert [entry_id for entry_id, _ in page.malformed] == ["1-0"]

    async def test_chain_goes_on_past_it(self, store: Store, namespace: str):
        """A malformed entry does not break the chain of the process around it."""
        log = EventLog(store, namespace)
        await log.append(batch(1, 1))
        await put_raw(log, (await log.namespace()).partition_of("p"), {"e": "rubbish"})
        await EventLog(store, namespace).append(batch(2, 2))
        first, _, second = await payloads(log)
        body, digest = split_digest(second)
        assert chain(decode_row(first).digest, body) == digest


class TestNamespaceOfALog:
    """A log is opened with its namespace."""

    async def test_opened_namespace_is_taken(self, store: Store, namespace: str):
        """A log made with an opened namespace uses that."""
        made = await open_namespace(store, namespace, 2)
        log = EventLog(store, made)
        assert await log.namespace() is made
        assert list(await log.last()) == [0, 1]
