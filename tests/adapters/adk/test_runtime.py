"""`AdkRuntime`: chats on shared runners, with real ADK runners and a real Redis.

What the model was shown is what counts: a history that is not in the model's context is no history.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.sessions import BaseSessionService, InMemorySessionService

from adapters import Host
from adapters.adk import AdkRuntime, LifecyclePlugin, RedisSessionService
from store import Store
from store.errors import NotAlive, PolicyError
from tests.adapters.adk.chats import CLERK, COOK, is_empty, reconciling
from tests.adapters.adk.talk import Workshop, say
from tests.support import eventually


class TestChat:
    async def test_history_is_in_the_context(self, runtime: AdkRuntime, workshop: Workshop) -> None:
        """The second message of a chat is answered with the first in the model's context."""
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "my cat is called Mia")
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "what is it called?")
        assert "my cat is called Mia" in workshop.model.shown[-1]
        assert len((await self.session(runtime, "c", "u")).events) == 4

    async def session(self, runtime: AdkRuntime, chat_id: str, user: str) -> Any:
        async with runtime.chat(chat_id, user, COOK) as chat:
            return await chat.session()

    async def test_what_it_consists_of_is_in_the_log(self, runtime: AdkRuntime, host: Host) -> None:
        """Session uses runner uses agent, and the session is in use while it is open."""
        async with runtime.chat("c", "u", COOK) as chat:
            (runner,) = runtime.runners
            assert chat.ref == "session/c"
            assert host.entries["session/c"].uses == (f"runner/{runner}",)
            assert host.entries["session/c"].in_use == 1
            assert host.entries[f"runner/{runner}"].uses == (f"agent/{runner}",)
            assert chat.runner is runtime.runners[runner]
        assert host.entries["session/c"].in_use == 0

    async def test_two_users_with_one_chat_id_have_two_chats(
        self, runtime: AdkRuntime, workshop: Workshop
    ) -> None:
        """A chat id says nothing of whose it is: each user gets only their own."""
        async with runtime.chat("c", "ann", COOK) as chat:
            await say(chat, "I am Ann")
        async with runtime.chat("c", "bob", COOK) as chat:
            await say(chat, "who am I?")
        assert workshop.model.shown[-1] == ["who am I?"]
        with pytest.raises(ValueError, match="several users"):
            await runtime.end_chat("c")
        await runtime.end_chat("c", user_id="ann")
        await runtime.end_chat("c")
        assert not runtime.chats

    async def test_no_chat_id_is_that_of_another_chat(
        self, runtime: AdkRuntime, sessions: BaseSessionService, workshop: Workshop
    ) -> None:
        """An id that is spelt like the full name of somebody's chat neither takes its place nor lets
        its owner touch this one."""
        async with (
            runtime.chat("x", "ann", COOK) as plain,
            runtime.chat("x@bob@chat", "alice", COOK) as odd,
            runtime.chat("x", "bob", COOK) as full,
            runtime.chat("x%40bob", "chat", COOK) as encoded,
        ):
            assert len({chat.ref for chat in (plain, odd, full, encoded)}) == 4
            await say(odd, "alice's plans")
            await say(full, "what are her plans?")
        assert workshop.model.shown[-1] == ["what are her plans?"]
        await runtime.end_chat("x", user_id="bob", delete=True)
        left = (await sessions.list_sessions(app_name="chat")).sessions
        assert {(one.user_id, one.id) for one in left} == {
            ("ann", "x"), ("alice", "x@bob@chat"), ("chat", "x%40bob"),
        }  # fmt: skip
        await runtime.end_chat("x@bob@chat")
        assert len(runtime.chats) == 2

    async def test_a_run_that_fails_leaves_the_chat_usable(
        self, runtime: AdkRuntime, host: Host
    ) -> None:
        """The error reaches the caller, nothing stays in use, and the chat goes on."""
        with pytest.raises(RuntimeError, match="the model failed"):
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "fail")
        assert host.entries["session/c"].in_use == 0
        async with runtime.chat("c", "u", COOK) as chat:
            assert "again" in await say(chat, "again")

    async def test_messages_of_one_chat_wait_for_each_other(
        self, runtime: AdkRuntime, workshop: Workshop
    ) -> None:
        """Two requests that speak in one chat at once are answered in turn, and none is lost."""

        async def speak(number: int) -> None:
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, f"message {number}")

        await asyncio.gather(*(speak(number) for number in range(5)))
        assert [len(texts) for texts in workshop.model.shown] == [1, 3, 5, 7, 9]

    async def test_a_run_not_read_to_its_end_ends_with_the_chat(
        self, runtime: AdkRuntime, host: Host
    ) -> None:
        """Who stops reading need not close anything; the next message is answered."""
        async with runtime.chat("c", "u", COOK) as chat:
            async for _ in chat.send("hello"):
                break
        async with runtime.chat("c", "u", COOK) as chat:
            assert "hello" in await say(chat, "and again")
        with pytest.raises(NotAlive, match="not open"):
            chat.send("too late")

    async def test_a_run_not_read_to_its_end_ends_with_the_next_message(
        self, runtime: AdkRuntime
    ) -> None:
        """Who stops reading can speak again at once, also where each event was waited for with a limit."""
        async with runtime.chat("c", "u", COOK) as chat, asyncio.timeout(5):
            async for _ in chat.send("hello"):
                break
            left = chat.send("are you there?")
            await asyncio.wait_for(anext(left), 5)
            assert "and again" in await say(chat, "and again")

    async def test_a_run_that_another_task_reads_is_waited_for(
        self, runtime: AdkRuntime, workshop: Workshop
    ) -> None:
        """Two tasks that share one open chat are answered in turn, however slowly the first one reads."""
        async with runtime.chat("c", "u", COOK) as chat:
            got_one, go_on = asyncio.Event(), asyncio.Event()

            async def read_slowly() -> list[Any]:
                events = []
                async for event in chat.send("first"):
                    events.append(event)
                    got_one.set()
                    await go_on.wait()
                return events

            first = asyncio.create_task(read_slowly())
            await got_one.wait()
            second = asyncio.create_task(say(chat, "second"))
            await asyncio.wait([second], timeout=0.05)
            assert not second.done()
            go_on.set()
            assert len(await first) == 1
            assert "second" in await second
        assert [len(texts) for texts in workshop.model.shown] == [1, 3]

    async def test_a_run_read_under_a_time_limit_is_waited_for(
        self, runtime: AdkRuntime, workshop: Workshop
    ) -> None:
        """One task may send and others read, each event with a limit: no answer is cut off."""
        async with runtime.chat("c", "u", COOK) as chat:
            got_one, go_on = asyncio.Event(), asyncio.Event()

            async def pump(events: AsyncGenerator[Any, None]) -> None:
                with contextlib.suppress(StopAsyncIteration):
                    while True:
                        await asyncio.wait_for(anext(events), 5)
                        got_one.set()
                        await go_on.wait()
                ended.append(events)

            ended: list[Any] = []
            answers = [chat.send("first"), chat.send("second")]
            first = asyncio.create_task(pump(answers[0]))
            await got_one.wait()
            second = asyncio.create_task(pump(answers[1]))
            await asyncio.wait([second], timeout=0.05)
            go_on.set()
            await asyncio.gather(first, second)
        assert ended == answers
        assert [len(texts) for texts in workshop.model.shown] == [1, 3]

    async def test_a_run_that_nobody_can_read_on_makes_way_for_one_that_waits(
        self, runtime: AdkRuntime
    ) -> None:
        """A message that waits already is answered as soon as the answer before it is let go."""
        async with runtime.chat("c", "u", COOK) as chat, asyncio.timeout(5):
            left = [chat.send("first")]

            async def one_event() -> None:
                await anext(left[0])

            await asyncio.create_task(one_event())
            second = asyncio.create_task(say(chat, "second"))
            await asyncio.wait([second], timeout=0.05)
            assert not second.done()
            left.clear()
            assert "second" in await second

    async def test_a_session_that_was_deleted_elsewhere_begins_anew(
        self, runtime: AdkRuntime, sessions: BaseSessionService, workshop: Workshop
    ) -> None:
        """The message fails with ADK's own error, and the next opening makes a new session."""
        async with runtime.chat("c", "u", COOK) as chat:
            await sessions.delete_session(app_name="chat", user_id="u", session_id="c")
            with pytest.raises(SessionNotFoundError):
                await say(chat, "hello")
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "hello again")
        assert workshop.model.shown == [["hello again"]]


class TestAgents:
    async def test_equal_configurations_share_one_agent(
        self, runtime: AdkRuntime, workshop: Workshop
    ) -> None:
        """The order of keys does not make another configuration; a value does."""
        one, same = {"name": "cook", "x": [1, 2]}, {"x": (1, 2), "name": "cook"}
        for number, config in enumerate((one, same, {"name": "cook", "x": [1, 2.0]})):
            async with runtime.chat(f"c{number}", "u", config):
                pass
        assert workshop.made == ["cook", "cook"]
        assert len(runtime.runners) == len(runtime.agents) == 2

    async def test_apps_on_one_host_have_agents_of_their_own(
        self, make_runtime: Callable[..., AdkRuntime], workshop: Workshop
    ) -> None:
        """Runtimes of two apps share a host, and chat ids, but no runner: it belongs to its app."""
        kitchen, office = make_runtime(app_name="kitchen"), make_runtime(app_name="office")
        async with kitchen.chat("c", "u", COOK) as one, office.chat("c", "u", COOK) as two:
            assert one.ref != two.ref
            assert (one.runner.app_name, two.runner.app_name) == ("kitchen", "office")
            await say(one, "hello")
            await say(two, "hello")
        assert workshop.made == ["cook", "cook"]
        await kitchen.close()
        async with office.chat("c", "u", COOK) as two:
            assert "hello" in await say(two, "again")

    async def test_names_that_collide_are_told_apart(
        self, make_runtime: Callable[..., AdkRuntime], workshop: Workshop
    ) -> None:
        """Two configurations with one hash get two agents."""
        runtime = make_runtime(hash_of=lambda text: "same")
        for config in (COOK, CLERK, COOK, CLERK):
            async with runtime.chat("c", "u", config) as chat:
                await say(chat, "hello")
                assert chat.runner.agent.name == config["name"]
        assert workshop.made == ["cook", "clerk"]
        assert sorted(runtime.runners) == ["chat-same", "chat-same-2"]

    async def test_created_once_however_many_ask(
        self, runtime: AdkRuntime, workshop: Workshop
    ) -> None:
        """Fifty chats that begin at once with one configuration make one agent."""
        gate = asyncio.Event()
        workshop.before = gate.wait

        async def begin(number: int) -> None:
            async with runtime.chat(f"c{number}", f"u{number}", COOK) as chat:
                await say(chat, "hello")

        asking = asyncio.gather(*(begin(number) for number in range(50)))
        await eventually(lambda: len(runtime.creations) == 1)
        gate.set()
        await asking
        assert workshop.made == ["cook"]
        assert len(runtime.runners) == 1
        assert not runtime.creations

    async def test_one_who_gives_up_does_not_stop_the_others(
        self, runtime: AdkRuntime, workshop: Workshop
    ) -> None:
        """A cancelled request leaves the creation to those who still wait."""
        gate = asyncio.Event()
        workshop.before = gate.wait

        async def begin(number: int) -> str:
            async with runtime.chat(f"c{number}", "u", COOK) as chat:
                return await say(chat, "hello")

        first, second = asyncio.create_task(begin(1)), asyncio.create_task(begin(2))
        await eventually(lambda: [c.waiting for c in runtime.creations.values()] == [2])
        first.cancel()
        await eventually(first.done)
        gate.set()
        assert "hello" in await second
        assert workshop.made == ["cook"]

    async def test_a_creation_that_nobody_waits_for_is_stopped(
        self, runtime: AdkRuntime, workshop: Workshop
    ) -> None:
        """A factory that hangs does not stand in the way of the next one who asks."""
        workshop.before = asyncio.Event().wait
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), runtime.chat("c", "u", COOK):
                pass
        workshop.before = None
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "hello")
        assert workshop.made == ["cook", "cook"]
        assert not runtime.creations

    async def test_a_failed_creation_is_not_remembered(
        self, runtime: AdkRuntime, workshop: Workshop, host: Host
    ) -> None:
        """All who waited get the error, nothing is left behind, and the next one tries again."""

        gate = asyncio.Event()

        async def fail() -> None:
            await gate.wait()
            raise ConnectionError("no catalogue")

        workshop.before = fail

        async def begin(number: int) -> None:
            async with runtime.chat(f"c{number}", "u", COOK):
                pass

        asking = asyncio.gather(*(begin(n) for n in range(5)), return_exceptions=True)
        await eventually(
            lambda: len(runtime.chats) == 5 and all(live.ready for live in runtime.chats.values())
        )
        gate.set()
        answers = await asking
        assert [type(answer) for answer in answers] == [ConnectionError] * 5
        assert workshop.made == ["cook"]
        assert not runtime.creations
        assert not runtime.agents
        workshop.before = None
        async with runtime.chat("c0", "u", COOK) as chat:
            await say(chat, "hello")
        assert workshop.made == ["cook", "cook"]

    async def test_switching_keeps_history_and_user(
        self, runtime: AdkRuntime, workshop: Workshop, host: Host
    ) -> None:
        """Another agent goes on with the same session; the log says whom the chat uses now."""
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "I like soup")
        async with runtime.chat("c", "u", CLERK) as chat:
            await say(chat, "what do I like?")
            session = await chat.session()
        assert "I like soup" in workshop.model.shown[-1]
        assert session.user_id == "u"
        assert [e.author for e in session.events] == ["user", "cook", "user", "clerk"]
        (clerk,) = [id for id, held in runtime.agents.items() if held.agent.name == "clerk"]
        assert host.entries["session/c"].uses == (f"runner/{clerk}",)

    async def test_switching_under_concurrency(
        self, runtime: AdkRuntime, workshop: Workshop
    ) -> None:
        """Twenty users share two agents and switch between them at once; nobody sees another's words."""

        async def talk(user: str) -> None:
            for turn in range(6):
                config = (COOK, CLERK)[(turn + int(user)) % 2]
                async with runtime.chat(f"chat of {user}", user, config) as chat:
                    answer = await say(chat, f"user:{user} says {turn}")
                    assert chat.runner.agent.name == config["name"]
                assert f"user:{user} says 0" in answer

        await asyncio.gather(*(talk(str(number)) for number in range(20)))
        assert sorted(workshop.made) == ["clerk", "cook"]
        assert len(workshop.model.shown) == 120
        for texts in workshop.model.shown:
            speakers = {word for text in texts for word in text.split() if word.startswith("user:")}
            assert len(speakers) == 1

    async def test_a_runner_stays_while_it_answers(
        self, runtime: AdkRuntime, workshop: Workshop, host: Host, store: Store, namespace: str
    ) -> None:
        """A switch by another request does not take the runner from one that is still talking."""
        async with reconciling(store, namespace, host) as worker:
            async with runtime.chat("c", "u", COOK) as chat:
                talking = asyncio.create_task(say(chat, "wait"))
                await workshop.model.waiting.wait()
                async with runtime.chat("c", "u", CLERK):
                    pass
                await worker.reconcile()
                assert len(runtime.runners) == 2
                workshop.model.gate.set()
                assert "wait" in await talking
            await eventually(lambda: is_empty(runtime))
        assert sorted(workshop.closed) == ["clerk", "cook"]


async def test_losing_chats_by_accident_is_refused(host: Host) -> None:
    """In memory, not saved and not ephemeral: that would lose conversations, and is said so."""
    with pytest.raises(PolicyError, match="ephemeral=True"):
        AdkRuntime(host, InMemorySessionService(), recovery=False)


async def test_a_configuration_is_an_agent_by_default(host: Host) -> None:
    """Without a factory a configuration is the arguments of an LlmAgent, or an agent."""
    workshop = Workshop()
    agent = await workshop({"name": "ready"})
    async with AdkRuntime(host, InMemorySessionService()) as runtime:
        for config in ({"name": "made", "model": workshop.model}, agent):
            async with runtime.chat("c", "u", config) as chat:
                assert "hello" in await say(chat, "hello")
        with pytest.raises(TypeError, match="create_agent"):
            async with runtime.chat("c", "u", 7):
                pass


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"host": "embedded://./data"}, "a Host is wanted"),
        ({"session_service": "redis://127.0.0.1"}, "a session service of ADK is wanted"),
        ({"create_agent": 5}, "5 cannot be"),
    ],
)
def test_arguments_that_cannot_be_meant(host: Host, wrong: dict[str, Any], says: str) -> None:
    """They are told at once, in one line."""
    right = {"host": host, "session_service": InMemorySessionService()}
    with pytest.raises(TypeError, match=says):
        AdkRuntime(**{**right, **wrong})
    with pytest.raises(TypeError, match="a Host is wanted"):
        LifecyclePlugin("svc")  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="cache_bytes='x' cannot be"):
        RedisSessionService("redis://127.0.0.1", cache_bytes="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be a name"):
        RedisSessionService("redis://127.0.0.1?name=a%20b")


async def test_a_factory_that_makes_no_agent(host: Host) -> None:
    """Says so, and with which configuration; nothing stays behind."""
    async with AdkRuntime(host, InMemorySessionService(), lambda config: None) as runtime:  # type: ignore[arg-type,return-value]
        with pytest.raises(TypeError, match="create_agent gave None for agent/"):
            async with runtime.chat("c", "u", {"any": "thing"}):
                pass
        assert [len(runtime.runners), len(runtime.agents), len(runtime.creations)] == [0, 0, 0]
