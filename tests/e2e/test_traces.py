"""From the request that made a resource to its teardown: one chain of spans and events, over two processes.

The service has an SDK of its own; the worker is started by `opentelemetry-instrument`, as docs/metrics.md
says, and writes its spans to standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.programs import NAMESPACE, Cli, HostProgram, Program, eventually, running
from tests.e2e.traced_host import SECRET
from tests.support import RedisProcess, remove_folder, short_folder

INSTRUMENT = str(Path(sys.executable).parent / "opentelemetry-instrument")
OTEL = {
    "OTEL_TRACES_EXPORTER": "console",
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_LOGS_EXPORTER": "none",
    "OTEL_SERVICE_NAME": "agent-reconciler",
}
POLICY = ("session_idle_timeout=1", "backoff=0.2")


@dataclass
class Chain:
    """What was left behind by one session that went, and one that could not.

    Attributes:
        request: trace and span of the request that made the session.
        host, worker: spans of the two processes.
        events: of the log.
    """

    request: dict[str, str]
    host: list[dict[str, Any]]
    worker: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def event(self, type: str, ref: str = "session/good") -> dict[str, Any]:
        return next(e for e in self.events if e["type"] == type and e["ref"] == ref)

    def span(
        self, where: list[dict[str, Any]], name: str, ref: str = "session/good"
    ) -> dict[str, Any]:
        (found,) = [
            one for one in where
            if one["name"] == name and one["attributes"].get("agent_reconciler.ref") == ref
        ][:1]  # fmt: skip
        return found


def spans_in(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a console exporter, which stand one after the other."""
    decoder, at = json.JSONDecoder(), 0
    while (start := text.find("{", at)) >= 0:
        found, at = decoder.raw_decode(text, start)
        yield found


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """One run for all tests; each looks at another part of what it left behind."""
    folder = tmp_path_factory.mktemp("traces")
    server = RedisProcess(short_folder())
    server.start()
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in OTEL.items():
                environment.setenv(name, value)
            yield run(server.url, folder)
    finally:
        server.kill()
        remove_folder(server.folder)


def run(url: str, folder: Path) -> Chain:
    """A request makes a session, which goes when it is idle; another one cannot go."""
    settings = [part for one in POLICY for part in ("--set", one)]
    command = [
        INSTRUMENT, sys.executable, "-m", "reconciler", "worker", "--http", "off",
        "--url", url, "--namespace", NAMESPACE, *settings,
    ]  # fmt: skip
    out = folder / "spans"
    with (
        running(HostProgram(url, folder / "host.log", module="tests.e2e.traced_host")) as host,
        running(Program(["sh", "-c", f'exec "$@" >{out}', "sh", *command], folder / "w")) as worker,
    ):
        request = host.do("return sessions.request('good')")
        host.do("sessions.request('broken')")
        eventually(lambda: "session/good" not in host.do("return [*host.entries]"), "it goes", 60)
        eventually(lambda: "teardown failed" in worker.logged, "the worker hears of the other", 60)
        spans = [json.loads(one) for one in host.do("return sessions.spans()")]
        assert worker.stop() == 0, worker.logged[-2000:]
    return Chain(request, spans, [*spans_in(out.read_text())], Cli(url).log())


def test_chain(chain: Chain) -> None:
    """request → created event → pass → order → teardown, which is linked to the request."""
    assert chain.event("created")["trace_id"] == chain.request["trace"]
    teardown = chain.span(chain.host, "teardown")
    (link,) = teardown["links"]
    assert link["context"]["trace_id"] == "0x" + chain.request["trace"]
    assert link["context"]["span_id"] == "0x" + chain.request["span"]
    order = chain.span(chain.worker, "order teardown")
    assert teardown["parent_id"] == order["context"]["span_id"]
    passes = {one["context"]["span_id"]: one for one in chain.worker if one["name"] == "pass"}
    the_pass = passes[order["parent_id"]]
    assert the_pass["parent_id"] is None
    trace = the_pass["context"]["trace_id"]
    assert {order["context"]["trace_id"], teardown["context"]["trace_id"]} == {trace}
    for type in ("cleanup_requested", "cleaned_up"):
        assert chain.event(type)["trace_id"] == trace.removeprefix("0x")
    for span in (order, teardown):
        about = span["attributes"]
        assert about["agent_reconciler.order_id"] == chain.event("cleaned_up")["order_id"]
        assert about["agent_reconciler.outcome"] == "done"
    assert order["attributes"]["agent_reconciler.cause"] == "idle"
    assert (
        order["start_time"] <= teardown["start_time"] <= teardown["end_time"] <= order["end_time"]
    )


def test_appends(chain: Chain) -> None:
    """Each batch that the host sent has a span that says how many events were in it."""
    sent = [one["attributes"] for one in chain.host if one["name"] == "append events"]
    counts = {one["agent_reconciler.first_seq"]: one["agent_reconciler.events"] for one in sent}
    following = 1
    for first, count in sorted(counts.items()):
        assert first == following
        following += count
    assert following > chain.event("cleaned_up")["seq"]


def test_failures_are_marked_without_their_words(chain: Chain) -> None:
    """A teardown that fails is an error in both spans; what the service's error says is in neither."""
    teardown = chain.span(chain.host, "teardown", "session/broken")
    order = chain.span(chain.worker, "order teardown", "session/broken")
    for span in (teardown, order):
        assert span["status"]["status_code"] == "ERROR"
        assert span["attributes"]["agent_reconciler.outcome"] == "failed"
    assert SECRET in chain.event("cleanup_failed", "session/broken")["reason"]
    assert SECRET not in json.dumps(chain.host + chain.worker)
