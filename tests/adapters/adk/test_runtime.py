"""`AdkRuntime`: chats on shared runners, with real ADK runners and a real Redis.

What the model was shown is what counts: a history that is not in the model's context is no history.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.sessions import BaseSessionService, InMemorySessionService

from adapters import Host
from adapters.adk import AdkRuntime, RedisSessionService, get_recovery_store
from reconciler import Policy, Reconciler
from store import EventLog, Store
from store.errors import LimitReached, NotAlive, PolicyError
from tests.adapters.adk.talk import Workshop, say
from tests.support import entries_of, eventually, story

COOK, CLERK = {"name": "cook"}, {"name": "clerk"}


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture(params=["redis", "memory"])
def sessions(
    request: pytest.FixtureRequest, make_service: Callable[..., RedisSessionService]
) -> BaseSessionService:
    """Both services; the runtime behaves the same on them."""
    return make_service() if request.param == "redis" else InMemorySessionService()


@pytest.fixture
async def make_runtime(
    host: Host, sessions: BaseSessionService, workshop: Workshop
) -> AsyncIterator[Callable[..., AdkRuntime]]:
    made: list[AdkRuntime] = []

    def make(**options: Any) -> AdkRuntime:
        made.append(AdkRuntime(host, sessions, workshop, **options))
        return made[-1]

    yield make
    for runtime in made:
        await runtime.close(grace=0.5)


@pytest.fixture
def runtime(make_runtime: Callable[..., AdkRuntime]) -> AdkRuntime:
    return make_runtime()


@asynccontextmanager
async def reconciling(
    store: Store, namespace: str, host: Host, **policy: Any
) -> AsyncIterator[Reconciler]:
    """The reconciler in this process, with nothing idle for long."""
    limits = {"session_idle_timeout": 0.05, "runner_idle_timeout": 0.05, "backoff": 0.05, **policy}
    async with Reconciler(
        store, namespace=namespace, policy=Policy(**limits), hosts=[host]
    ) as worker:
        yield worker


def is_empty(runtime: AdkRuntime) -> bool:
    return not any(runtime.sizes().values())


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
        assert sorted(runtime.runners) == ["same", "same-2"]

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
        await eventually(lambda: workshop.made)
        first.cancel()
        await eventually(first.done)
        gate.set()
        assert "hello" in await second
        assert workshop.made == ["cook"]

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


class TestIdle:
    async def test_everything_goes_and_the_chat_continues(
        self, runtime: AdkRuntime, workshop: Workshop, host: Host, store: Store, namespace: str,
        log: EventLog,
    ) -> None:  # fmt: skip
        """Idle: session, runner and agent go in that order; who returns is remembered."""
        async with reconciling(store, namespace, host):
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "my cat is called Mia")
            await eventually(lambda: is_empty(runtime))
            assert workshop.closed == ["cook"]
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "what is it called?")
            assert "my cat is called Mia" in workshop.model.shown[-1]
            await eventually(lambda: is_empty(runtime))
        ends = [ref.partition("/")[0] for type, ref in await story(log) if type == "cleaned_up"]
        ends = [kind for kind in ends if kind in {"session", "runner", "agent"}]
        assert ends == ["session", "runner", "agent"] * 2

    async def test_another_process_continues(
        self, runtime: AdkRuntime, workshop: Workshop, sessions: BaseSessionService,
        host: Host, store: Store, namespace: str, make_service: Callable[..., RedisSessionService],
    ) -> None:  # fmt: skip
        """The next message may land anywhere: history and state come along."""
        async with runtime.chat("c", "u", COOK) as chat:
            state = {"cats": 1, "user:name": "Ann", "temp:x": 1}
            async for _ in chat.send("my cat is called Mia", state_delta=state):
                pass
        await runtime.end_chat("c")
        elsewhere = (
            InMemorySessionService()
            if isinstance(sessions, InMemorySessionService)
            else make_service()
        )
        async with (
            Host.connect(store, name="other", namespace=namespace) as other,
            AdkRuntime(other, elsewhere, workshop) as second,
            second.chat("c", "u", CLERK) as chat,
        ):
            await say(chat, "what is it called?")
            assert (await chat.session()).state == {"cats": 1, "user:name": "Ann"}
        assert "my cat is called Mia" in workshop.model.shown[-1]

    async def test_a_failed_save_keeps_the_session(
        self, make_runtime: Callable[..., AdkRuntime], host: Host, store: Store, namespace: str,
        log: EventLog, workshop: Workshop,
    ) -> None:  # fmt: skip
        """What cannot be saved stays alive, with its history, and the failure is in the log."""
        recovery = get_recovery_store(host)
        save = recovery.save
        recovery.save = _raise  # type: ignore[method-assign]
        runtime = make_runtime(recovery=recovery)
        async with reconciling(store, namespace, host):
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "remember this")

            async def reported() -> list[str]:
                return [
                    str(entry.event.reason)
                    for entry in await entries_of(log)
                    if entry.event.type == "cleanup_failed"
                ]

            (reason, *_) = await eventually(reported)
            assert "was not saved: the disk is full" in reason
            assert len(runtime.chats) == len(runtime.runners) == 1
            recovery.save = save  # type: ignore[method-assign]
            await eventually(lambda: is_empty(runtime))
        async with runtime.chat("c", "u", COOK) as chat:
            assert "remember this" in await say(chat, "?")

    async def test_keep_alive_and_heartbeat(
        self, runtime: AdkRuntime, host: Host, store: Store, namespace: str
    ) -> None:
        """A chat somebody asked to keep stays while others go; one nobody has answers False."""
        for id in ("kept", "other"):
            async with runtime.chat(id, "u", COOK) as chat:
                if id == "kept":
                    chat.keep_alive(60)
        assert runtime.heartbeat("other")
        assert not runtime.heartbeat("nobody")
        assert not runtime.keep_alive("nobody", 1)
        async with reconciling(store, namespace, host) as worker:
            await eventually(lambda: list(runtime.chats) == ["kept"])
            await worker.reconcile()
            assert list(runtime.chats) == ["kept"]

    async def test_one_that_is_open_is_not_torn_down(
        self, runtime: AdkRuntime, host: Host, store: Store, namespace: str, workshop: Workshop
    ) -> None:
        """However long an answer takes, and however short the idle time is."""
        async with reconciling(store, namespace, host, session_idle_timeout=0.01) as worker:
            async with runtime.chat("c", "u", COOK) as chat:
                talking = asyncio.create_task(say(chat, "wait"))
                await workshop.model.waiting.wait()
                for _ in range(3):
                    await worker.reconcile()
                assert list(runtime.chats) == ["c"]
                workshop.model.gate.set()
                await talking
            await eventually(lambda: is_empty(runtime))

    async def test_reopening_races_with_teardown(
        self, runtime: AdkRuntime, host: Host, store: Store, namespace: str, workshop: Workshop
    ) -> None:
        """Chats that are opened while they are torn down come up whole, every time."""
        async with reconciling(store, namespace, host, session_idle_timeout=0.003):

            async def talk(user: str) -> None:
                for turn in range(10):
                    async with runtime.chat(f"c{user}", user, COOK) as chat:
                        await say(chat, f"{user}.{turn}")
                    await asyncio.sleep(0.001 * (int(user) % 4) * (turn % 3))

            await asyncio.gather(*(talk(str(number)) for number in range(6)))
            await eventually(lambda: is_empty(runtime))
        for number in range(6):
            mine = [t for t in workshop.model.shown if t[-1].startswith(f"{number}.")]
            assert [len(texts) for texts in mine] == [2 * turn + 1 for turn in range(10)]


async def _raise(*_: Any) -> None:
    raise OSError("the disk is full")


class TestLimits:
    async def test_least_recently_used_makes_room(
        self, make_runtime: Callable[..., AdkRuntime], workshop: Workshop
    ) -> None:
        """With room for three, the fourth takes the place of the one used longest ago."""
        runtime = make_runtime(max_chats=3)
        for id in ("a", "b", "c", "a", "d"):
            async with runtime.chat(id, f"user of {id}", COOK) as chat:
                await say(chat, f"I am {id}")
        assert list(runtime.chats) == ["c", "a", "d"]
        async with runtime.chat("b", "user of b", COOK) as chat:
            assert "I am b" in await say(chat, "who?")
        assert len(runtime.chats) == 3

    async def test_a_user_makes_room_for_themselves(
        self, make_runtime: Callable[..., AdkRuntime]
    ) -> None:
        """The limit per user takes that user's oldest chat and nobody else's."""
        runtime = make_runtime(max_chats_per_user=2)
        for id, user in (("x", "bob"), ("a", "ann"), ("b", "ann"), ("a", "ann"), ("c", "ann")):
            async with runtime.chat(id, user, COOK):
                pass
        assert sorted(runtime.chats) == ["a", "c", "x"]
        assert runtime.user_chats == {"bob": ("x",), "ann": ("a", "c")}

    async def test_what_is_in_use_does_not_make_room(
        self, make_runtime: Callable[..., AdkRuntime]
    ) -> None:
        """Of five that come at once to room for two, two get in and three are refused."""
        runtime = make_runtime(max_chats=2)
        release = asyncio.Event()

        async def stay(number: int) -> str:
            async with runtime.chat(f"c{number}", "u", COOK):
                await release.wait()
            return "in"

        tasks = [asyncio.create_task(stay(number)) for number in range(5)]
        await eventually(lambda: sum(task.done() for task in tasks) == 3)
        release.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert (
            sorted(str(a)[:31] for a in answers)
            == ["in"] * 2 + ["the process has 2 chats, which "] * 3
        )
        assert all(isinstance(a, str | LimitReached) for a in answers)
        async with runtime.chat("c9", "u", COOK):
            assert len(runtime.chats) == 2

    async def test_one_that_cannot_be_saved_does_not_make_room(
        self, make_runtime: Callable[..., AdkRuntime], host: Host
    ) -> None:
        """It stays, the next one goes instead; where there is none, the new chat is refused."""
        recovery = get_recovery_store(host)
        save = recovery.save

        async def save_but_a(record: Any) -> None:
            await (_raise() if record.session == "a" else save(record))

        recovery.save = save_but_a  # type: ignore[method-assign]
        runtime = make_runtime(max_chats=2, recovery=recovery)
        for id in ("a", "b", "c"):
            async with runtime.chat(id, "u", COOK):
                pass
        assert sorted(runtime.chats) == ["a", "c"]
        async with runtime.chat("c", "u", COOK):
            with pytest.raises(LimitReached, match="cannot be saved"):
                async with runtime.chat("d", "u", COOK):
                    pass
        assert sorted(runtime.chats) == ["a", "c"]
        recovery.save = save  # type: ignore[method-assign]

    @pytest.mark.parametrize("options", [{"max_chats": 0}, {"max_chats_per_user": -1}])
    async def test_a_limit_that_cannot_be_meant(
        self, make_runtime: Callable[..., AdkRuntime], options: dict[str, int]
    ) -> None:
        """A limit below one is refused."""
        with pytest.raises(PolicyError, match="at least 1"):
            make_runtime(**options)


class TestEnd:
    async def test_end_chat_keeps_the_conversation(self, runtime: AdkRuntime, host: Host) -> None:
        """The close button ends what lives; what was said is there when the user comes back."""
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "I will be back")
        assert await runtime.end_chat("c")
        assert not await runtime.end_chat("c")
        assert not runtime.chats
        assert not runtime.user_chats
        assert "session/c" not in host.entries
        async with runtime.chat("c", "u", COOK) as chat:
            assert "I will be back" in await say(chat, "hello")

    async def test_end_chat_can_delete(
        self, runtime: AdkRuntime, workshop: Workshop, host: Host
    ) -> None:
        """With delete=True nothing is left of it, also of one that this process does not have."""
        for live in (True, False):
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "my secret")
            if not live:
                await runtime.end_chat("c")
            await runtime.end_chat("c", user_id="u", delete=True)
            assert await get_recovery_store(host).load("chat", "u", "c") is None
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "hello")
            assert workshop.model.shown[-1] == ["hello"]
            await runtime.end_chat("c", delete=True)

    async def test_end_chat_of_one_in_use_waits_for_its_end(self, runtime: AdkRuntime) -> None:
        """It ends as soon as nobody has it open, and not before."""
        async with runtime.chat("c", "u", COOK) as chat:
            assert await runtime.end_chat("c")
            assert "still here" in await say(chat, "still here")
        assert not runtime.chats

    async def test_ephemeral_conversations_go_with_their_chats(
        self, make_runtime: Callable[..., AdkRuntime], workshop: Workshop,
        sessions: BaseSessionService,
    ) -> None:  # fmt: skip
        """An ephemeral runtime leaves no data."""
        runtime = make_runtime(ephemeral=True, recovery=False)
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "forget me")
        await runtime.end_chat("c")
        assert not (await sessions.list_sessions(app_name="chat")).sessions
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "hello")
        assert workshop.model.shown[-1] == ["hello"]

    async def test_shutdown_order(
        self, make_runtime: Callable[..., AdkRuntime], host: Host, workshop: Workshop, store: Store,
        namespace: str, log: EventLog,
    ) -> None:  # fmt: skip
        """No new chats, those in use finish, then sessions, then runners, then agents; all is empty."""
        runtime = make_runtime()
        for number in range(3):
            async with runtime.chat(f"c{number}", "u", (COOK, CLERK)[number % 2]) as chat:
                await say(chat, "hello")

        async def last_words() -> str:
            async with runtime.chat("c0", "u", COOK) as chat:
                return await say(chat, "wait")

        talking = asyncio.create_task(last_words())
        await workshop.model.waiting.wait()
        closing = asyncio.create_task(runtime.close())
        await asyncio.sleep(0)
        with pytest.raises(NotAlive, match="closed"):
            async with runtime.chat("c9", "u", COOK):
                pass
        assert len(runtime.chats) == 3
        workshop.model.gate.set()
        assert "wait" in await talking
        await closing
        assert is_empty(runtime)
        assert sorted(workshop.closed) == ["clerk", "cook"]
        await eventually(lambda: not len(host.recorder))
        ends = [ref.partition("/")[0] for type, ref in await story(log) if type == "cleaned_up"]
        ends = [kind for kind in ends if kind != "agent_creation"]
        assert ends == ["session"] * 3 + ["runner", "agent"] * 2
        assert not host.registries
        assert not host.indexes

    async def test_it_can_be_made_again(self, make_runtime: Callable[..., AdkRuntime]) -> None:
        """A closed runtime leaves the host free for another."""
        for _ in range(2):
            runtime = make_runtime()
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "hello")
            await runtime.close()


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
