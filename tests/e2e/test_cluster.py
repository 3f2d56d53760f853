"""The end-to-end tests of one Redis, unchanged, on a real cluster and behind real sentinels.

The same test functions run on another `url`: a cluster of three masters and three replicas, then the
same while the master of the chat service's partition is killed and its replica takes over.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from store.keys import Keys, PartitionKeys
from tests.e2e.programs import (
    FAST_POLICY,
    NAMESPACE,
    Cli,
    HostProgram,
    Program,
    eventually,
    running,
)
from tests.e2e.test_leaks import OPEN_CHATS
from tests.e2e.test_leaks import TestEachLeak as _EachLeak
from tests.e2e.test_leaks import TestInUse as _InUse
from tests.e2e.test_leaks import TestProcesses as _Processes
from tests.e2e.test_leaks import TestTheStory as _TheStory
from tests.redis_processes import RedisCluster, SentinelSetup, Server, until
from tests.redis_processes import running as running_redis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
Start = Callable[..., Program]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three masters and three replicas, for all tests of this file."""
    with running_redis(RedisCluster(tmp_path_factory.mktemp("cluster"))) as made:
        yield made


class OnACluster:
    @pytest.fixture
    def url(self, cluster: RedisCluster) -> str:
        """An empty cluster."""
        cluster.mend()
        cluster.flush()
        return cluster.url


class PatientCli(Cli):
    """Someone at a terminal who tries again when told that Redis cannot be reached."""

    def run(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        def tried() -> subprocess.CompletedProcess[str] | None:
            done = super(PatientCli, self).run(*arguments, timeout=timeout)
            assert done.returncode != 2 or len(done.stderr.splitlines()) == 1, done.stderr
            return None if done.returncode == 2 else done

        answer: subprocess.CompletedProcess[str] = eventually(tried, "the command runs")
        return answer


class WhileAMasterDies(OnACluster):
    @pytest.fixture
    def cli(self, url: str) -> Cli:
        return PatientCli(url)

    @pytest.fixture(autouse=True)
    def dying(self, cluster: RedisCluster, url: str) -> Iterator[None]:
        """Kills the master of the host's partition as soon as host and worker are both there."""
        over, killed = threading.Event(), threading.Event()

        def host_is_in() -> tuple[PartitionKeys, Server] | None:
            for number in range(16):
                keys = Keys(NAMESPACE).partition(number)
                master = cluster.master_of(keys.hosts)
                if master.client.exists(keys.hosts):
                    return keys, master
            return None

        def kill_when_they_work() -> None:
            found = None
            while found is None and not over.wait(0.02):
                found = host_is_in()
            while found is not None and not over.wait(0.001):
                keys, master = found
                if master.client.exists(keys.lease):
                    master.kill()
                    killed.set()
                    return

        thread = threading.Thread(target=kill_when_they_work)
        thread.start()
        yield
        over.set()
        thread.join()
        assert killed.is_set(), "no master was killed: the test proves nothing"


class TestEachLeakOnACluster(OnACluster, _EachLeak):
    """Every leak goes."""


class TestInUseOnACluster(OnACluster, _InUse):
    """What is in use stays."""


class TestTheStoryOnACluster(OnACluster, _TheStory):
    """The log tells it."""


class TestProcessesOnACluster(OnACluster, _Processes):
    """A killed host is closed."""


class TestEachLeakWhileAMasterDies(WhileAMasterDies, _EachLeak):
    """Every leak goes although the master of the partition is killed in the middle."""


class TestInUseWhileAMasterDies(WhileAMasterDies, _InUse):
    """What is in use stays although the master of the partition is killed in the middle."""

    # While Redis is away a limit may pass of something that was used meanwhile: the order is refused.
    allowed_refusals = ("stale",)


class TestBehindSentinels:
    @pytest.fixture
    def setup(self, tmp_path: Path) -> Iterator[SentinelSetup]:
        with running_redis(SentinelSetup(tmp_path / "redis")) as made:
            yield made

    @pytest.fixture
    def url(self, setup: SentinelSetup) -> str:
        return setup.url

    def test_failover_while_a_host_works(
        self, setup: SentinelSetup, chat: HostProgram, start_worker: Start
    ) -> None:
        """The master is killed, the sentinels promote the replica, and the loop goes on with it."""
        start_worker(policy=FAST_POLICY)
        chat.do(OPEN_CHATS, topics=["chess", "birds"])
        eventually(lambda: not any(chat.counts().values()), "everything goes, before")
        setup.master.kill()
        chat.do(OPEN_CHATS, topics=["chess", "ships"])  # Nothing waits for Redis.
        until(
            lambda: setup.replica.client.info("replication")["role"] == "master",
            "the replica is promoted",
        )
        eventually(lambda: not any(chat.counts().values()), "everything goes, after", 40)
        chat.do(OPEN_CHATS, topics=["chess"])
        eventually(lambda: not any(chat.counts().values()), "everything goes, on the new master")

    def test_old_master_comes_back(
        self, setup: SentinelSetup, chat: HostProgram, start_worker: Start, tmp_path: Path
    ) -> None:
        """A master that was only stopped comes back as a replica; nobody goes on writing to it."""
        start_worker(policy=FAST_POLICY)
        setup.master.signal(signal.SIGSTOP)
        try:
            until(
                lambda: setup.replica.client.info("replication")["role"] == "master",
                "the replica is promoted",
            )
        finally:
            setup.master.signal(signal.SIGCONT)
        until(
            lambda: setup.master.client.info("replication")["role"] == "slave",
            "it is a replica now",
        )
        chat.do(OPEN_CHATS, topics=["chess"])
        eventually(lambda: not any(chat.counts().values()), "everything goes", 40)
        with running(HostProgram(setup.url, tmp_path / "other.log")) as other:
            other.do(OPEN_CHATS, topics=["birds"])
            eventually(lambda: not any(other.counts().values()), "everything goes")
