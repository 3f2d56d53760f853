"""A service with an OpenTelemetry SDK of its own, that takes instructions; see `tests.e2e.obey`.

Its spans are kept in memory, for the test to look at.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adapters import Host
from tests.e2e.obey import obey

SECRET = "what the user said"


class Sessions:
    """Sessions that requests make."""

    def __init__(self, host: Host, exporter: InMemorySpanExporter) -> None:
        self.registry = host.registry("session", teardown=self._teardown)
        self._exporter = exporter
        self._tracer = trace.get_tracer("service")

    def _teardown(self, id: str, content: str) -> None:
        if id.startswith("broken"):
            raise RuntimeError(content)

    def request(self, id: str) -> dict[str, str]:
        """One request that makes a session; its trace and span."""
        with self._tracer.start_as_current_span("POST /chat") as span:
            self.registry[id] = SECRET
            context = span.get_span_context()
        return {
            "trace": trace.format_trace_id(context.trace_id),
            "span": trace.format_span_id(context.span_id),
        }

    def spans(self) -> list[Any]:
        """The spans that have ended, as JSON."""
        return [span.to_json(indent=None) for span in self._exporter.get_finished_spans()]


async def main(url: str, namespace: str) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    async with Host.connect(url, name="traced", namespace=namespace, lease_seconds=5) as host:
        await obey({"process": host.process}, host=host, sessions=Sessions(host, exporter))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
