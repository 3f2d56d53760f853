"""Every alert rule fires when its cause happens, and none fires where all is well.

A real Prometheus scrapes real workers and hosts. Rules and scraping run `FACTOR` times as fast as they are
shipped; the rules are otherwise those of deploy/prometheus/alerts.yaml. One namespace has no trouble all
the while: nothing may ever have fired there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.e2e.programs import eventually
from tests.monitoring.fleet import Fleet, fleet
from tests.monitoring.prometheus import Prometheus, prometheus, read_rules

pytestmark = [pytest.mark.xdist_group("prometheus"), pytest.mark.timeout(300)]

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


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The fleet under watch, with the troubles that happen at once."""
    folder = tmp_path_factory.mktemp("monitoring")
    (folder / "fleet").mkdir()
    with fleet(folder / "fleet") as made, prometheus(folder / "prometheus", made.jobs) as watcher:
        eventually(
            lambda: sum(one["value"] for one in watcher.series("up")) == sum(map(len, made.jobs.values())),
            "Prometheus reaches everybody", 60,
        )  # fmt: skip
        watched = Watched(made, watcher)
        for name in AT_ONCE:
            watched.cause(name)
        yield watched


def test_every_alert_has_a_cause() -> None:
    """No rule is there that the tests below do not make fire."""
    assert CAUSES.keys() == read_rules().keys()


@pytest.mark.parametrize("alert", CAUSES)
def test_fires(watched: Watched, alert: str) -> None:
    """The alert fires, in its job, when what it warns of happens."""
    cause, job = CAUSES[alert]
    watched.cause(cause)
    eventually(lambda: alert in watched.prometheus.firing(job), f"{alert} fires in {job}", 120)


def test_silent_where_all_is_well(watched: Watched) -> None:
    """In a namespace without trouble nothing ever fired, though everything was scraped and went on."""
    for job in HEALTHY:
        assert watched.prometheus.ever_fired(job) == {}
        (scraped,) = watched.prometheus.series(
            f'max by (job) (count_over_time(up{{job="{job}"}}[10m]))'
        )
        assert scraped["value"] > 20
    (ended,) = watched.prometheus.series(
        'sum by (job) (agent_reconciler_resources_ended_total{job="agent-reconciler-healthy"})'
    )
    assert ended["value"] > 100
