"""A reconciliation that somebody asked for: now, from fresh inventories, with the outcomes as its answer.

Hosts look at their registries themselves first, so that what was changed behind a registry's back is
seen. Then orders go out and outcomes are waited for, until a look at everything finds nothing that was
not tried. What is left then is what the answer lists as left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from reconciler.orders import Orders
from reconciler.outlook import Outlook
from reconciler.partitions import Partitions
from reconciler.plan import Step
from reconciler.policy import Policy
from reconciler.result import Result
from reconciler.tail import Tail
from store.tasks import check_cancelled, end_tasks

_FRESH_SECONDS = 3.0
_OUTCOME_GRACE = 5.0


class Forced:
    """Reconciles on request.

    Args:
        tail: keeps the state.
        outlook: looks at it.
        orders: sends what is due.
        acting: the partitions that the worker acts for.
        policy: gives the time limits.
    """

    def __init__(
        self, tail: Tail, outlook: Outlook, orders: Orders, acting: Partitions, policy: Policy
    ) -> None:
        self._tail = tail
        self._outlook = outlook
        self._orders = orders
        self._acting = acting
        self._policy = policy

    async def reconcile(self, processes: Sequence[str], *, dry_run: bool) -> Result:
        """Reconciles some processes, and waits for the outcomes.

        Raises:
            Fenced: a lease was lost meanwhile.
        """
        result = Result(list(processes))
        await self._ask_report(processes, result)
        plan = self._outlook.look_at_everything(processes)
        result.found(plan)
        if dry_run:
            return result
        tried: set[tuple[str, str]] = set()
        while steps := [s for s in plan.due if (s.process, s.target) not in tried]:
            tried.update((s.process, s.target) for s in steps)
            await self._carry_out(steps, result)
            await self._ask_report(processes, result)
            plan = self._outlook.look_at_everything(processes)
            result.found(plan)
        result.settle(plan)
        return result

    async def _carry_out(self, steps: Sequence[Step], result: Result) -> None:
        sent = await self._orders.send(steps)
        stages = len({step.stage for step in steps})
        limit = self._policy.teardown_timeout * (1 + stages) + _OUTCOME_GRACE
        async with self._watching():
            await asyncio.wait([outcome for _, outcome in sent], timeout=limit)
        for step, outcome in sent:
            if outcome.done():
                event = outcome.result()
                result.outcome(step, event.type, event.reason or "")
            else:
                result.outcome(step, "cleanup_failed", f"no outcome within {limit:g} s")

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """Folds new events meanwhile, also where no loop runs in the background."""

        async def follow() -> None:
            while True:
                check_cancelled()
                await self._tail.wait(block_ms=200)

        task = asyncio.create_task(follow())
        try:
            yield
        finally:
            await end_tasks([task])

    async def _ask_report(self, processes: Sequence[str], result: Result) -> None:
        """Has each host look at its registries themselves, and waits for what they say."""
        asked = await self._orders.ask_report(processes)
        deadline = time.monotonic() + _FRESH_SECONDS
        while True:
            self._outlook.hear_of(processes)
            await self._outlook.refresh(processes, self._acting)
            for process, request in list(asked.items()):
                summary = self._outlook.inventories.summary(process)
                if process not in self._tail.state.processes or (
                    summary is not None and request in summary.answers
                ):
                    del asked[process]
            if not asked:
                break
            if time.monotonic() > deadline:
                result.silent.update(asked)
                break
            await asyncio.sleep(0.005)
        await self._tail.catch_up()
