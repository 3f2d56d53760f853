"""`connect(url)`: addresses, and what is said when nothing can be reached."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from store import BadAddress, Fenced, RedisUnavailable, Store, connect
from store.connection import shown
from store.embedded import find_server
from store.tasks import check_cancelled, end_tasks
from tests.support import RedisProcess, eventually

SECRET = "hunter2secret"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def message_of(opening: Callable[[], Awaitable[object]], error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        await opening()
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestSchemes:
    """Each way to write an address."""

    async def test_embedded(self, redis_url: str):
        """embedded://PATH is a real Redis."""
        async with connect(redis_url) as store:
            assert await store.now_ms() > 1_600_000_000_000
            assert not store.owns_server  # The session's fixture started it.

    async def test_unix(self, own_redis: RedisProcess):
        """unix://PATH is a Redis on a unix socket."""
        async with connect(own_redis.url) as store:
            assert await store.redis.ping()

    async def test_tcp_with_password(self, folder: Path):
        """redis://user:password@host:port/db logs in; the handle never shows the password."""
        port = free_port()
        server = await asyncio.create_subprocess_exec(
            str(find_server()), "--port", str(port), "--save", "", "--requirepass", SECRET,
            "--dir", str(folder), stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            url = f"redis://:{SECRET}@127.0.0.1:{port}/1"

            async def up() -> bool:
                try:
                    async with connect(url):
                        return True
                except RedisUnavailable:
                    return False

            await eventually(up)
            async with connect(url) as store:
                assert SECRET not in store.url
                await store.redis.set("k", "v")
            message = await message_of(
                lambda: connect(f"redis://:wrong{SECRET}@127.0.0.1:{port}").open(), RedisUnavailable
            )
            assert "refused the login" in message
            assert SECRET not in message
            message = await message_of(
                lambda: connect(f"redis://127.0.0.1:{port}").open(), RedisUnavailable
            )
            assert "user and password" in message
        finally:
            server.terminate()
            await server.wait()

    async def test_awaited(self, redis_url: str):
        """`await connect(url)` is an open store, too; `close` closes it."""
        store = await connect(redis_url)
        assert await store.redis.ping()
        await store.close()
        with pytest.raises(RedisUnavailable, match="is not connected"):
            _ = store.redis


class TestBadAddress:
    """An address that cannot be meant."""

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("localhost:6379", "is not an address"),
            ("", "is not an address"),
            ("http://localhost", "unknown scheme"),
            ("embedded://", "needs a folder"),
            ("redis://localhost:many", "is not a Redis address"),
            ("redis://[::1", "is not a"),
            ("redis://h/abc", "number of a database"),
            ("redis://h/0/1", "number of a database"),
            ("unix://data/redis.sock", "unix:///PATH"),
            ("unix://", "unix:///PATH"),
            ("redis://h?protocol=9", "protocol"),
            ("rediss://h?ssl_ca_certs=/nope", "ssl_ca_certs /nope cannot be used: No such file"),
            ("rediss://h?ssl_cert_reqs=perhaps", "perhaps"),
        ],
    )
    async def test_one_line_says_what_to_write(self, url: str, says: str):
        """It is refused in one line."""
        message = await message_of(lambda: connect(url).open(), BadAddress)
        assert says in message

    @pytest.mark.parametrize(
        "address",
        [
            "redis://h/0", "rediss://h", f"redis://:{SECRET}@h:1/0", "unix:///run/redis.sock",
            "redis+cluster://h:1", "redis+sentinel://h:1/m",
        ],
    )  # fmt: skip
    async def test_unknown_option(self, address: str):
        """An option that addresses do not have is named, with those that there are."""
        for query in ("?name=my-chat", "?db=0&name=", "?name"):
            if "cluster" in address and "db" in query:
                continue
            message = await message_of(lambda url=address + query: connect(url).open(), BadAddress)
            assert "no option 'name'" in message
            assert "password_file" in message
            assert SECRET not in message

    async def test_mistyped_password(self):
        """The value of an option that there is not is not shown: it may be a password."""
        url = f"redis://h/0?pasword={SECRET}"
        message = await message_of(lambda: connect(url).open(), BadAddress)
        assert "no option 'pasword'" in message
        assert SECRET not in message

    async def test_options_of_some_addresses_only(self):
        """A cluster has no databases, and what is about TLS needs TLS."""
        for url in ("redis+cluster://h:1?db=1", "redis://h?ssl_ca_certs=/x"):
            assert "no option" in await message_of(lambda url=url: connect(url).open(), BadAddress)

    async def test_password_with_a_question_mark(self):
        """What may be a part of a password is not taken for an option, and not shown."""
        url = f"redis://user:a?{SECRET}=b@h"
        assert SECRET not in await message_of(lambda: connect(url).open(), BadAddress)

    async def test_option_of_an_embedded_server(self, folder: Path):
        """embedded:// has no options; no folder is made for what was mistyped."""
        url = f"embedded://{folder}/data?foo=bar"
        assert "leave out" in await message_of(lambda: connect(url).open(), BadAddress)
        assert os.listdir(folder) == []


class TestNobodyThere:
    """No Redis at the address."""

    async def test_tcp(self):
        """The message names the address and what to start."""
        port = free_port()
        message = await message_of(
            lambda: connect(f"redis://:{SECRET}@127.0.0.1:{port}").open(), RedisUnavailable
        )
        assert f"127.0.0.1:{port}" in message
        assert f"redis-server --port {port}" in message
        assert "embedded://" in message
        assert SECRET not in message

    async def test_unix(self, folder: Path):
        """The message names the socket and what to start."""
        path = folder / "none.sock"
        message = await message_of(lambda: connect(f"unix://{path}").open(), RedisUnavailable)
        assert f"--unixsocket {path}" in message

    async def test_something_else_answers(self):
        """A port where something else answers is said to be that."""

        async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(speak, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            message = await message_of(
                lambda: connect(f"redis://127.0.0.1:{port}").open(), RedisUnavailable
            )
        assert f"127.0.0.1:{port}" in message

    async def test_folder_that_cannot_be_written(self, folder: Path):
        """An embedded folder that cannot be made is named, with what to do."""
        (folder / "file").write_text("in the way")
        message = await message_of(
            lambda: connect(f"embedded://{folder}/file/data").open(), RedisUnavailable
        )
        assert "give a folder that can be written" in message


class TestShown:
    """The address as people may see it."""

    @pytest.mark.parametrize(
        "url",
        [
            f"redis://:{SECRET}@host:6379/0",
            f"redis://user:{SECRET}@host",
            f"redis://user:{SECRET}@with-at@host",
            f"redis://user:{SECRET}/with/slash@host",
            f"redis://user:{SECRET}#hash@host",
            f"redis://host/0?password={SECRET}",
            f"unix:///run/redis.sock?db=1&password={SECRET}",
            f"unix://:{SECRET}@/run/redis.sock",
            f"http://user:{SECRET}@host",
        ],
    )
    def test_no_password(self, url: str):
        """Wherever the password stands, it is not shown."""
        assert SECRET not in shown(url)
        assert SECRET not in connect(url).url

    @pytest.mark.parametrize(
        "url", ["redis://host:6379/0", "unix:///run/redis.sock", "embedded:///data/x@y:z@w"]
    )
    def test_without_password(self, url: str):
        """An address without a password is shown as it is."""
        assert shown(url) == url


class TestScript:
    """Scripts, called by SHA."""

    async def test_forgotten_scripts_are_sent_again(self, store: Store):
        """A server that forgot the scripts is sent them again."""
        await store.redis.script_flush()
        assert await store.script("lease_release", ["{x}lease"], ["nobody 1"]) == 0

    async def test_refusal_names_the_writer(self, store: Store):
        """A refused write is a Fenced error that says who was refused."""
        keys = ["{x}lease", "{x}log", "{x}seqs"]
        with pytest.raises(Fenced, match="worker 7"):
            await store.script("order", keys, ["worker 7", "w", 1, 0])


class TestEndTasks:
    """Ending tasks whose cancellation can be swallowed."""

    async def test_asked_again(self):
        """A task that swallows its first cancellation is cancelled again."""
        swallowed = []

        async def stubborn() -> None:
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if swallowed:
                        raise
                    swallowed.append(True)

        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await end_tasks([task])
        assert task.cancelled()
        assert swallowed

    async def test_a_swallowed_cancellation_is_found(self):
        """`check_cancelled` raises in a task that was told to end and went on."""

        async def goes_on() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            check_cancelled()
            raise AssertionError("it went on")

        check_cancelled()
        task = asyncio.create_task(goes_on())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


class TestPasswordFile:
    @pytest.fixture
    async def guarded(self, own_redis: RedisProcess, tmp_path: Path) -> tuple[str, Path]:
        """The address of a Redis that asks for a password, and a file with it."""
        async with connect(own_redis.url) as store:
            words = ("ACL", "SETUSER", "worker", "on", ">p@ss:w/rd?", "~*", "+@all")
            await store.redis.execute_command(*words)
            await store.redis.execute_command("ACL", "SETUSER", "default", "off")
        file = tmp_path / "secret"
        file.write_text("p@ss:w/rd?\n")
        return own_redis.url.replace("unix://", "unix://worker@"), file

    async def test_is_read(self, guarded: tuple[str, Path]) -> None:
        """The password comes from the file that the URL names, whatever characters it has."""
        url, file = guarded
        for query in (f"?password_file={file}", f"?db=0&password_file={file}&durability=memory"):
            async with connect(url + query) as store:
                assert await store.redis.ping()
                assert "p@ss" not in store.url

    @pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
    async def test_cannot_be_read(self, guarded: tuple[str, Path], content: bytes | None) -> None:
        """A file that is missing, empty or no text is told with its path."""
        url, file = guarded
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(BadAddress, match=str(file)):
            await connect(f"{url}?password_file={file}")

    async def test_one_password_only(self, tmp_path: Path) -> None:
        """A password in the URL and in a file contradict each other; neither is shown."""
        with pytest.raises(BadAddress, match="give one of them") as refused:
            await connect(f"redis://me:hidden@localhost?password_file={tmp_path}/x")
        assert "hidden" not in str(refused.value)
