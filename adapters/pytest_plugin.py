"""The pytest fixture `leak_probe`: a test that asks for it fails if it leaked.

What the test itself made and left behind counts, with the place where it was made; what fixtures made
does not. The look happens right behind the test function, while its event loop is still there. What a
fixture of the test may yet close is looked at again when the fixtures have ended; left open, it is an
error of the teardown. `leak_probe = true` in the pytest settings asks for all this in every test but
those marked `leaks_on_purpose`.

The one thing to know: what is older than the test is frozen (`gc.freeze`) while it runs, so that the
collector, run after every test, looks only at what the test made.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from adapters.leak_probe import Finding, LeakProbe

_EXCUSED = "leaks_on_purpose"
_ASKED = pytest.StashKey[bool]()
"""The test itself asks for the probe."""
_TO_CLOSE = pytest.StashKey[set[str]]()
"""References of what a fixture may yet close."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("leak_probe", "fail every test that leaks", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{_EXCUSED}: `leak_probe = true` passes this test over")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    always = config.getini("leak_probe")
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        item.stash[_ASKED] = asked = "leak_probe" in item.fixturenames
        if asked or (always and item.get_closest_marker(_EXCUSED) is None):
            # Set up first, it ends last. A list of its own: all cases of one function share theirs.
            others = [name for name in item.fixturenames if name != "leak_probe"]
            item.fixturenames = ["leak_probe", *others]


@pytest.fixture
def leak_probe(request: pytest.FixtureRequest) -> Iterator[LeakProbe]:
    """A probe with tracing; the test that has it fails if it leaves something behind.

    `leak_probe.declare(thing)` excuses a thing. `leak_probe.watch(name, map)` and a
    `leak_probe.sample()` in each round of the test tell maps, descriptors and memory that only grow.
    """
    with LeakProbe(tracing=True) as probe:
        yield probe
        if waited := request.node.stash.get(_TO_CLOSE, None):
            _fail_for([one for one in probe.look(collect=True) if one.ref in waited])


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    probe = item.funcargs.get("leak_probe") if isinstance(item, pytest.Function) else None
    if not isinstance(item, pytest.Function) or not isinstance(probe, LeakProbe):
        return (yield)
    if not item.stash[_ASKED] and item.get_closest_marker(_EXCUSED) is not None:
        return (yield)  # Marked since it was collected.
    probe.begin()
    gc.freeze()
    try:
        result = yield
        found = probe.look(collect=True)
    finally:
        gc.unfreeze()
    if _has_fixtures(item):
        may_close = [one for one in found if one.can_be_closed]
        item.stash[_TO_CLOSE] = {one.ref for one in may_close}
        found = [one for one in found if not one.can_be_closed]
    _fail_for(found)
    return result


def _fail_for(found: list[Finding]) -> None:
    if found:
        lines = "\n".join(f"  {one}" for one in found)
        pytest.fail(f"the test leaked:\n{lines}", pytrace=False)


def _has_fixtures(item: pytest.Function) -> bool:
    """Whether somebody other than pytest itself does something when the test has ended."""
    for name in item.fixturenames:
        definitions = item._fixtureinfo.name2fixturedefs.get(name)
        if not definitions or name == "leak_probe":
            continue
        module = definitions[-1].func.__module__.partition(".")[0]
        if module not in ("_pytest", "pytest_asyncio") or name.startswith(("_xunit", "_unittest")):
            return True
    return "request" in item._fixtureinfo.argnames
