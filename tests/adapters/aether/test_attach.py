"""Attaching and detaching: what is looked over, what is missing, and that no trace is left."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from google.adk.runners import Runner

from adapters import Host
from adapters.aether_frame import attach
from reconciler import Policy, Reconciler
from tests.adapters.aether.conftest import PATIENT, QUICK, one_pass, until
from tests.adapters.aether.frame import (
    AdkFrameworkAdapter,
    AgentConfig,
    Connection,
    dicts,
    left,
)
from tests.support import log_lines

Reconciling = Callable[[Policy], Reconciler]
CONFIG = AgentConfig("support")


def parts(frame: AdkFrameworkAdapter) -> list[Any]:
    return [frame, frame.runner_manager, frame.adk_session_manager, frame.agent_manager]


def attributes(frame: AdkFrameworkAdapter) -> list[dict[str, Any]]:
    return [dict(vars(part)) for part in parts(frame)]


async def test_detaching_restores_the_object_exactly(
    frame: AdkFrameworkAdapter, host: Host
) -> None:
    """The same dict objects, with the content of now; no method, no nested dict, no Runner changed."""
    kept = await frame.create(CONFIG)
    await frame.chat(kept, "chat")
    before, runner = attributes(frame), frame._agent_runners[kept]
    nested = frame.runner_manager.runners[runner]["sessions"]
    detach = attach(host, frame)
    assert attributes(frame) != before
    new = await frame.create(CONFIG)
    await frame.chat(new, "another chat")
    new_runner = frame._agent_runners[new]
    detach()
    detach()
    after = attributes(frame)
    assert [list(one) for one in after] == [list(one) for one in before]
    for one, other in zip(before, after, strict=True):
        assert all(other[name] is value for name, value in one.items())
    assert all(type(content) is dict for content in dicts(frame).values())
    assert frame._agent_runners == {kept: runner, new: new_runner}
    assert frame.runner_manager.runners[runner]["sessions"] is nested
    for context in frame.runner_manager.runners.values():
        assert type(context["sessions"]) is dict
        assert not {"run_async", "run_live", "close"} & vars(context["runner"]).keys()
    assert not host.registries
    assert not host.indexes
    assert not [ref for ref in host.entries if not ref.startswith("process/")]
    assert await frame.chat(new, "another chat") == "yes"


async def test_the_mapping_stays_one_dict_under_two_names(
    frame: AdkFrameworkAdapter, host: Host
) -> None:
    """`agent_runner_mapping is _agent_runners`: before, while attached, and after."""
    assert frame.runner_manager.agent_runner_mapping is frame._agent_runners
    detach = attach(host, frame)
    assert frame.runner_manager.agent_runner_mapping is frame._agent_runners
    frame.runner_manager.agent_runner_mapping["agent"] = "runner"
    assert frame._agent_runners["agent"] == "runner"
    detach()
    assert frame.runner_manager.agent_runner_mapping is frame._agent_runners
    assert frame._agent_runners == {"agent": "runner"}


async def test_it_can_be_attached_again(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """Twice at once is refused and changes nothing; after detaching it works again."""
    detach = attach(host, frame)
    attached = attributes(frame)
    with pytest.raises(TypeError, match="observed already"):
        attach(host, frame)
    assert attributes(frame) == attached
    detach()
    attach(host, frame)
    await frame.chat(await frame.create(CONFIG), "chat")
    async with reconciling(QUICK):
        await until(lambda: not left(frame), "empty")


@pytest.mark.leaks_on_purpose
async def test_what_leaked_before_is_cured(
    host: Host, reconciling: Reconciling, frame: AdkFrameworkAdapter
) -> None:
    """Attaching to a service that has leaked already cleans that up, too."""
    for number in range(4):
        agent = await frame.create(CONFIG)
        await frame.chat(agent, f"chat of {agent}")
        if number % 2:
            await frame.runner_manager.cleanup_runner(frame._agent_runners[agent])
    frame.runner_manager.runners.clear()
    frame.agent_manager._agents.clear()
    assert len(left(frame)) > 8
    attach(host, frame)
    async with reconciling(QUICK):
        await until(lambda: not left(frame), "empty")


MISSING = [
    ("runner_manager", "_config_locks"), ("runner_manager", "_runner_locks"),
    ("runner_manager", "_config_creation_tasks"), ("runner_manager", "acquire_runner"),
    ("runner_manager", "session_to_runner"), ("adk_session_manager", "_pending_recoveries"),
    ("adk_session_manager", "_cleared_sessions"), ("agent_manager", "_agent_metadata"),
    ("", "_config_agents"), ("", "_mapping_lock"), ("", "_agent_sessions"),
    ("", "cleanup_chat_session"), ("", "_handle_agent_cleanup"),
    ("runner_manager", "remove_session_from_runner"), ("agent_manager", "cleanup_agent"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "name"), MISSING)
async def test_a_missing_attribute_is_named_in_the_log(
    part: str, name: str, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """Another version lacks one attribute: a log line names it, the rest is looked after."""

    class Older:
        def __init__(self, whole: Any) -> None:
            vars(self).update({k: v for k, v in vars(whole).items() if k != name})
            for method in dir(type(whole)):
                if not method.startswith("__") and method != name and method not in vars(self):
                    setattr(self, method, getattr(whole, method))

    whole = AdkFrameworkAdapter()
    older = Older(getattr(whole, part) if part else whole)
    adapter: Any = whole
    if part:
        setattr(whole, part, older)
    else:
        adapter = older
    detach = attach(host, adapter)
    lines = log_lines(caplog)
    named = [line["attribute"] for line in lines if "no such attribute" in line["event"]]
    assert named == [name]
    adapter.runner_manager.runners["runner"] = {"runner": None, "config_hash": "config"}
    assert "runner/runner" in host.entries
    detach()
    assert type(adapter.runner_manager.runners) is dict


async def test_a_whole_part_may_be_missing(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """Without agent and session managers the runners are still looked after."""
    frame = AdkFrameworkAdapter()
    del frame.agent_manager, frame.adk_session_manager
    frame.runner_manager.runners = OrderedDict()  # Of a sort that cannot be observed.
    detach = attach(host, frame)
    lines = log_lines(caplog)
    assert {line.get("attribute") for line in lines} >= {"agent_manager", "runners"}
    detach()


@pytest.mark.parametrize("thing", [None, 5, "adapter", object()])
async def test_something_else_is_refused(host: Host, thing: object) -> None:
    """What has nothing of that shape is told so, and nothing stays behind."""
    registries = list(host.registries)
    with pytest.raises(TypeError, match="has nothing of that shape"):
        attach(host, thing)
    assert host.registries == registries


async def test_a_part_with_slots_is_left_alone(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be put in the place of its attributes: a log line says so, the rest goes on."""

    class Slotted:
        __slots__ = ("_agents",)

        def __init__(self) -> None:
            self._agents: dict[str, Any] = {}

    frame: Any = AdkFrameworkAdapter()
    frame.agent_manager = Slotted()
    detach = attach(host, frame)
    lines = log_lines(caplog)
    assert "_agents" in [line["attribute"] for line in lines if "has slots" in line["event"]]
    frame.runner_manager.runners["runner"] = {"runner": None}
    assert "runner/runner" in host.entries
    detach()
    assert type(frame.agent_manager._agents) is dict


async def test_a_runner_that_is_put_back_is_not_closed(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """Taken out of `runners` and put back at once, it is the same runner, open."""
    attach(host, frame)
    agent = await frame.create(CONFIG)
    await frame.chat(agent, "chat")
    runner = frame._agent_runners[agent]
    frame.runner_manager.runners[runner] = frame.runner_manager.runners.pop(runner)
    await one_pass(reconciling(PATIENT))
    assert Connection.open == 1
    assert await frame.chat(agent, "chat") == "yes"
    async with reconciling(QUICK):
        await until(lambda: Connection.open == 0, "closed in the end")


async def test_a_runner_is_closed_once_whoever_closes_it(
    frame: AdkFrameworkAdapter,
    host: Host,
    reconciling: Reconciling,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ADK's `Runner.close` is called once, also where a newer service closes the runner itself."""
    closed: list[Runner] = []
    close = Runner.close

    async def counting(self: Runner) -> None:
        closed.append(self)
        await close(self)

    monkeypatch.setattr(Runner, "close", counting)
    attach(host, frame)
    agent = await frame.create(CONFIG)
    id = frame._agent_runners[agent]
    runner = frame.runner_manager.runners[id]["runner"]
    await asyncio.gather(runner.close(), runner.close())
    assert closed == [runner]
    await frame.runner_manager.cleanup_runner(id)
    async with reconciling(QUICK):
        await until(lambda: not left(frame), "empty")
        await until(lambda: f"adk_runner/{id}" not in host.entries, "nothing left to close")
    assert closed == [runner]


async def test_closing_that_fails_is_tried_again(
    frame: AdkFrameworkAdapter,
    host: Host,
    reconciling: Reconciling,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The service's own call returns as ever; the reconciler closes the runner later."""
    failures = 2
    close = Runner.close

    async def failing(self: Runner) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise RuntimeError("the server is away")
        await close(self)

    monkeypatch.setattr(Runner, "close", failing)
    attach(host, frame)
    agent = await frame.create(CONFIG)
    assert await frame.runner_manager.cleanup_runner(frame._agent_runners[agent])
    lines = log_lines(caplog)
    assert "the server is away" in [line.get("reason") for line in lines]
    async with reconciling(QUICK):
        await until(lambda: Connection.open == 0, "closed at the third try")
    assert failures == 0
