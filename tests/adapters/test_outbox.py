"""The outbox and its spill file on their own: order, bounds, damage."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from adapters import outbox as outbox_module
from adapters.outbox import BATCH, READ_TRIES, Forgotten, Outbox, SpillUnreadable
from adapters.recorder import Recorder
from adapters.spill import NotASpillFile, SpillFile, spill_files
from store.event import NO_DIGEST, chain, decode_row, split_digest

PROCESS = "svc@host:1:1"


def recorder(limit: int = 100_000) -> Recorder:
    return Recorder(Outbox(PROCESS, limit=limit), lambda: None)


def fill(one: Recorder, count: int) -> None:
    for _ in range(count):
        one.record("reused", "session/s")


async def drained(outbox: Outbox) -> list[bytes]:
    """Sends everything to nowhere, and gives what was sent."""
    sent: list[bytes] = []
    while True:
        if outbox.needs_file:
            await outbox.load()
        first, batch = outbox.batch()
        if not batch:
            if not outbox.needs_file:
                return sent
            continue
        assert decode_row(batch[0]).seq == first
        sent += batch
        outbox.acknowledge()
        await outbox.sweep()


def check_chain(payloads: list[bytes], digest: str = NO_DIGEST, last: int = 0) -> int:
    """Every seq once, in order, chained; the last one."""
    for payload in payloads:
        body, told = split_digest(payload)
        digest = chain(digest, body)
        assert told == digest
        last += 1
        assert decode_row(payload).seq == last
    return last


def damage(path: Path, at: int, count: int = 4) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        before = file.read(count)
        file.seek(at)
        file.write(bytes(byte ^ 0xFF for byte in before))


class TestOrder:
    """What is recorded comes out once, in order."""

    async def test_in_batches(self):
        """Batches hold at most BATCH events, and the same one comes again until it is acknowledged."""
        one = recorder()
        fill(one, BATCH + 10)
        first, batch = one.outbox.batch()
        assert (first, len(batch)) == (1, BATCH)
        assert one.outbox.batch() == (first, batch)
        assert check_chain(await drained(one.outbox)) == BATCH + 10
        assert len(one) == 0

    async def test_through_the_file(self, tmp_path: Path):
        """Beyond half of the bound events go through the file, and come out in order, chained."""
        one = recorder(limit=1000)
        await one.outbox.open_spill(tmp_path)
        sent = 0
        for _ in range(5):
            fill(one, 900)
            assert await one.outbox.relieve()
            assert one.outbox.held[0] <= 1000
            sent += 900
        assert one.outbox.spilled > 3000
        assert check_chain(await drained(one.outbox)) == sent
        assert one.outbox.spilled == 0
        assert spill_files(tmp_path)[0].stat().st_size < 200

    async def test_sending_while_spilling(self, tmp_path: Path):
        """A batch on its way while events are spilled is neither lost nor doubled."""
        one = recorder(limit=1000)
        await one.outbox.open_spill(tmp_path)
        fill(one, 900)
        _, batch = one.outbox.batch()
        await one.outbox.relieve(wholly=True)
        one.outbox.acknowledge()
        fill(one, 100)
        assert check_chain(batch + await drained(one.outbox)) == 1000

    async def test_again_after_being_emptied(self, tmp_path: Path):
        """The file serves again after it was emptied."""
        one = recorder(limit=100)
        await one.outbox.open_spill(tmp_path)
        sent: list[bytes] = []
        for _ in range(3):
            fill(one, 90)
            await one.outbox.relieve()
            sent += await drained(one.outbox)
        assert check_chain(sent) == 270


class TestKept:
    """What was acknowledged is kept, and sent again from where Redis says."""

    @pytest.mark.parametrize("expected", [1, 2, BATCH, BATCH + 1, 1200])
    async def test_rewind(self, expected: int):
        """After a failover everything from the expected seq on comes again."""
        one = recorder()
        fill(one, 1200)
        sent = await drained(one.outbox)
        fill(one, 5)
        one.outbox.rewind(expected)
        first, _ = one.outbox.batch()
        assert first <= expected
        again = await drained(one.outbox)
        assert again[: 1200 - first + 1] == sent[first - 1 :]
        assert check_chain(sent[: first - 1] + again) == 1205

    async def test_bounded(self, monkeypatch: pytest.MonkeyPatch):
        """Only so many are kept; what is older cannot be sent again, and that is said."""
        monkeypatch.setattr(outbox_module, "KEPT_EVENTS", 1000)
        one = recorder()
        fill(one, 5000)
        await drained(one.outbox)
        assert one.outbox.held[0] <= 1000
        with pytest.raises(Forgotten, match="kept from 4001"):
            one.outbox.rewind(4000)
        assert one.outbox.rewind(4001) == 1000


class TestFull:
    """When there is no room the service goes on, and what is lost is counted."""

    async def test_memory(self, caplog: pytest.LogCaptureFixture):
        """Without a file, events beyond the bound are dropped; one line says so; no gap arises."""
        one = recorder(limit=100)
        with caplog.at_level(logging.ERROR):
            fill(one, 150)
        assert (len(one), one.outbox.dropped, one.seq) == (100, 50, 150)
        assert caplog.text.count("the outbox is full") == 1
        one.end("full")
        assert check_chain(await drained(one.outbox)) == 101

    async def test_bytes(self):
        """Large events meet the bound in bytes."""
        one = recorder(limit=100)
        for _ in range(100):
            one.record("reused", "session/s", reason="x" * 5000)
        assert one.outbox.held[1] <= 100 * 512
        assert one.outbox.dropped > 80

    async def test_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
        """A full disk is said once, memory is used to its bound, and all goes on when there is room."""
        one = recorder(limit=1000)
        await one.outbox.open_spill(tmp_path)
        fill(one, 700)
        await one.outbox.relieve()
        torn, real = [], os.pwrite

        def full(fd: int, data: memoryview, at: int) -> int:
            torn.append(real(fd, data[: len(data) // 2], at))
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(os, "pwrite", full)
            fill(one, 600)
            assert not await one.outbox.relieve()
            fill(one, 300)
            assert not await one.outbox.relieve()
        assert torn
        assert caplog.text.count("cannot be written") == 1
        assert "No space left" in one.outbox.problem
        fill(one, 100)
        assert await one.outbox.relieve()
        assert one.outbox.problem == ""
        assert one.outbox.dropped == 0
        assert check_chain(await drained(one.outbox)) == 1700

    async def test_limit_of_the_file(self, tmp_path: Path):
        """The file has a bound too."""
        one = recorder(limit=1000)
        await one.outbox.open_spill(tmp_path, 20_000)
        fill(one, 900)
        assert not await one.outbox.relieve()
        assert "limit" in one.outbox.problem
        assert spill_files(tmp_path)[0].stat().st_size <= 20_200
        fill(one, 2000)
        assert one.outbox.dropped > 0
        one.end("full")
        assert check_chain(await drained(one.outbox)) == one.outbox.recorded

    async def test_no_folder(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        """A folder that cannot be made is said in one line; memory serves."""
        (tmp_path / "file").write_text("")
        one = recorder()
        with caplog.at_level(logging.ERROR):
            await one.outbox.open_spill(tmp_path / "file" / "spill")
        assert caplog.text.count("no spill file can be made") == 1
        fill(one, 10)
        assert check_chain(await drained(one.outbox)) == 10


class TestDamage:
    """A damaged file costs the damaged records and nothing else."""

    async def test_in_the_middle(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        """A stand-in takes the place of a damaged record, and those after it are chained anew."""
        one = recorder(limit=100)
        await one.outbox.open_spill(tmp_path)
        fill(one, 90)
        await one.outbox.relieve(wholly=True)
        path = spill_files(tmp_path)[0]
        damage(path, path.stat().st_size // 2)
        fill(one, 20)
        with caplog.at_level(logging.ERROR):
            sent = await drained(one.outbox)
        assert check_chain(sent) == 110
        assert one.outbox.damaged == 1
        assert [decode_row(p).type for p in sent].count("cleanup_failed") == 1
        assert caplog.text.count("torn or damaged") == 1

    async def test_cut_short(self, tmp_path: Path):
        """What a living process misses at the end of its file is known, and stood in for."""
        one = recorder(limit=100)
        await one.outbox.open_spill(tmp_path)
        fill(one, 90)
        await one.outbox.relieve(wholly=True)
        path = spill_files(tmp_path)[0]
        os.truncate(path, path.stat().st_size - 300)
        fill(one, 10)
        assert check_chain(await drained(one.outbox)) == 100
        assert 1 <= one.outbox.damaged <= 3

    @pytest.mark.parametrize("failures", [1, READ_TRIES - 1])
    async def test_that_cannot_be_read_for_now(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
    ):
        """A read that fails passes nothing over: it is tried again, and every event is sent."""
        one = recorder(limit=100)
        await one.outbox.open_spill(tmp_path)
        fill(one, 90)
        await one.outbox.relieve(wholly=True)
        left, pread = failures, os.pread

        def fails(fd: int, count: int, at: int) -> bytes:
            nonlocal left
            if left and at > 3000:
                left -= 1
                raise OSError(errno.EIO, "Input/output error")
            return pread(fd, count, at)

        monkeypatch.setattr(os, "pread", fails)
        for _ in range(failures):
            with pytest.raises(SpillUnreadable, match="cannot be read now"):
                await one.outbox.load()
        assert check_chain(await drained(one.outbox)) == 90
        assert one.outbox.damaged == 0

    async def test_that_cannot_be_read_at_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """In the end its events are given up and stood in for, so that those after them are sent."""
        one = recorder(limit=100)
        await one.outbox.open_spill(tmp_path)
        fill(one, 90)
        await one.outbox.relieve(wholly=True)

        def fails(*_: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(os, "pread", fails)
            for _ in range(READ_TRIES - 1):
                with pytest.raises(SpillUnreadable):
                    await one.outbox.load()
            await one.outbox.load()
        fill(one, 5)
        assert check_chain(await drained(one.outbox)) == 95
        assert one.outbox.damaged == 90

    @pytest.mark.parametrize("cut", [1, 10, 25])
    def test_torn_record(self, tmp_path: Path, cut: int):
        """A torn last record is passed over; those before it are read."""
        file = SpillFile.create(tmp_path, PROCESS)
        file.append(1, [b"one", b"two", b"three" * 10])
        file.close()
        os.truncate(file.path, file.path.stat().st_size - cut)
        found = SpillFile.left_behind(file.path)
        assert found is not None
        assert found.read(10) == [(1, b"one"), (2, b"two")]
        assert (found.read(10), found.skipped > 0) == ([], True)

    def test_damaged_length(self, tmp_path: Path):
        """A damaged length does not hide what comes after it."""
        file = SpillFile.create(tmp_path, PROCESS)
        file.append(1, [b"one"])
        at = file.path.stat().st_size
        file.append(2, [b"two", b"three"])
        damage(file.path, at + 4)
        assert file.read(10) == [(1, b"one"), (3, b"three")]

    def test_lock(self, tmp_path: Path):
        """The file of a living process is nobody else's."""
        file = SpillFile.create(tmp_path, PROCESS)
        assert SpillFile.left_behind(file.path) is None
        file.close()
        found = SpillFile.left_behind(file.path)
        assert found is not None
        assert found.process == PROCESS

    def test_something_else(self, tmp_path: Path):
        """A file that is not a spill file is left alone."""
        path = tmp_path / "x.spill"
        path.write_bytes(b"hello")
        with pytest.raises(NotASpillFile):
            SpillFile.left_behind(path)
        assert SpillFile.left_behind(tmp_path / "gone.spill") is None
