"""A real Prometheus (Debian's) on loopback, and the project's alert rules with their times shortened.

All times in a rule are divided by `FACTOR`: `for`, the ranges of the expression, and what it compares an
age in seconds with. Nothing else of a rule is touched. Without Prometheus these tests are skipped, and
say so; with CI=true they fail instead, because there they have to run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.e2e.programs import ROOT, eventually
from tests.support import free_port

FACTOR = 60
RULES = ROOT / "deploy" / "prometheus" / "alerts.yaml"
_RANGE = re.compile(r"\[(\d+[smhd])\]")
_AGE = re.compile(r"(_seconds(?:\{[^}]*\})?\)) > (\d+)$")


def tool(name: str) -> str:
    """Where one of Prometheus' programs is; the test is skipped, or in CI fails, without it."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not installed (apt-get install prometheus): the alerts are NOT tested"
        if os.environ.get("CI", "").lower() in {"true", "1"}:
            pytest.fail(message)
        pytest.skip(message)
    return path


def read_rules() -> dict[str, dict[str, Any]]:
    """The alert rules as they are shipped, by name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def shortened(rule: Mapping[str, Any]) -> dict[str, Any]:
    """A rule with all its times divided by `FACTOR`."""
    expression = _RANGE.sub(lambda match: f"[{_divided(match[1])}]", rule["expr"].strip())
    expression = _AGE.sub(lambda match: f"{match[1]} > {int(match[2]) / FACTOR:g}", expression)
    waits = {"for": _divided(rule["for"])} if "for" in rule else {}
    return {**rule, "expr": expression, **waits}


def _divided(duration: str) -> str:
    return f"{promql_parser.parse_duration(duration).total_seconds() * 1000 / FACTOR:.0f}ms"


class Prometheus:
    """A running Prometheus.

    Args:
        folder: for its configuration and its data.
        jobs: scrape job -> addresses, `host:port`.
    """

    def __init__(self, folder: Path, jobs: Mapping[str, Sequence[str]]) -> None:
        program = tool("prometheus")
        folder.mkdir(parents=True, exist_ok=True)
        rules = [shortened(rule) for rule in read_rules().values()]
        (folder / "rules.yaml").write_text(
            yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]})
        )
        # Every second here is every minute at the pace of the rules.
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "500ms"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [
                {"job_name": name, "static_configs": [{"targets": list(targets)}]}
                for name, targets in jobs.items()
            ],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.address = f"127.0.0.1:{free_port()}"
        self.log = folder / "log"
        self._process = subprocess.Popen(
            [
                program, f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={self.address}",
            ],
            stdout=subprocess.DEVNULL, stderr=self.log.open("wb"),
        )  # fmt: skip
        self.began = time.time()

    def wait_until_ready(self) -> None:
        eventually(self._ready, "Prometheus starts", 60)

    def _ready(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, path: str, **parameters: object) -> Any:
        """The data of an answer of the HTTP API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(
            f"http://{self.address}/api/v1/{path}?{query}", timeout=30
        ) as a:
            return json.load(a)["data"]

    def series(self, query: str) -> list[dict[str, Any]]:
        """The labels of what a query gives now, with the value under `value`."""
        found = self.ask("query", query=query)["result"]
        return [{**one["metric"], "value": float(one["value"][1])} for one in found]

    def firing(self, job: str | None = None) -> set[str]:
        """Alerts that fire now, those of one job or all."""
        of_job = "" if job is None else f',job="{job}"'
        return {one["alertname"] for one in self.series(f'ALERTS{{alertstate="firing"{of_job}}}')}

    def ever_fired(self, job: str) -> dict[str, list[float]]:
        """Alerts of a job that fired at any time since the start: when, in seconds since then."""
        query = f'ALERTS{{alertstate="firing",job="{job}"}}'
        range_ = {"start": self.began, "end": time.time(), "step": "0.5"}
        found = self.ask("query_range", query=query, **range_)["result"]
        return {
            one["metric"]["alertname"]: [round(at - self.began, 1) for at, _ in one["values"]]
            for one in found
        }


@contextlib.contextmanager
def prometheus(folder: Path, jobs: Mapping[str, Sequence[str]]) -> Iterator[Prometheus]:
    """A Prometheus, stopped at the end."""
    made = Prometheus(folder, jobs)
    try:
        made.wait_until_ready()
        yield made
    finally:
        made.stop()
