"""The OpenAPI 3.1 document, made from the list of operations and the shapes they speak of."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from reconciler.web.api import Operation
from reconciler.web.errors import Failure
from reconciler.web.shapes import Health, Readiness
from reconciler.web.stream import Tick

_REF = "#/components/schemas/{name}"
_JSON = "application/json"


def document(operations: Iterable[Operation]) -> dict[str, Any]:
    """The document of an API.

    Args:
        operations: everything that answers with JSON; health, metrics and the stream are added.
    """
    listed = tuple(operations)
    answers = [Failure, Health, Readiness, Tick, *(one.answers for one in listed)]
    _, schemas = msgspec.json.schema_components(answers, ref_template=_REF)
    paths = {one.path: _path(one, schemas) for one in listed}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agent-reconciler worker",
            "version": _version(),
            "description": "Every worker answers for the whole fleet. Times are Redis time in ms "
            "since 1970. Whatever is not a success has a body of the shape Failure.",
        },
        "paths": paths | _others(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _path(one: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": one.path.rpartition("/")[2],
        "summary": one.summary,
        "responses": {
            "200": _answer("the answer", one.answers.__name__),
            **{str(status): _answer(why, "Failure") for status, why in one.faults},
            "default": _answer("anything else that went wrong", "Failure"),
        },
    }
    if one.body is None:
        operation["parameters"] = _parameters(one)
        return {"get": operation}
    schemas[one.body.__name__] = one.body.model_json_schema()
    operation["requestBody"] = {"required": True, "content": _content(one.body.__name__)}
    operation["security"] = [{"token": []}]
    return {"post": operation}


def _parameters(one: Operation) -> list[dict[str, Any]]:
    schema = one.query.model_json_schema()
    required = schema.get("required", [])
    return [
        {
            "name": name,
            "in": "query",
            "required": name in required,
            "description": member.pop("description", ""),
            "schema": member,
        }
        for name, member in schema.get("properties", {}).items()
    ]


def _content(name: str) -> dict[str, Any]:
    return {_JSON: {"schema": {"$ref": _REF.format(name=name)}}}


def _answer(why: str, name: str) -> dict[str, Any]:
    return {"description": why, "content": _content(name)}


def _get(summary: str, responses: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": responses}}


def _text(why: str, kind: str) -> dict[str, Any]:
    return {"description": why, "content": {kind: {"schema": {"type": "string"}}}}


def _others() -> dict[str, Any]:
    return {
        "/healthz": _get("Does the process run", {"200": _answer("it does", "Health")}),
        "/readyz": _get(
            "Can it be relied on",
            {
                "200": _answer("it can", "Readiness"),
                "503": _answer("not now, for these reasons", "Readiness"),
            },
        ),
        "/metrics": _get("For Prometheus", {"200": _text("counters and gauges", "text/plain")}),
        "/api/stream": _get(
            "Server-sent events of the name `tick`, each with a Tick, when something changed",
            {
                "200": _text("the stream; see the schema Tick", "text/event-stream"),
                "503": _answer("too many streams are open; see Retry-After", "Failure"),
            },
        ),
        "/api/openapi.json": _get(
            "This document",
            {
                "200": {
                    "description": "OpenAPI 3.1",
                    "content": {_JSON: {"schema": {"type": "object", "required": ["openapi"]}}},
                }
            },
        ),
    }


def _version() -> str:
    try:
        return version("agent-reconciler")
    except PackageNotFoundError:  # Run from a folder that was never installed.
        return "0"
