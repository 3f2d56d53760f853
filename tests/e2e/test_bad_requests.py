"""A worker process under requests that cannot be meant: each gets a clear answer, and the work goes on."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.e2e.programs import (
    FAST_POLICY,
    HostProgram,
    Program,
    eventually,
    http_of,
    running,
    worker,
)

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("bad-requests")]

TOKEN = "a-token-for-tests"
STREAMS_SERVED = 200
CLIENTS = 1000


@pytest.fixture
def served(start_worker: Callable[..., Program]) -> Program:
    """A worker process."""
    return start_worker(policy=FAST_POLICY)


@pytest.fixture
async def web(served: Program) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of it that opens as many connections as it is asked to."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(http_of(served), connector=connector) as session:
        yield session


def works(chat: HostProgram, topic: str) -> None:
    """The worker finds an orphan and has it torn down."""
    chat.do(
        """
        await service.open_chat("ada", values_topic)
        service._agent_runners[f"agent-stale-{values_topic}"] = "no-such-runner"
        """,
        values_topic=topic,
    )
    eventually(lambda: chat.counts()["_agent_runners"] <= 1, "the stale entry goes", 30)


class TestStreams:
    async def test_thousand_clients(
        self, served: Program, web: aiohttp.ClientSession, chat: HostProgram
    ) -> None:
        """1,000 clients ask for the stream: so many are served, every other is told at once to come
        back later; the worker answers probes and tears down meanwhile, and keeps nothing of them."""
        works(chat, "before")
        process = psutil.Process(served.process.pid)
        descriptors = process.num_fds()
        answers = await asyncio.gather(*(web.get("/api/stream") for _ in range(CLIENTS)))
        statuses = [answer.status for answer in answers]
        assert (statuses.count(200), statuses.count(503)) == (
            STREAMS_SERVED, CLIENTS - STREAMS_SERVED,
        )  # fmt: skip
        refused = next(answer for answer in answers if answer.status == 503)
        assert int(refused.headers["Retry-After"]) > 0
        told = await refused.json()
        assert told["error"] == "too_many_streams"
        assert str(STREAMS_SERVED) in told["message"]
        async with web.get("/readyz") as ready:
            assert ready.status == 200
        served_ones = [answer for answer in answers if answer.status == 200]
        await asyncio.to_thread(works, chat, "during")
        heard = await asyncio.gather(*(_tick(answer) for answer in served_ones))
        assert all(tick["version"] >= 0 for tick in heard)
        for answer in answers:
            answer.close()

        def let_go() -> bool:
            return process.num_fds() < descriptors + 50

        await asyncio.to_thread(eventually, let_go, "the sockets are closed", 30)
        deadline = time.monotonic() + 30
        status = 0
        while status != 200 and time.monotonic() < deadline:
            async with web.get("/api/stream") as again:
                status = again.status
        assert status == 200, "others may come when these have gone"
        await asyncio.to_thread(works, chat, "after")
        assert not [line for line in served.log_lines() if line["level"] in {"error", "critical"}]

    async def test_clients_that_never_read(
        self, served: Program, web: aiohttp.ClientSession, chat: HostProgram
    ) -> None:
        """Clients that ask and never read, or never finish asking, hold nothing up."""
        host, port = http_of(served).removeprefix("http://").split(":")
        sockets = []
        for number in range(100):
            one = socket.create_connection((host, int(port)), timeout=10)
            whole = b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"
            one.sendall(whole if number % 2 else whole[:20])
            sockets.append(one)
        async with web.get("/healthz") as healthy:
            assert healthy.status == 200
        await asyncio.to_thread(works, chat, "meanwhile")
        for one in sockets:
            one.close()


async def _tick(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    async with asyncio.timeout(30):
        async for line in answer.content:
            if line.startswith(b"data: "):
                tick: dict[str, Any] = json.loads(line[6:])
                return tick
    raise AssertionError("the stream ended")


@pytest.fixture(scope="module")
def guarded(redis_url: str) -> Iterator[Program]:
    """A worker process with a token, for all requests of the class."""
    with tempfile.TemporaryDirectory(prefix="ar-web-") as folder:
        file = Path(folder) / "token"
        file.write_text(TOKEN)
        started = worker(
            redis_url, Path(folder) / "worker.log", FAST_POLICY, "--token-file", str(file)
        )
        with running(started) as program:
            yield program


class TestRequests:
    @pytest.fixture
    async def web(self, guarded: Program) -> AsyncIterator[aiohttp.ClientSession]:
        async with aiohttp.ClientSession(http_of(guarded)) as session:
            yield session

    @pytest.mark.parametrize(
        ("header", "status", "error"),
        [
            (None, 401, "token_missing"),
            ("Bearer wrong", 401, "token_wrong"),
            ("Bearer", 400, "token_malformed"),
            ("Bearer two words", 400, "token_malformed"),
            (TOKEN, 400, "token_malformed"),
            ("Basic YTpi", 400, "token_malformed"),
            ("Bearer " + "x" * 5000, 401, "token_wrong"),
        ],
    )
    async def test_token(
        self, web: aiohttp.ClientSession, header: str | None, status: int, error: str
    ) -> None:
        """A missing, wrong or malformed token header is told apart, and nothing is done."""
        headers = {} if header is None else {"Authorization": header}
        async with web.post("/api/reconcile", json={}, headers=headers) as answer:
            assert (answer.status, (await answer.json())["error"]) == (status, error)
            assert "WWW-Authenticate" in answer.headers

    @pytest.mark.parametrize(
        ("path", "status", "needle"),
        [
            ("/api/moment?at=2999-01-01", 400, "in the future"),
            ("/api/moment?at=9999999999999-0", 400, "in the future"),
            ("/api/events?resource=session/nobody", 404, "session/nobody"),
            ("/api/events?resource=nonsense", 400, "kind/id"),
        ],
    )
    async def test_moments_and_ids(
        self, web: aiohttp.ClientSession, path: str, status: int, needle: str
    ) -> None:
        """A time in the future, and what does not exist, is a sentence that names it."""
        async with web.get(path) as answer:
            body = await answer.json()
            assert (answer.status, needle in body["message"]) == (status, True), body

    @pytest.mark.parametrize(
        ("data", "status"),
        [
            (b"", 400), (b"{", 400), (b"[]", 400), (b'"all"', 400), (b"\xff\xfe", 400),
            (b'{"process": {"a": 1}}', 400), (b'{"dry_run": 1, "x": 2}', 400),
            (b"[" * 15_000, 400), (b" " * 100_000, 413),
        ],
    )  # fmt: skip
    async def test_bodies(self, web: aiohttp.ClientSession, data: bytes, status: int) -> None:
        """A body of the wrong shape is a 4xx with a sentence, and no fault of the worker."""
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        async with web.post("/api/reconcile", data=data, headers=headers) as answer:
            body = await answer.json()
            assert (answer.status, bool(body["message"])) == (status, True), body
        async with web.get("/healthz") as healthy:
            assert healthy.status == 200
