"""The pytest fixture `leak_probe`: a test that asks for it fails if it leaked.

What the test itself made and left behind counts, with the place where it was made; what fixtures made
does not. The look happens right behind the test function, while its event loop is still there.
`leak_probe = true` in the pytest settings asks for it in every test but those marked
`leaks_on_purpose`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from adapters.leak_probe import LeakProbe

_EXCUSED = "leaks_on_purpose"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("leak_probe", "fail every test that leaks", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{_EXCUSED}: `leak_probe = true` passes this test over")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getini("leak_probe"):
        return
    for item in items:
        if not isinstance(item, pytest.Function) or item.get_closest_marker(_EXCUSED) is not None:
            continue
        if "leak_probe" not in item.fixturenames:
            item.fixturenames.insert(0, "leak_probe")


@pytest.fixture
def leak_probe() -> Iterator[LeakProbe]:
    """A probe with tracing; the test that has it fails if it leaves something behind.

    `leak_probe.declare(thing)` excuses a thing. `leak_probe.watch(name, map)` and a
    `leak_probe.sample()` in each round of the test tell maps, descriptors and memory that only grow.
    """
    with LeakProbe(tracing=True) as probe:
        yield probe


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    probe = pyfuncitem.funcargs.get("leak_probe")
    if not isinstance(probe, LeakProbe):
        return (yield)
    probe.begin()
    result = yield
    found = probe.look(collect=True)
    if found:
        lines = "\n".join(f"  {one}" for one in found)
        pytest.fail(f"the test leaked:\n{lines}", pytrace=False)
    return result
