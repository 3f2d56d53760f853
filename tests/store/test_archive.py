"""The archive: what leaves the stream is there, is read as if it had not, and is never lost."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import pytest

import store.segment as segment_module
from reconciler.fleet import fold_log
from reconciler.history import keep_history, nearest_snapshot
from store import EventLog, Fenced, Store
from store.archive import Archive
from store.errors import ArchiveError, HistoryDropped
from store.lease import release_lease, take_lease
from store.position import START, id_key
from store.retention import OFF, Retention, read_covered, trim, write_retention
from store.segment import decode_line, encode_line
from tests.history import Story, begin
from tests.support import entries_of


@pytest.fixture
async def story(store: Store, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Story:
    """A story whose segments and blocks are small."""
    monkeypatch.setattr("reconciler.history.LONGEST", 1000)
    monkeypatch.setattr(segment_module, "BLOCK", 90)
    return await begin(store, namespace)


def files(folder: Path, pattern: str = "*.jsonl.gz") -> list[Path]:
    return sorted(folder.glob(f"*/p0000/{pattern}"))


class TestOneLog:
    """Stream and archive read as one."""

    async def test_reads_are_the_same(self, story: Story, tmp_path: Path):
        """After archive and trim every way of reading gives what it gave before."""
        await story.write(3500)
        before = await entries_of(story.log)
        kept = await story.archive(tmp_path)
        assert (kept.archived, kept.trimmed) == (3500, 3499)
        assert len(await story.raw()) == 1
        fresh = EventLog(story.store, story.namespace)
        assert await entries_of(fresh) == before
        assert await fresh.length() == 3500
        for at in (0, 1, 89, 90, 91, 999, 2000, 3498, 3499):
            rest = [e async for e in fresh.read(before[at].id)]
            assert rest == before[at + 1 :]
            until = [e async for e in fresh.read(until=before[at].id)]
            assert until == before[: at + 1]

    async def test_writing_goes_on(self, story: Story, tmp_path: Path):
        """A client that knows nothing appends to the chain of an archived process."""
        await story.write(1200)
        await story.archive(tmp_path)
        await story.write(5, process="a@h:1:1")
        story.log = EventLog(story.store, story.namespace)
        await story.log.append([story._event("b@h:2:2")])
        last = (await entries_of(story.log))[-1].event
        assert await story.log._digest_before("b@h:2:2", last.seq + 1) == last.digest

    async def test_trim_while_somebody_reads(self, story: Story, tmp_path: Path):
        """A reader that is halfway when the stream is trimmed goes on in the archive."""
        await story.write(3000)
        before = [e.id for e in await entries_of(story.log)]
        reader = EventLog(story.store, story.namespace)
        read = []
        async for entry in reader.read():
            read.append(entry.id)
            if len(read) == 700:
                await story.archive(tmp_path)
        assert read == before

    async def test_what_is_no_event_is_archived_as_it_was(self, story: Story, tmp_path: Path):
        """Malformed entries keep their fields, in order, byte for byte."""
        odd = {b"e": b"{}\n", b"\xff": b"\x00"}
        await story.write(3)
        await story.store.redis.xadd(story.key, odd)
        await story.store.redis.xadd(story.key, {b"e": b'{"a": \n1}'})
        await story.write(3)
        before = await story.store.redis.execute_command("XRANGE", story.key, "-", "+")
        await story.archive(tmp_path)
        pages = [raw async for raw in EventLog(story.store, story.namespace).raw_pages(0)]
        assert [list(entry) for page in pages for entry in page] == before

    async def test_lines_are_json(self, story: Story, tmp_path: Path):
        """A segment is what `zcat` and a JSON parser make of it; the index has ids and times."""
        await story.write(200)
        await story.archive(tmp_path)
        lines = gzip.decompress(files(tmp_path)[0].read_bytes()).splitlines()
        assert len([json.loads(line)["e"]["seq"] for line in lines]) == 200
        index = json.loads(files(tmp_path, "*.index.json")[0].read_bytes())
        assert index["entries"] == 200
        assert index["first"] == json.loads(lines[0])["id"]
        assert index["blocks"][0]["time"].endswith("+00:00")
        for line in lines:
            assert encode_line(decode_line(line)) == line + b"\n"

    async def test_another_place(self, story: Story, tmp_path: Path):
        """When the archive moves, what went to the earlier place is still read there."""
        await story.write(500)
        before = await entries_of(story.log)
        await story.archive(tmp_path / "one")
        await story.write(500)
        both = Retention(str(tmp_path / "one"), 0).changed(str(tmp_path / "two"))
        await write_retention(story.namespace, both)
        await story.snapshot()
        now = await story.store.now_ms() + 1000
        await keep_history(story.namespace, story.log, await story.held(), now)
        assert len(files(tmp_path / "two")) == 1
        assert (await entries_of(EventLog(story.store, story.namespace)))[:500] == before

    async def test_missing_segment(self, story: Story, tmp_path: Path):
        """A segment that is gone is an error that names the gap, not a log with a hole."""
        await story.write(3000)
        await story.archive(tmp_path)
        second = files(tmp_path)[1]
        for path in (second, second.with_name(second.name.replace(".jsonl.gz", ".index.json"))):
            path.unlink()
        with pytest.raises(ArchiveError, match=r"neither in the stream nor in the archive"):
            await entries_of(EventLog(story.store, story.namespace))


class TestTrim:
    """What may go, and what may not."""

    async def test_only_what_is_covered(self, story: Story, tmp_path: Path):
        """The script refuses what no snapshot, or no archive, covers."""
        await story.write(50)
        end = (await story.log.last())[0]
        lease = await story.held()
        for archived in (True, False):
            with pytest.raises(ArchiveError, match="nothing was trimmed"):
                await trim(story.namespace, lease, end, archived=archived)
        await story.snapshot()
        with pytest.raises(ArchiveError, match="nothing was trimmed"):
            await trim(story.namespace, lease, end, archived=True)
        assert len(await story.raw()) == 50

    async def test_stale_lease(self, story: Story, tmp_path: Path):
        """A worker whose lease went to another archives, snapshots and trims nothing."""
        await story.write(50)
        old = await story.held()
        await story.snapshot()
        await write_retention(story.namespace, Retention(str(tmp_path), 0))
        await release_lease(story.namespace, old)
        await take_lease(story.namespace, 0, "other@h:8:8", 60_000)
        now = await story.store.now_ms() + 1000
        with pytest.raises(Fenced):
            await keep_history(story.namespace, story.log, old, now)
        with pytest.raises(Fenced):
            await story.snapshot()
        with pytest.raises(Fenced):
            await trim(story.namespace, old, "1-0", archived=False)
        assert len(await story.raw()) == 50

    async def test_retention(self, story: Story, tmp_path: Path):
        """What is younger than it is kept stays; without a setting everything stays."""
        await story.write(50)
        assert (await story.archive(tmp_path, keep=3600)).trimmed == 0
        await write_retention(story.namespace, Retention())
        now = await story.store.now_ms() + 10**9
        kept = await keep_history(story.namespace, story.log, await story.held(), now)
        assert (kept.archived, kept.trimmed) == (0, 0)

    async def test_killed_before_recording(self, story: Story, tmp_path: Path):
        """A segment that nobody recorded, and half a file, are no obstacle; old ones are swept."""
        await story.write(300)
        before = await entries_of(story.log)
        leftover = tmp_path / story.namespace.name / "p0000" / ".x.jsonl.gz.e0.tmp"
        leftover.parent.mkdir(parents=True)
        leftover.write_bytes(b"half")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("reconciler.history.record_archived", _killed)
            with pytest.raises(asyncio.CancelledError):
                await story.archive(tmp_path)
        assert len(files(tmp_path)) == 1
        await story.write(300)
        await story.archive(tmp_path)
        assert (await entries_of(EventLog(story.store, story.namespace)))[:300] == before
        assert not leftover.exists()

    async def test_killed_before_trimming(self, story: Story, tmp_path: Path):
        """What was archived and not trimmed is trimmed by the next round."""
        await story.write(300)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("reconciler.history.trim", _killed)
            with pytest.raises(asyncio.CancelledError):
                await story.archive(tmp_path)
        assert (await read_covered(story.namespace, 0)).trimmed == START
        kept = await story.archive(tmp_path)
        assert (kept.archived, kept.trimmed) == (0, 299)

    async def test_place_that_cannot_be_written(self, story: Story, tmp_path: Path):
        """A file where the folder should be: one line, nothing trimmed, nothing lost."""
        await story.write(100)
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ArchiveError, match="nothing was trimmed") as caught:
            await story.archive(tmp_path / "file")
        assert "\n" not in str(caught.value)
        assert len(await story.raw()) == 100

    async def test_disk_that_lies(
        self, story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """What cannot be read back as it was written is not trimmed."""
        await story.write(100)
        put = Archive._put

        def lying(self: Archive, folder: str, name: str, data: bytes, epoch: int) -> None:
            put(self, folder, name, data[:-9] if name.endswith(".gz") else data, epoch)

        monkeypatch.setattr(Archive, "_put", lying)
        with pytest.raises(ArchiveError, match="is not what was written"):
            await story.archive(tmp_path)
        assert len(await story.raw()) == 100


async def _killed(*_: object, **__: object) -> None:
    raise asyncio.CancelledError


class TestReaders:
    """Several at once, of one log."""

    async def test_each_reads_what_is_there(self, story: Story, tmp_path: Path):
        """Tasks that read different stretches of the archive by one EventLog do not mix them up."""
        for _ in range(4):
            await story.write(1500)
            await story.archive(tmp_path)
        log = EventLog(story.store, story.namespace)
        whole = [entry async for page in log.raw_pages(0) for entry in page]
        stretches = [slice(at, at + 1200) for at in range(1, 4000, 500)]

        async def read(stretch: slice) -> list[object]:
            after, until = whole[stretch.start - 1][0], whole[stretch.stop - 1][0]
            return [
                entry
                async for page in log.raw_pages(0, after.decode(), until.decode())
                for entry in page
            ]

        for _ in range(3):
            found = await asyncio.gather(*map(read, stretches))
            assert [len(some) for some in found] == [1200] * len(stretches)
            assert found == [whole[stretch] for stretch in stretches]


class TestOff:
    """`archive: off`: the operator wants old entries dropped."""

    async def test_dropped(self, story: Story):
        """They go, the state stays, and a moment before that is refused in one line."""
        await story.write(300)
        middle = (await entries_of(story.log))[150]
        whole = await fold_log(story.log)
        await story.archive(OFF)
        assert len(await story.raw()) == 1
        fresh = EventLog(story.store, story.namespace)
        assert await fold_log(fresh) == whole
        assert [e async for e in fresh.read()] != []
        with pytest.raises(HistoryDropped, match="ask for a later moment"):
            await fold_log(fresh, until=id_key(middle.id))

    async def test_newest_snapshot_damaged(self, story: Story):
        """Entries that the snapshot before the newest needs are not dropped."""
        await story.write(300)
        await story.archive(OFF)
        await story.write(300)
        await story.archive(OFF)
        whole = await fold_log(story.log)
        key = story.namespace.keys.partition(0).snapshots
        await story.store.redis.hset(key, (await story.log.last())[0], b"ARS1 broken")
        assert await fold_log(EventLog(story.store, story.namespace)) == whole


class TestSnapshots:
    """Where a fold begins."""

    async def test_nearest(self, story: Story, tmp_path: Path):
        """For any moment: snapshot (in Redis or the archive) and tail are a fold of everything."""
        positions = []
        for _ in range(6):
            await story.write(400)
            positions.append(await story.snapshot())
        entries = await entries_of(story.log)
        moments = [entries[at].id for at in range(0, len(entries), 171)] + positions

        async def states() -> list[object]:
            log = EventLog(story.store, story.namespace)
            return [await fold_log(log, until=id_key(moment)) for moment in moments]

        snapshots = story.namespace.keys.partition(0).snapshots
        before = await states()
        assert await story.store.redis.hlen(snapshots) == 3
        await story.archive(tmp_path)
        assert await states() == before
        await story.store.redis.delete(snapshots)
        assert await states() == before
        assert (await nearest_snapshot(story.namespace, 0))[1] == positions[-1]

    async def test_damaged(self, story: Story, caplog: pytest.LogCaptureFixture):
        """A damaged snapshot: one warning, the one before is used, nothing is lost."""
        await story.write(300)
        earlier = await story.snapshot()
        await story.write(300)
        whole = await fold_log(story.log)
        later = await story.snapshot()
        key = story.namespace.keys.partition(0).snapshots
        sealed = bytearray(await story.store.redis.hget(key, later))
        sealed[-5] ^= 1
        await story.store.redis.hset(key, later, bytes(sealed))
        caplog.clear()
        assert (await nearest_snapshot(story.namespace, 0))[1] == earlier
        assert caplog.text.count("snapshot skipped") == 1
        assert await fold_log(EventLog(story.store, story.namespace)) == whole
