"""Execution logs are closed on every path, and so are handlers that a service opens itself."""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import queue
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from adapters import Host
from adapters.logging_handlers import LogHandlers, SharedLog, execution_log, unattached
from reconciler import Reconciler

Eventually = Callable[..., Awaitable[None]]


def fds() -> int:
    return int(psutil.Process().num_fds())


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger of the service; what is left on it goes after the test."""
    found = logging.getLogger("svc")
    found.setLevel(logging.INFO)
    yield found
    for handler in list(found.handlers):
        found.removeHandler(handler)
        handler.close()


class TestExecutionLog:
    def test_lines_are_in_the_file_and_the_handler_is_closed(self, tmp_path: Path) -> None:
        """A plain `with` writes one file and closes it."""
        before = fds()
        with execution_log("e1", tmp_path) as log:
            log.info("step %d", 1)
            assert fds() == before + 1
        assert fds() == before
        assert "step 1" in (tmp_path / "e1.log").read_text()

    async def test_async_with_closes_it_when_the_execution_fails(self, tmp_path: Path) -> None:
        """An error passes through, and the file is closed."""
        before = fds()

        async def run() -> None:
            async with execution_log("e1", tmp_path) as log:
                log.info("begin")
                raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            await run()
        assert fds() == before

    async def test_it_is_closed_when_the_execution_is_cancelled(self, tmp_path: Path) -> None:
        """Cancellation is a path too."""
        before = fds()
        began = asyncio.Event()

        async def run() -> None:
            async with execution_log("e1", tmp_path) as log:
                log.info("begin")
                began.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(run())
        await began.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert fds() == before

    def test_it_is_closed_when_its_file_cannot_be_opened(self, tmp_path: Path) -> None:
        """What fails at the start leaves nothing attached."""
        (tmp_path / "file").write_text("")
        root = list(logging.getLogger().handlers)
        with pytest.raises(OSError), execution_log("e1", tmp_path / "file"):  # noqa: PT011
            pass
        assert logging.getLogger().handlers == root

    async def test_what_the_code_of_an_execution_logs_elsewhere_goes_there_too(
        self, tmp_path: Path, logger: logging.Logger
    ) -> None:
        """Two executions at once share a logger, and each file has its own lines."""

        async def run(name: str) -> None:
            async with execution_log(name, tmp_path, logger="svc"):
                for step in range(3):
                    logging.getLogger("svc.tools").info("%s step %d", name, step)
                    await asyncio.sleep(0)

        logging.getLogger("svc.tools").setLevel(logging.INFO)
        await asyncio.gather(run("a"), run("b"))
        assert (tmp_path / "a.log").read_text().count("a step") == 3
        assert "b step" not in (tmp_path / "a.log").read_text()
        assert logger.handlers == []

    def test_ids_that_are_no_file_names_get_files_of_their_own(self, tmp_path: Path) -> None:
        """An id cannot leave its folder, and two ids do not share a file."""
        for name in ("../up", "session/a:b", "session/a;b"):
            with execution_log(name, tmp_path / "logs") as log:
                log.info("here")
        assert len(list((tmp_path / "logs").iterdir())) == 3
        assert list(tmp_path.iterdir()) == [tmp_path / "logs"]

    def test_ten_thousand_execution_logs_leave_descriptors_and_loggers_flat(
        self, tmp_path: Path
    ) -> None:
        """Nothing stays open, and no logger is kept by its name."""
        before, loggers = fds(), len(logging.Logger.manager.loggerDict)
        most = 0
        for number in range(10_000):
            with execution_log(f"e{number}", tmp_path) as log:
                log.info("one line")
                if number % 500 == 0:
                    most = max(most, fds())
        assert most == before + 1
        assert fds() == before
        assert len(logging.Logger.manager.loggerDict) == loggers


class TestSharedLog:
    async def test_a_thousand_executions_at_once_have_one_file_open(self, tmp_path: Path) -> None:
        """Open files are bounded by one; lines carry the id of their execution."""
        before = fds()
        shared = SharedLog(tmp_path / "all.log")
        most = 0
        all_there = asyncio.Barrier(1000)

        async def run(number: int) -> None:
            nonlocal most
            async with execution_log(f"e{number}", shared=shared) as log:
                log.info("line of %d", number)
                await all_there.wait()
                if number == 999:
                    most = fds()

        await asyncio.gather(*(run(number) for number in range(1000)))
        assert most == before + 1
        assert fds() == before
        lines = (tmp_path / "all.log").read_text().splitlines()
        assert len(lines) == 1000
        assert all(f" e{line.rsplit(' ', 1)[1]} " in line for line in lines)

    def test_it_rotates(self, tmp_path: Path) -> None:
        """The file stays below its size, and old ones are dropped."""
        shared = SharedLog(tmp_path / "all.log", max_bytes=1000, backups=2)
        for number in range(100):
            with execution_log(f"e{number}", shared=shared) as log:
                log.info("x" * 50)
        assert len(list(tmp_path.iterdir())) == 3


def _execution_of(name: str) -> str | None:
    return "execution/svc" if name == "svc" else None


def _session_of(name: str) -> str | None:
    return "session/svc" if name == "svc" else None


class TestHandlersOfTheService:
    def test_one_that_is_detached_is_closed(self, tmp_path: Path, logger: logging.Logger) -> None:
        """Removed from its logger and not closed: an orphan."""
        handlers = LogHandlers()
        handler = logging.FileHandler(tmp_path / "a.log")
        logger.addHandler(handler)
        assert handlers.sweep() == []
        logger.removeHandler(handler)
        assert len(handlers.sweep()) == 1
        assert handler.stream is None

    def test_one_that_was_just_opened_is_given_time_to_be_attached(self, tmp_path: Path) -> None:
        """The first look at an unattached handler does nothing."""
        handlers = LogHandlers()
        handler = logging.FileHandler(tmp_path / "a.log")
        assert handlers.sweep() == []
        assert handler.stream is not None
        assert len(handlers.sweep()) == 1

    def test_one_behind_a_queue_or_a_memory_handler_is_in_use(self, tmp_path: Path) -> None:
        """It is attached to no logger, and yet records reach it."""
        behind_queue = logging.FileHandler(tmp_path / "a.log")
        behind_memory = logging.FileHandler(tmp_path / "b.log")
        private = logging.FileHandler(tmp_path / "c.log")
        listener = logging.handlers.QueueListener(queue.Queue(), behind_queue)
        memory = logging.handlers.MemoryHandler(10, target=behind_memory)
        logger = logging.Logger("outside the tree")
        logger.addHandler(private)
        handlers = LogHandlers()
        for _ in range(3):
            assert handlers.sweep() == []
        assert unattached() == []
        del listener
        memory.setTarget(None)  # type: ignore[arg-type]
        logger.removeHandler(private)
        assert len(handlers.sweep()) == 3

    def test_one_on_the_logger_of_an_execution_log_that_has_ended_is_closed(
        self, tmp_path: Path
    ) -> None:
        """The service put its own handler there, and keeps the logger: nobody would close it."""
        handlers = LogHandlers()
        with execution_log("e1", tmp_path) as log:
            handler = logging.FileHandler(tmp_path / "extra.log")
            log.addHandler(handler)
            assert handlers.sweep() == []
            assert handlers.sweep() == []
            log.info("seen")
        assert len(handlers.sweep()) == 1
        assert handler.stream is None
        log.info("said to nobody")
        assert handler.stream is None
        assert "seen" in (tmp_path / "extra.log").read_text()

    def test_one_of_an_ended_execution_is_closed_and_detached(
        self, tmp_path: Path, logger: logging.Logger
    ) -> None:
        """Without a host the service says which execution has ended."""
        handlers = LogHandlers(execution_of=_execution_of)
        handler = logging.FileHandler(tmp_path / "a.log")
        logger.addHandler(handler)
        assert handlers.ended("execution/another") == []
        assert len(handlers.ended("execution/svc")) == 1
        assert handler.stream is None
        assert logger.handlers == []


class TestWithAHost:
    async def test_an_execution_and_its_log_are_in_the_log_and_leave_it(
        self, host: Host, tmp_path: Path
    ) -> None:
        """The handler is owned by its execution."""
        async with execution_log("e1", tmp_path, host=host):
            assert host.entries["log_handler/e1"].owned_by == "execution/e1"
        assert not host.entries

    async def test_the_log_of_a_session_that_is_gone_is_closed(
        self, host: Host, reconciler: Reconciler, tmp_path: Path, eventually: Eventually
    ) -> None:
        """A log that outlives its session is torn down by the reconciler."""
        host.record("created", "session/abc")
        with execution_log("session/abc", tmp_path, host=host) as log:
            log.info("open")
            assert [one for one in psutil.Process().open_files() if str(tmp_path) in one.path]
            host.record("cleaned_up", "session/abc")
            await eventually(lambda: "log_handler/session/abc" not in host.entries)
            assert not [one for one in psutil.Process().open_files() if str(tmp_path) in one.path]
            log.info("said to nobody")

    async def test_a_detached_handler_is_closed_by_the_reconciler(
        self,
        host: Host,
        reconciler: Reconciler,
        tmp_path: Path,
        logger: logging.Logger,
        eventually: Eventually,
    ) -> None:
        """It becomes an orphan, and the reconciler ends it."""
        async with LogHandlers(host) as handlers:
            handler = logging.FileHandler(tmp_path / "a.log")
            logger.addHandler(handler)
            handlers.sweep()
            logger.removeHandler(handler)
            assert len(handlers.sweep()) == 1
            await eventually(lambda: handler.stream is None)
            assert not [ref for ref in host.entries if "a.log" in ref]

    async def test_one_of_a_session_that_was_never_recorded_is_left_alone(
        self, host: Host, tmp_path: Path, logger: logging.Logger
    ) -> None:
        """What the host was never told of has not ended; it may be recorded later, and then end."""
        async with LogHandlers(host, execution_of=_session_of) as handlers:
            handler = logging.FileHandler(tmp_path / "a.log")
            logger.addHandler(handler)
            for _ in range(3):
                assert handlers.sweep() == []
            host.record("created", "session/svc")
            assert handlers.sweep() == []
            host.record("cleaned_up", "session/svc")
            assert len(handlers.sweep()) == 1
            logger.removeHandler(handler)
            handler.close()

    async def test_a_handler_of_a_session_that_has_ended_is_closed_by_the_reconciler(
        self,
        host: Host,
        reconciler: Reconciler,
        tmp_path: Path,
        logger: logging.Logger,
        eventually: Eventually,
    ) -> None:
        """The host knows which executions live: the service says nothing."""
        host.record("created", "session/svc")
        async with LogHandlers(host, execution_of=_session_of) as handlers:
            handler = logging.FileHandler(tmp_path / "a.log")
            logger.addHandler(handler)
            assert handlers.sweep() == []
            host.record("cleaned_up", "session/svc")
            assert len(handlers.sweep()) == 1
            await eventually(lambda: handler.stream is None)
            assert logger.handlers == []
