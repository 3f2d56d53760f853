"""`in_use` and `used`: what a service notes in its own objects counts as if the host had been told."""

from __future__ import annotations

from dataclasses import dataclass

from adapters import Host
from reconciler import Policy, Reconciler
from store import Store
from store.messages import Action, Order


@dataclass(eq=False)
class Worker:
    tasks: int = 0
    last_activity: float = 0.0
    partner: str | None = None


def observe(host: Host, workers: dict[str, Worker]) -> None:
    host.registry(
        "runner",
        workers,
        in_use=lambda id, worker: worker.tasks,
        used=lambda id, worker: worker.last_activity,
        uses=lambda id, worker: [worker.partner] if worker.partner else [],
    )


async def carry_out(host: Host, seq: int) -> None:
    order = Order("o-1", host.process, Action.TEARDOWN, "runner/a", seq=seq)
    await host.execute([order])


async def test_an_order_sees_what_changed_since_the_last_look(host: Host) -> None:
    """An object used or held since then refuses the order, in the tick of the check."""
    worker = Worker()
    observe(host, {"a": worker})
    entry = host.entries["runner/a"]
    worker.last_activity = 1.0
    seq = entry.seq
    await carry_out(host, seq)
    assert host.entries["runner/a"] is entry
    assert entry.seq > seq
    worker.tasks = 1
    await carry_out(host, entry.seq)
    assert host.entries["runner/a"] is entry
    assert entry.holders == 1
    worker.tasks = 0
    host.look_at(entry)
    await carry_out(host, entry.seq)
    assert "runner/a" not in host.entries


async def test_the_log_hears_of_it(host: Host, store: Store, namespace: str) -> None:
    """Holders and uses reach the worker with the next look, together with those the host counts."""
    worker = Worker(tasks=1)
    observe(host, {"a": worker})
    with host.acquire("runner/a"):
        worker.tasks, worker.last_activity, worker.partner = 2, 1.0, "agent/x"
        host.inventory()
        reconciler = Reconciler(store, namespace=namespace, policy=Policy())
        await reconciler.open()
        await reconciler.keep_leases()
        await reconciler.reconcile()
        resource = reconciler.tail.state.processes[host.process].resources["runner/a"]
        assert resource.in_use == 3
        assert resource.uses == ("agent/x",)
    await reconciler.reconcile()
    assert resource.in_use == 2
    await reconciler.release()


async def test_a_large_registry_is_looked_at_in_turn(host: Host) -> None:
    """One look takes a thousand objects, the next look the following ones; a report takes all."""
    workers = {f"{number}": Worker() for number in range(2500)}
    observe(host, workers)

    def noted() -> int:
        return sum(entry.mark == workers["0"].last_activity for entry in host.entries.values())

    for moment, looks in ((1.0, [1000, 2000, 2500]), (2.0, [1000])):
        for worker in workers.values():
            worker.last_activity = moment
        for count in looks:
            host.inventory()
            assert noted() == count
    host.report("r-1")
    assert noted() == 2500
