"""The snippet of docs/aether-frame.md is run as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reconciler import Policy, Reconciler
from store import Store
from tests.adapters.aether.conftest import QUICK, until
from tests.adapters.aether.frame import AdkFrameworkAdapter, AgentConfig, left

DOCUMENT = Path(__file__).parents[3] / "docs" / "aether-frame.md"


async def test_the_snippet_binds_a_service(
    frame: AdkFrameworkAdapter, store: Store, tmp_path: Path
) -> None:
    """It attaches, looks after the service while it serves, and detaches."""
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, str(DOCUMENT), "exec"), names)
    main: Callable[..., Any] = names["main"]

    async def serve() -> None:
        await frame.chat(await frame.create(AgentConfig("support")), "chat")
        async with reconciler():
            await until(lambda: not left(frame), "empty")

    def reconciler() -> Reconciler:
        policy: Policy = QUICK
        return Reconciler(store, policy=policy)

    await main(frame, store, serve)
    assert type(frame.runner_manager.runners) is dict
