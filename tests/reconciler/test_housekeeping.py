"""What a worker does for the history of its partitions: snapshots when they are due, archive on time."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler import Reconciler
from reconciler.fleet import fold_log
from reconciler.housekeeping import Housekeeping
from reconciler.metrics import Metrics
from reconciler.tail import Tail
from store import EventLog, Store
from store.lease import release_lease
from store.retention import Retention, write_retention
from store.snapshots import snapshot_positions
from tests.history import Story, begin


@pytest.fixture
async def story(store: Store, namespace: str) -> Story:
    return await begin(store, namespace)


def indexes(folder: Path) -> int:
    return len(list(folder.rglob("*.index.json")))


async def acting(store: Store, namespace: str, **limits: float) -> Reconciler:
    """A reconciler that holds its partitions and has read the log, with its own idea of when."""
    worker = Reconciler(store, namespace=namespace)
    await worker.open()
    await worker.keep_leases()
    worker.housekeeping = Housekeeping(
        worker.log, worker.tail, worker.metrics, lambda: worker.leases, worker.now_ms, **limits
    )  # type: ignore[arg-type]
    return worker


async def test_due_by_number(store: Store, namespace: str, story: Story):
    """A snapshot is taken when enough was folded since the last, and not before."""
    worker = await acting(store, namespace, snapshot_events=250)
    await story.write(200)
    await worker.tail.catch_up()
    await worker.housekeeping.snapshots()
    assert await snapshot_positions(story.namespace, 0) == []
    await story.write(100)
    await worker.tail.catch_up()
    for _ in range(2):
        await worker.housekeeping.snapshots()
        assert await snapshot_positions(story.namespace, 0) == [(await story.log.last())[0]]
    await worker.release()


async def test_due_by_time(store: Store, namespace: str, story: Story):
    """After a while one event is enough; without any there is none."""
    worker = await acting(store, namespace, snapshot_seconds=0)
    await worker.housekeeping.snapshots()
    assert await snapshot_positions(story.namespace, 0) == []
    await story.write(1)
    await worker.tail.catch_up()
    await worker.housekeeping.snapshots()
    assert len(await snapshot_positions(story.namespace, 0)) == 1
    await worker.release()


async def test_next_worker_begins_there(store: Store, namespace: str, story: Story):
    """Another worker begins with the snapshot, folds what came since, and knows the same."""
    worker = await acting(store, namespace, snapshot_events=10)
    await story.write(300)
    await worker.tail.catch_up()
    await worker.housekeeping.snapshots()
    await worker.release()
    await story.write(50)
    tail = Tail(EventLog(store, story.namespace), Metrics(), lambda *_: None)
    alive = await tail.add([0])
    assert tail.begun == {0: 300}
    assert tail.state == await fold_log(story.log)
    assert sorted(alive) == sorted(tail.state.processes)
    tail.drop([0])
    assert (tail.state.processes, tail.state.events) == ({}, 0)


async def test_archive_on_time(store: Store, namespace: str, story: Story, tmp_path: Path):
    """The schedule archives what is older than it is kept, without being asked."""
    await write_retention(story.namespace, Retention(str(tmp_path), 0))
    await story.write(100)
    worker = await acting(store, namespace)
    worker._clock_offset_ms += 5000
    await worker.housekeeping.archive()
    assert len(await story.raw()) == 1
    assert indexes(tmp_path) == 1
    await worker.release()


@pytest.mark.parametrize("fault", ["lease", "place"])
async def test_faults_do_no_harm(
    store: Store, namespace: str, story: Story, tmp_path: Path, fault: str
):
    """A lost lease, or a place that cannot be written: it is said, and nothing leaves the stream."""
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" if fault == "place" else tmp_path
    await write_retention(story.namespace, Retention(str(place), 0))
    await story.write(100)
    worker = await acting(store, namespace, snapshot_seconds=0)
    worker._clock_offset_ms += 5000
    if fault == "lease":
        await release_lease(story.namespace, worker.leases[0])
    await worker.housekeeping.archive()
    await worker.housekeeping.snapshots()
    assert len(await story.raw()) == 100
    await worker.release()
