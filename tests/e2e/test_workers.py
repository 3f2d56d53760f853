"""Several workers, one namespace: even shares, a worker that dies under load, one that sleeps too long."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from store.keys import Keys
from tests.e2e.programs import NAMESPACE, Cli, Program, eventually, running

pytestmark = pytest.mark.slow
Start = Callable[..., Program]

PARTITIONS = 16
LEASE = 4.0
POLICY = {"session_idle_timeout": 0.3, "backoff": 0.2}


class LoadProgram(Program):
    """tests/e2e/load_host.py."""

    def __init__(self, url: str, log: Path, pause: float = 0.1) -> None:
        super().__init__(
            [sys.executable, "-m", "tests.e2e.load_host", url, NAMESPACE, str(pause)], log
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.logged[-2000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, word: str = "report") -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=url.removeprefix("unix://"), decode_responses=True) as made:
        yield made


@pytest.fixture
def load(url: str, tmp_path: Path) -> Iterator[LoadProgram]:
    with running(LoadProgram(url, tmp_path / "load.log")) as program:
        yield program


def pid_of(worker: str) -> int:
    """Of a worker's id, name@hostname:pid:start."""
    return int(worker.split(":")[1])


def held(client: redis.Redis) -> dict[int, list[int]]:
    """Pid of a worker -> the partitions that it has the lease of."""
    shares: dict[int, list[int]] = {}
    for number in range(PARTITIONS):
        token = client.get(Keys(NAMESPACE).partition(number).lease)
        if token:
            shares.setdefault(pid_of(token), []).append(number)
    return shares


def even(client: redis.Redis, workers: list[Program]) -> bool:
    """These workers share all partitions, and their shares differ by one at most."""
    sizes = [len(held(client).get(worker.process.pid, [])) for worker in workers]
    return sum(sizes) == PARTITIONS and max(sizes) - min(sizes) <= 1


def written_by_workers(client: redis.Redis, partition: int) -> list[tuple[int, int, str, str]]:
    """(ms, epoch, type, order id) of what workers wrote, in the order of the log."""
    found = []
    for entry_id, fields in client.xrange(Keys(NAMESPACE).partition(partition).log):
        event = json.loads(fields["e"])
        if written := re.match(rf"worker-p{partition}-e(\d+)@", event["process"]):
            ms = int(entry_id.partition("-")[0])
            found.append((ms, int(written[1]), event["type"], event.get("order_id") or ""))
    return found


def redis_ms(client: redis.Redis) -> int:
    seconds, micros = client.time()
    return int(seconds) * 1000 + int(micros) // 1000


def check_story(client: redis.Redis, load: LoadProgram) -> None:
    """Nothing in use was touched, no order was carried out twice, and epochs never go back."""
    report = load.ask("stop")
    assert (report["twice"], report["touched_in_use"]) == ([], [])
    assert report["torn_down"] > 100
    for number in range(PARTITIONS):
        epochs = [epoch for _, epoch, _, _ in written_by_workers(client, number)]
        assert epochs == sorted(epochs), f"partition {number}: a fenced worker wrote"
        outcomes: Counter[str] = Counter()
        for _, fields in client.xrange(Keys(NAMESPACE).partition(number).log):
            event = json.loads(fields["e"])
            if event["type"] == "cleaned_up" and event.get("order_id"):
                outcomes[event["order_id"]] += 1
        assert outcomes
        assert [order for order, times in outcomes.items() if times > 1] == []


class TestShares:
    def test_join_leave_and_status(
        self, client: redis.Redis, start_worker: Start, cli: Cli
    ) -> None:
        """Shares even out when a worker joins and when one leaves; `status` shows who has what."""
        workers = [start_worker("--lease", "2", policy=POLICY)]
        eventually(lambda: even(client, workers), "one has all")
        workers += [start_worker("--lease", "2", policy=POLICY) for _ in range(2)]
        eventually(lambda: even(client, workers), "three share")
        shown = cli.json("status")["partitions"]
        assert Counter(pid_of(worker) for worker in shown.values()) == Counter(
            {pid: len(partitions) for pid, partitions in held(client).items()}
        )
        left = workers.pop()
        assert left.stop() == 0
        began = time.monotonic()
        eventually(lambda: even(client, workers), "two share")
        # It gave its partitions back: nobody had to wait for a lease to lapse.
        assert time.monotonic() - began < 1.5
        assert "partitions" in cli.run("status").stdout

    def test_forced_pass_with_several_workers(
        self, client: redis.Redis, load: LoadProgram, start_worker: Start, cli: Cli
    ) -> None:
        """`reconcile` asks each worker for what it holds, also while shares are moving."""
        workers = [start_worker("--lease", "2", policy={"session_idle_timeout": 3600})]
        eventually(lambda: even(client, workers), "one has all")
        assert len(cli.json("reconcile")["processes"]) == PARTITIONS
        workers += [start_worker("--lease", "2", policy={"session_idle_timeout": 3600})]
        assert len(cli.json("reconcile", "--dry-run")["processes"]) == PARTITIONS
        eventually(lambda: even(client, workers), "two share")
        workers[0].stop(signal.SIGKILL)
        assert len(cli.json("reconcile")["processes"]) == PARTITIONS


class TestADeadWorker:
    def test_served_again_within_one_lease_time(
        self, client: redis.Redis, load: LoadProgram, start_worker: Start,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Three workers, 16 partitions, SIGKILL one: the others act for all of them within one lease time.

        Acting is measured, not holding: the first order in each partition of the dead worker, by the
        clock of Redis. Nothing in use is touched, and no order is carried out twice.
        """
        workers = [start_worker("--lease", str(LEASE), policy=POLICY) for _ in range(3)]
        eventually(lambda: even(client, workers), "three share")
        eventually(
            lambda: all(written_by_workers(client, n) for n in range(PARTITIONS)), "all are busy"
        )
        victim = workers[1]
        orphaned = held(client)[victim.process.pid]
        assert len(orphaned) in {5, 6}
        victim.stop(signal.SIGKILL)
        killed = redis_ms(client)

        def served() -> dict[int, int] | None:
            first = {
                number: next(
                    (ms for ms, *_ in written_by_workers(client, number) if ms > killed), 0
                )
                for number in orphaned
            }
            return first if all(first.values()) else None

        first = eventually(served, "all are served again", LEASE * 3)
        slowest = (max(first.values()) - killed) / 1000
        with capsys.disabled():
            print(
                f"\n  {len(orphaned)} partitions of the dead worker served again after "
                f"{min(first.values()) / 1000 - killed / 1000:.2f} to {slowest:.2f} s "
                f"(lease time {LEASE:g} s)"
            )
        assert slowest < LEASE
        eventually(lambda: even(client, [workers[0], workers[2]]), "two share")
        check_story(client, load)


class TestASleepingWorker:
    @pytest.mark.parametrize("seconds", [0, 60])
    def test_wakes_up_fenced_and_rejoins(
        self, client: redis.Redis, load: LoadProgram, start_worker: Start, seconds: float
    ) -> None:
        """A worker stopped beyond its lease and continued writes nothing for what it lost, and rejoins."""
        sleeper, other = (start_worker("--lease", "2", policy=POLICY) for _ in range(2))
        eventually(lambda: even(client, [sleeper, other]), "two share")
        eventually(
            lambda: all(written_by_workers(client, n) for n in range(PARTITIONS)), "all are busy"
        )
        sleeper.process.send_signal(signal.SIGSTOP)
        awake_at = time.monotonic() + seconds
        try:
            eventually(lambda: even(client, [other]), "the other has all")
            last = {n: written_by_workers(client, n)[-1][0] for n in range(PARTITIONS)}
            eventually(
                lambda: all(written_by_workers(client, n)[-1][0] > last[n] for n in last),
                "the other serves all",
            )
            eventually(lambda: time.monotonic() >= awake_at, "it has slept enough", seconds + 1)
        finally:
            sleeper.process.send_signal(signal.SIGCONT)
        eventually(lambda: even(client, [sleeper, other]), "it is back")
        back = redis_ms(client)
        mine = held(client)[sleeper.process.pid]
        eventually(
            lambda: all(written_by_workers(client, n)[-1][0] > back for n in mine),
            "it serves again",
        )
        assert sleeper.process.poll() is None
        check_story(client, load)
