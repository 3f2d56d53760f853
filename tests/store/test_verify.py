"""Verify: each way to tamper with the log is found, by position, in the stream and in the archive."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from store import EventLog, Store
from store.event import NO_DIGEST, decode_row, encode
from store.position import id_key
from store.retention import OFF
from store.verify import Problem, Verification, verify_log
from tests.history import Story, begin
from tests.support import row

Entries = list[tuple[bytes, list[bytes]]]


@pytest.fixture
async def story(store: Store, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Story:
    monkeypatch.setattr("reconciler.history.LONGEST", 1000)
    return await begin(store, namespace)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/p0000/*.jsonl.gz"))


async def check(story: Story) -> Verification:
    return await verify_log(EventLog(story.store, story.namespace))


def fields_of(fields: object) -> list[bytes]:
    """What redis-py made of the fields, as a list."""
    return list(fields)  # type: ignore[call-overload, no-any-return]


def edit(entries: Entries) -> tuple[str, str, int]:
    """Changes the reference in one event; what should be found: kind, process, seq."""
    event = decode_row(entries[100][1][1])
    entries[100] = (entries[100][0], [b"e", entries[100][1][1].replace(b"session/", b"sessiom/")])
    return "edited", event.process, event.seq


def edit_with_new_digest(entries: Entries) -> tuple[str, str, int]:
    """Changes an event and gives it a digest that fits; the one after it no longer does."""
    event = decode_row(entries[100][1][1])
    of_process = [e for e in entries if decode_row(e[1][1]).process == event.process]
    before = decode_row(of_process[event.seq - 2][1][1]).digest
    forged, _ = encode(msgspec.structs.replace(event, ref="session/other", digest=""), before)
    entries[100] = (entries[100][0], [b"e", forged])
    return "edited", event.process, event.seq + 1


def remove(entries: Entries) -> tuple[str, str, int]:
    """Takes one event out."""
    event = decode_row(entries.pop(100)[1][1])
    return "removed", event.process, event.seq


def double(entries: Entries) -> tuple[str, str, int]:
    """Puts one event in a second time."""
    entry_id, fields = entries[100]
    event = decode_row(fields[1])
    ms, n = id_key(entries[-1][0].decode())
    entries.append((f"{ms}-{n + 1}".encode(), fields))
    assert entry_id
    return "added", event.process, event.seq


def add(entries: Entries) -> tuple[str, str, int]:
    """Puts in an event of a process that never wrote one, with a digest that fits."""
    payload, _ = encode(row(1, process="ghost@h:1:1"), NO_DIGEST)
    ms, n = id_key(entries[-1][0].decode())
    entries.append((f"{ms}-{n + 1}".encode(), [b"e", payload]))
    return "added", "ghost@h:1:1", 1


def reorder(entries: Entries) -> tuple[str, str, int]:
    """Exchanges two events that follow each other in one process."""
    event = decode_row(entries[100][1][1])
    later = next(
        at for at in range(101, len(entries))
        if decode_row(entries[at][1][1]).process == event.process
    )  # fmt: skip
    first, second = entries[100], entries[later]
    entries[100], entries[later] = (first[0], second[1]), (second[0], first[1])
    return "reordered", event.process, event.seq


def no_event(entries: Entries) -> tuple[str, str, int]:
    """Puts in something that is no event."""
    ms, n = id_key(entries[-1][0].decode())
    entries.append((f"{ms}-{n + 1}".encode(), [b"e", b"{}"]))
    return "added", "", 0


Tamper = Callable[[Entries], tuple[str, str, int]]
WAYS = [edit, edit_with_new_digest, remove, double, add, reorder, no_event]


def has(found: Verification, kind: str, process: str, seq: int) -> Problem:
    for problem in found.problems:
        if (problem.kind, problem.process, problem.seq) == (kind, process, seq):
            return problem
    raise AssertionError(f"no {kind} of {process} #{seq} in {found.problems}")


class TestStream:
    @pytest.mark.parametrize("tamper", WAYS)
    async def test_tampering_is_found(self, story: Story, tamper: Tamper):
        """The event concerned is named, and what is said is about nothing else."""
        await story.write(400)
        assert (await check(story)).whole
        entries = [(entry_id, fields_of(fields)) for entry_id, fields in await story.raw()]
        ids = [entry_id.decode() for entry_id, _ in entries]
        wanted = tamper(entries)
        await story.replace(entries)
        found = await check(story)
        problem = has(found, *wanted)
        assert problem.where == "stream"
        assert problem.position in ids or id_key(problem.position) > id_key(ids[-1])
        assert found.problem_count == 1

    async def test_end_cut_off(self, story: Story):
        """Events missing at the end are found by what Redis knows of the process."""
        await story.write(400)
        entries = [(entry_id, fields_of(fields)) for entry_id, fields in await story.raw()]
        last = decode_row(entries[-1][1][1])
        await story.replace(entries[:-1])
        assert has(await check(story), "removed", last.process, last.seq)

    async def test_written_meanwhile(self, story: Story):
        """What is appended while it looks is no problem."""
        await story.write(50)
        seen = []

        def more(count: int) -> None:
            seen.append(count)

        found = await verify_log(story.log, progress=more)
        await story.write(50)
        assert found.whole
        assert sum(seen) == 50

    async def test_dropped_beginning(self, story: Story):
        """With `archive: off` a process may begin late; which do, is said."""
        await story.write(300)
        await story.archive(OFF)
        await story.write(100)
        found = await check(story)
        assert found.whole, found.problems
        assert found.began_late
        assert all(seq > 1 for seq in found.began_late.values())


class TestArchive:
    async def archived(self, story: Story, folder: Path) -> list[Path]:
        await story.write(2500)
        await story.archive(folder)
        await story.write(20)
        found = await check(story)
        assert found.whole, found.problems
        assert (found.events, found.segments) == (2520, 3)
        return files(folder)

    @pytest.mark.parametrize("tamper", [edit, edit_with_new_digest, remove, double, add, reorder])
    async def test_tampering_is_found(self, story: Story, tmp_path: Path, tamper: Tamper):
        """The event is named, with the file, and the file is said to have been changed."""
        path = (await self.archived(story, tmp_path))[0]
        lines = gzip.decompress(path.read_bytes()).splitlines()
        entries: Entries = []
        for line in lines:
            entry_id, _, payload = line[7:-1].partition(b'","e":')
            entries.append((entry_id, [b"e", payload]))
        wanted = tamper(entries)
        text = b"".join(b'{"id":"%b","e":%b}\n' % (i, fields[1]) for i, fields in entries)
        path.write_bytes(gzip.compress(text))
        found = await check(story)
        assert has(found, *wanted).where in {str(path), "stream"}
        assert any(p.kind == "segment" and "checksum" in p.detail for p in found.problems)

    async def test_removed_segment(self, story: Story, tmp_path: Path):
        """A segment that was taken away, in the middle or at the end, is named by its limits."""
        paths = await self.archived(story, tmp_path)
        for path in paths[1:]:
            index = path.with_name(path.name.replace(".jsonl.gz", ".index.json"))
            text = index.read_bytes()
            index.unlink()
            found = await check(story)
            assert any("segments are missing" in problem.detail for problem in found.problems)
            index.write_bytes(text)
        assert (await check(story)).whole

    async def test_damaged_file(self, story: Story, tmp_path: Path):
        """A file that cannot be read to its end is a problem, and the look goes on behind it."""
        paths = await self.archived(story, tmp_path)
        paths[1].write_bytes(paths[1].read_bytes()[:-500])
        found = await check(story)
        assert any(p.where == str(paths[1]) and p.kind == "segment" for p in found.problems)
        assert found.segments == 3
