"""Every alert rule fires when its cause happens, and none fires where all is well.

A real Prometheus scrapes real workers and hosts. Rules and scraping run `FACTOR` times as fast as they are
shipped; the rules are otherwise those of deploy/prometheus/alerts.yaml. One namespace has no trouble all
the while: nothing may ever have fired there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e.programs import eventually
from tests.monitoring.fleet import Fleet, fleet
from tests.monitoring.prometheus import Prometheus, prometheus, read_rules

AT_ONCE = ("leak", "take_redis_away", "stall_redis", "delay", "pause_host")
"""Causes that happen as soon as the fleet is watched; the others when their alert is asked for."""
CAUSES = {
    "AgentReconcilerRedisUnavailable": ("take_redis_away", "agent-reconciler-doomed"),
    "AgentReconcilerOutboxGrowing": ("take_redis_away", "agent-hosts-doomed"),
    "AgentReconcilerOutboxSpilling": ("take_redis_away", "agent-hosts-doomed"),
    "AgentReconcilerEventsDropped": ("take_redis_away", "agent-hosts-doomed"),
    "AgentReconcilerProcessesLost": ("pause_host", "agent-reconciler-shaken"),
    "AgentReconcilerHostFenced": ("pause_host", "agent-hosts-shaken"),
    "AgentReconcilerQuarantinedEntries": ("leak", "agent-reconciler-leaking"),
    "AgentReconcilerRecordsNotSaved": ("leak", "agent-hosts-leaking"),
    "AgentReconcilerTeardownsStuck": ("leak", "agent-reconciler-leaking"),
    "AgentReconcilerDriftStays": ("leak", "agent-reconciler-leaking"),
    "AgentReconcilerSnapshotOld": ("leak", "agent-reconciler-leaking"),
    "AgentReconcilerArchiveBehind": ("leak", "agent-reconciler-leaking"),
    "AgentReconcilerAppendSlow": ("stall_redis", "agent-hosts-slow"),
    "AgentReconcilerWorkerLagging": ("delay", "agent-reconciler-remote"),
    "AgentReconcilerLeaseFlapping": ("shake_worker", "agent-reconciler-shaken"),
    "AgentReconcilerUntrackedGrowing": ("leak", "agent-reconciler-leaking"),
    "AgentReconcilerPartitionsWithoutOwner": ("stop_worker", "agent-reconciler-remote"),
    "AgentReconcilerWorkerDown": ("stop_worker", "agent-reconciler-remote"),
    "AgentReconcilerNoWorker": ("kill_workers", "agent-reconciler-remote"),
    "AgentReconcilerCreationOutrunsCleanup": ("leak", "agent-reconciler-leaking"),
}
"""Alert -> what makes it fire, and in which job."""
HEALTHY = ("agent-reconciler-healthy", "agent-hosts-healthy")


@dataclass
class Watched:
    """The fleet, and the Prometheus that watches it."""

    fleet: Fleet
    prometheus: Prometheus
    happened: set[str] = field(default_factory=set)

    def cause(self, name: str) -> None:
        """Makes something happen, once."""
        if name not in self.happened:
            self.happened.add(name)
            getattr(self.fleet, name)()


@contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    """The fleet under watch, with the troubles that happen at once."""
    (folder / "fleet").mkdir()
    with fleet(folder / "fleet") as made, prometheus(folder / "prometheus", made.jobs) as watcher:
        eventually(
            lambda: sum(one["value"] for one in watcher.series("up")) == sum(map(len, made.jobs.values())),
            "Prometheus reaches everybody", 60,
        )  # fmt: skip
        seen = Watched(made, watcher)
        for name in AT_ONCE:
            seen.cause(name)
        yield seen


def test_every_alert_has_a_cause() -> None:
    """No rule is there that the tests below do not make fire."""
    assert CAUSES.keys() == read_rules().keys()


@pytest.mark.timeout(400)
def test_every_alert(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """Each alert fires, in its job, when what it warns of happens; none does where all is well.

    It is one test, because all of it shares a fleet, and most of the waiting.
    """
    with watched(tmp_path) as seen:
        for alert, (cause, job) in CAUSES.items():
            with subtests.test(alert=alert):
                seen.cause(cause)
                eventually(
                    lambda alert=alert, job=job: alert in seen.prometheus.firing(job),
                    f"{alert} fires in {job}", 90,
                )  # fmt: skip
        with subtests.test("silent where all is well"):
            silent(seen.prometheus)


def silent(prometheus: Prometheus) -> None:
    """In the namespace without trouble nothing ever fired, though all was scraped and things happened."""
    for job in HEALTHY:
        assert prometheus.ever_fired(job) == {}
        (scraped,) = prometheus.series(f'max by (job) (count_over_time(up{{job="{job}"}}[10m]))')
        assert scraped["value"] > 20
    (ended,) = prometheus.series(
        'sum by (job) (agent_reconciler_resources_ended_total{job="agent-reconciler-healthy"})'
    )
    assert ended["value"] > 100
