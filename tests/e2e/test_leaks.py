"""Every leak of the mission, in three operating-system processes: it leaks, a worker comes, it is gone."""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.programs import FAST_POLICY, PATIENT_POLICY, Cli, HostProgram, Program, eventually

Start = Callable[..., Program]

OPEN_CHATS = """
ids = [await service.open_chat(f"user-{n}", topic) for n, topic in enumerate(topics)]
for id in ids:
    await service.send(id, "hello")
return ids
"""


class TestEachLeak:
    def test_stale_runner_mapping(self, chat: HostProgram, start_worker: Start) -> None:
        """`_agent_runners` names a destroyed runner; the entry goes, although nothing is idle yet."""
        chat.do(OPEN_CHATS, topics=["chess", "birds"])
        chat.do("service.runners.pop(service._agent_runners['agent-chess'])")
        assert chat.counts()["_agent_runners"] == 2
        start_worker(policy=PATIENT_POLICY)
        eventually(lambda: chat.counts()["_agent_runners"] == 1, "the stale entry goes")
        assert chat.do("return list(service._agent_runners)") == ["agent-birds"]
        assert chat.counts()["chats"] == 2

    def test_session_list_that_only_grows(self, chat: HostProgram, start_worker: Start) -> None:
        """`_agent_sessions` keeps ids of deleted chats; the dead ids go, the live ones stay."""
        first, second = chat.do(OPEN_CHATS, topics=["chess", "chess"])
        chat.do("await service.forget_chat(first)", first=first)
        assert chat.do("return service._agent_sessions")["agent-chess"] == [first, second]
        start_worker(policy=PATIENT_POLICY)
        eventually(
            lambda: chat.do("return service._agent_sessions") == {"agent-chess": [second]},
            "the dead id goes",
        )

    def test_lock_per_configuration(self, chat: HostProgram, start_worker: Start) -> None:
        """A lock of a configuration goes with the runner that owned it."""
        chat.do(OPEN_CHATS, topics=["chess", "birds"])
        eventually(
            lambda: chat.do("return all(e.owned_by for e in host.entries.values() "
                            "if e.ref.startswith('config_lock/'))"),
            "the locks have owners",
        )  # fmt: skip
        chat.do("service.runners.pop(service._agent_runners['agent-chess'])")
        start_worker(policy=PATIENT_POLICY)
        eventually(
            lambda: chat.do("return list(service._config_locks)") == ["birds"], "the lock goes"
        )

    def test_chats_nobody_returns_to(self, chat: HostProgram, start_worker: Start) -> None:
        """Abandoned chats go, then their runners, then the agents, and every map is empty."""
        chat.do(OPEN_CHATS, topics=["chess", "birds", "chess"])
        start_worker(policy=FAST_POLICY)
        eventually(lambda: not any(chat.counts().values()), "every registry is empty")
        left = chat.do("return service.session_service.sessions")
        assert not any(sessions for users in left.values() for sessions in users.values())

    def test_recovery_records_that_stay(self, chat: HostProgram, start_worker: Start) -> None:
        """A recovery record goes when its time is over; the chat itself stays."""
        (id,) = chat.do(OPEN_CHATS, topics=["chess"])
        chat.do("service.save_recovery(id)", id=id)
        start_worker(policy=PATIENT_POLICY | {"idle_timeouts.recovery_record": 0.5})
        eventually(lambda: chat.counts()["recovery_records"] == 0, "the record goes")
        assert chat.counts()["chats"] == 1

    def test_runner_that_is_never_closed(self, chat: HostProgram, start_worker: Start) -> None:
        """A runner that the service drops without closing is closed, with its toolsets."""
        chat.do(OPEN_CHATS, topics=["chess"])
        chat.do(
            """
            runner_id = service._agent_runners['agent-chess']
            kept['file'] = service.runners[runner_id].agent.tools[0].file
            service.runners.pop(runner_id)
            """
        )
        assert not chat.do("return kept['file'].closed")
        start_worker(policy=PATIENT_POLICY)
        eventually(lambda: chat.do("return kept['file'].closed"), "the toolset's file is closed")
        eventually(lambda: chat.counts()["unclosed runners"] == 0, "it is kept no longer")


class TestInUse:
    allowed_refusals: tuple[str, ...] = ()

    def test_acquired_session_outlives_the_clock(
        self, chat: HostProgram, start_worker: Start, cli: Cli
    ) -> None:
        """A conversation in progress stays while it is acquired, and goes after its release."""
        held, _idle = chat.do(OPEN_CHATS, topics=["chess", "birds"])
        chat.do("kept['use'] = host.acquire('session/' + id); kept['use'].__enter__()", id=held)
        start_worker(policy=FAST_POLICY)
        eventually(lambda: chat.counts()["chats"] == 1, "the idle one goes")
        assert chat.do("return list(service.chats)") == [held]
        # A forced pass does not touch it either, nor its runner and agent, long past every limit.
        eventually(lambda: chat.counts()["runners"] == 1, "the idle runner goes")
        eventually(lambda: not any(cli.json("reconcile", "--dry-run")[n] for n in ("orphans", "dangling")),
                   "what the idle one left goes")  # fmt: skip
        result = cli.json("reconcile")
        assert result["torn_down"] == []
        assert chat.do("return await service.send(id, 'still here?')", id=held).startswith(
            "You said"
        )
        chat.do("kept['use'].__exit__()")
        eventually(lambda: not any(chat.counts().values()), "everything goes after the release")
        refusals = [e for e in cli.log() if e["type"] in {"cleanup_refused", "cleanup_failed"}]
        assert [
            e for e in refusals if not e["reason"].startswith(self.allowed_refusals or "\0")
        ] == []


class TestTheStory:
    def test_log_tells_who_what_why_and_which_order(
        self, chat: HostProgram, start_worker: Start, cli: Cli
    ) -> None:
        """Popping a runner out of `runners`: the log has the loss, the order and its outcome, in order."""
        worker = start_worker(policy=PATIENT_POLICY)
        chat.do(OPEN_CHATS, topics=["chess"])
        runner = chat.do("return service._agent_runners['agent-chess']")
        chat.do("service.runners.pop(runner)", runner=runner)
        eventually(lambda: chat.counts()["_agent_runners"] == 0, "the stale entry goes")

        def story() -> list[dict[str, object]]:
            about = cli.log("--resource", f"runner/{runner}")
            done = [e for e in about if e.get("attrs", {}).get("registry") == "_agent_runners"]
            return about if len(done) == 2 else []

        about = eventually(story, "the log has the outcome")
        lost = next(e for e in about if e["type"] == "cleaned_up")
        entry = [e for e in about if e.get("attrs", {}).get("registry") == "_agent_runners"]
        asked, done = entry
        assert (lost["process"], lost["reason"]) == (
            chat.id,
            "removed from its registry by the service",
        )
        assert asked["type"] == "cleanup_requested"
        assert asked["process"].startswith("worker-")
        assert asked["holder"] == chat.id
        assert "which is not alive" in asked["reason"]
        assert (done["type"], done["process"]) == ("cleaned_up", chat.id)
        assert asked["order_id"] == done["order_id"]
        assert about.index(lost) < about.index(asked) < about.index(done)
        plain = cli.run("log", "--resource", f"runner/{runner}").stdout
        assert f"runner/{runner} in _agent_runners[agent-chess]" in plain
        assert asked["order_id"] in plain
        assert worker.stop() == 0


class TestProcesses:
    def test_killed_host_is_closed_in_the_log(
        self, chat: HostProgram, start_worker: Start, cli: Cli
    ) -> None:
        """A host that is killed is lost after its lease, and nothing of it counts as alive."""
        chat.do(OPEN_CHATS, topics=["chess"])
        start_worker(policy=PATIENT_POLICY)
        eventually(lambda: cli.json("status")["processes"], "the host is known")
        chat.stop(9)
        eventually(lambda: not cli.json("status")["processes"], "the host is closed")
        (lost,) = [e for e in cli.log() if e["type"] == "process_lost"]
        assert lost["ref"] == f"process/{chat.id}"
