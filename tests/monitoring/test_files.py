"""Rules, dashboard and documents name what is really exported, and nothing that is not."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from adapters import Host
from reconciler import Policy, Reconciler
from store import Store
from tests.e2e.programs import ROOT
from tests.monitoring.prometheus import RULES, read_rules, shortened, tool
from tests.support import eventually

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "agent-reconciler.json"
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"
METRICS, ALERTS = ROOT / "docs" / "metrics.md", ROOT / "docs" / "alerts.md"
PROMETHEUS_OWN = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate", "severity"}}
TARGET_LABELS = {"job", "instance"}


@dataclass
class Exported:
    """What is exported: metric -> type, sample name -> labels."""

    types: dict[str, str] = field(default_factory=dict)
    labels: dict[str, set[str]] = field(default_factory=dict)

    def take(self, page: bytes) -> None:
        for family in text_string_to_metric_families(page.decode()):
            if family.type == "gauge" and family.name.endswith("_created"):
                continue  # The moment at which a counter began, which its client adds by itself.
            name = family.name + ("_total" if family.type == "counter" else "")
            self.types[name] = family.type
            self.labels.setdefault(name, set())
            for sample in family.samples:
                self.labels.setdefault(sample.name, set()).update(sample.labels)
                self.labels[name].update(sample.labels.keys() - {"le"})


@pytest.fixture
async def exported(store: Store, namespace: str) -> Exported:
    """What a worker and a host export after they have done something of everything."""
    async with (
        Host.connect(store, name="svc", namespace=namespace) as host,
        Reconciler(store, namespace=namespace, policy=Policy(session_idle_timeout=0.05)) as worker,
    ):
        sessions = host.registry("session", teardown=lambda id, obj: None)
        sessions["s"] = object()
        await eventually(lambda: not sessions, 20)
        await eventually(lambda: b'outcome="done"' in worker.metrics.page(), 20)
        sessions["kept"] = object()
        with host.acquire("session/kept"):
            await eventually(lambda: worker.tail.state.size, 20)
            worker.observe()
            found = Exported()
            found.take(worker.metrics.page())
            found.take(host.metrics.page())
    return found


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The metrics that a PromQL expression names, each with the labels it is selected by."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)

    promql_parser.walk(promql_parser.parse(expression.replace("$__rate_interval", "5m")), visit)
    for one in found:
        assert one.name, f"a selector without a name in {expression}"
        yield one.name, {matcher.name for matcher in one.matchers.matchers}


def grouped_by(expression: str) -> set[str]:
    """The labels that an expression groups by."""
    groups = re.findall(r"\bby \(([^)]*)\)", expression)
    return {label.strip() for group in groups for label in group.split(",")}


def check_names(expression: str, exported: Exported) -> None:
    """Every metric and label of an expression is there."""
    known: set[str] = set(TARGET_LABELS)
    for name, labels in selectors(expression):
        has = PROMETHEUS_OWN.get(name) or exported.labels.get(name)
        assert has is not None, f"{name} is not exported (in {expression})"
        assert labels <= has | TARGET_LABELS, f"{name} has no {labels - has} (in {expression})"
        known |= has
    assert grouped_by(expression) <= known, f"grouped by what is not there: {expression}"


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


class TestRules:
    def test_name_what_is_exported(self, exported: Exported) -> None:
        """Every metric and label in a rule exists in what a real worker or host exports."""
        for rule in read_rules().values():
            check_names(rule["expr"], exported)

    def test_say_what_to_do(self) -> None:
        """Each rule has a severity, a summary, a description, and its own section in docs/alerts.md."""
        for name, rule in read_rules().items():
            assert rule["labels"]["severity"] in {"warning", "critical"}, name
            notes = rule["annotations"]
            assert notes["summary"], name
            assert len(notes["description"]) > 60, name
            assert notes["runbook_url"] == f"docs/alerts.md#{name.lower()}"

    def test_every_alert_has_its_section(self) -> None:
        """Every alert has a section in docs/alerts.md, and every section its alert, in the same order."""
        sections = re.findall(r"^## (\S+)$", ALERTS.read_text(), re.MULTILINE)
        assert sections == list(read_rules())

    def test_sections_say_the_severity(self) -> None:
        """A section begins with the severity and the time of its rule."""
        text = ALERTS.read_text()
        for name, rule in read_rules().items():
            first = text.partition(f"## {name}\n\n*")[2].partition(".*")[0]
            assert first.startswith(rule["labels"]["severity"].capitalize()), name
            if "for" in rule:
                minutes = promql_parser.parse_duration(rule["for"]).total_seconds() / 60
                words = {1: "1 minute", 30: "half an hour"}.get(minutes, f"{minutes:g} minutes")
                assert words in first, name

    def test_valid(self) -> None:
        """promtool accepts the rules and the configuration."""
        for what, path in (("rules", RULES), ("config", RULES.with_name("prometheus.yaml"))):
            done = subprocess.run(
                [tool("promtool"), "check", what, str(path)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr

    def test_shortened_in_all_their_times(self) -> None:
        """The test of the alerts changes the times of a rule, each of them, and nothing else."""
        rule = {"expr": 'max by (job) (a_seconds{sort!="x"}) > 300', "for": "5m", "alert": "A"}
        assert shortened(rule) == {
            "expr": 'max by (job) (a_seconds{sort!="x"}) > 5', "for": "5000ms", "alert": "A",
        }  # fmt: skip
        rate = {"expr": "rate(a_seconds_bucket[5m]) > 0.25", "alert": "A"}
        assert shortened(rate) == {"expr": "rate(a_seconds_bucket[5000ms]) > 0.25", "alert": "A"}
        of_age = [r for r in read_rules().values() if re.search(r"_seconds\b", r["expr"])]
        changed = [
            r for r in of_age if shortened(r)["expr"].split(">")[-1] != r["expr"].split(">")[-1]
        ]
        assert len(changed) == 4


class TestDashboard:
    def test_names_what_is_exported(self, exported: Exported) -> None:
        """Every metric and label in the dashboard exists in what a real worker or host exports."""
        expressions = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
        assert len(expressions) > 30
        for expression in expressions:
            check_names(expression, exported)

    def test_shows_what_there_is(self, exported: Exported) -> None:
        """Whatever is exported is on the dashboard, or is a detail of something that is."""
        shown = {
            name.removesuffix("_bucket")
            for panel in panels()
            for target in panel.get("targets", ())
            for name, _ in selectors(target["expr"])
        }
        details = {
            "agent_reconciler_ready", "agent_reconciler_workers", "agent_reconciler_outbox_problems",
            "agent_reconciler_outbox_spilled_events", "agent_reconciler_outbox_dropped_events",
            "agent_reconciler_host_spilled_events", "agent_reconciler_host_events_sent_again_total",
            "agent_reconciler_host_resources",
        }  # fmt: skip
        assert exported.types.keys() - shown == details

    def test_panels_fit(self) -> None:
        """Panels have ids of their own, a title, and places that do not overlap."""
        taken: set[tuple[int, int]] = set()
        assert len({panel["id"] for panel in panels()}) == len(panels())
        for panel in panels():
            assert panel["title"]
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            assert max(x for x, _ in cells) < 24
            taken |= cells

    def test_is_found_by_grafana(self) -> None:
        """The provisioning files name the Prometheus that the dashboard asks, and where it is mounted."""
        (source,) = _yaml(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
        (provider,) = _yaml(PROVISIONING / "dashboards" / "agent-reconciler.yaml")["providers"]
        variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
        (chosen,) = [v for v in variables if v["type"] == "datasource"]
        assert chosen["current"]["value"] == source["uid"]
        assert source["url"] == "http://prometheus:9090"
        assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
        used = {panel["datasource"]["uid"] for panel in panels() if "datasource" in panel}
        assert used == {"${datasource}"}


class TestDocs:
    def test_tables_are_complete(self, exported: Exported) -> None:
        """docs/metrics.md lists every metric with its type and labels, and none that is not there."""
        rows = re.findall(
            r"^\| `(agent_reconciler_\w+)` \| (\w+) \|([^|]*)\| \S.*\|$", METRICS.read_text(), re.MULTILINE
        )  # fmt: skip
        told = {name: (type, set(re.findall(r"`(\w+)`", labels))) for name, type, labels in rows}
        there = {name: (type, exported.labels[name]) for name, type in exported.types.items()}
        assert told == there


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())
