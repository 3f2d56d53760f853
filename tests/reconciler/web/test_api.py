"""The JSON API: what it says is true, described, and clear when it cannot answer."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry as Schemas
from referencing import Resource
from referencing.jsonschema import DRAFT202012

from adapters import Host, Registry
from reconciler import Policy
from reconciler.web import Access, app, view
from store import EventLog, Store, connect
from store.namespace import open_namespace
from tests.reconciler.web.conftest import BEARER, TOKEN, Answer, Start, Worker, worker
from tests.support import batch, event, eventually


class Thing:
    """What a registry holds."""


def check(document: dict[str, Any], path: str, answer: Answer, method: str = "get") -> None:
    """Holds an answer against the OpenAPI document."""
    told = document["paths"][path][method]["responses"]
    described = told.get(str(answer.status), told.get("default"))
    assert described, f"{path} does not tell of {answer.status}"
    schemas = Schemas().with_resource(
        "urn:api", Resource.from_contents(document, default_specification=DRAFT202012)
    )
    schema = described["content"]["application/json"]["schema"]
    whole = {"$ref": "urn:api" + schema["$ref"]} if "$ref" in schema else schema
    Draft202012Validator(whole, registry=schemas).validate(answer.body)


@pytest.fixture
def sessions(host: Host) -> Registry:
    """A registry of sessions with two in it, one of them acquired."""

    async def end(id: str, thing: Thing) -> None:
        return None

    registry: Registry = host.registry("session", name="sessions", teardown=end)
    registry["a"], registry["b"] = Thing(), Thing()
    return registry


class TestDocument:
    async def test_is_valid_openapi(self, web: Worker) -> None:
        """The document passes the model of the OpenAPI specification, and its schemas are schemas."""
        from fastapi.openapi.models import OpenAPI

        document = (await web.get("/api/openapi.json")).body
        OpenAPI.model_validate(document)
        for schema in document["components"]["schemas"].values():
            Draft202012Validator.check_schema(schema)

    async def test_lists_every_route(self, web: Worker) -> None:
        """Every path that is served, but the files of the page, is in it, with its method."""
        document = (await web.get("/api/openapi.json")).body
        served = {
            (route.resource.canonical, route.method.lower())
            for route in app.application(web.reconciler, Access(token=TOKEN)).router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
        files = {"/", *(f"/{name}" for name in app.page_files())}
        described = {
            (path, method) for path, methods in document["paths"].items() for method in methods
        }
        assert {(path, method) for path, method in served if path not in files} == described

    async def test_answers_are_as_described(self, web: Worker, sessions: Registry) -> None:
        """Each answer, of success and of failure, has the shape that the document gives it."""
        document = (await web.get("/api/openapi.json")).body
        await eventually(lambda: _sees(web, "session/a"))
        for path, query in (
            ("/healthz", ""), ("/readyz", ""), ("/api/fleet", ""), ("/api/timeline", ""),
            ("/api/drift", ""), ("/api/moment", "?at=2026-01-01T00:00:00"),
            ("/api/events", "?resource=session/a"),
            ("/api/moment", "?at=nonsense"), ("/api/events", "?resource=session/zzz"),
            ("/api/timeline", "?limit=x"), ("/api/drift", "?limit=0"), ("/api/fleet", "?x=1"),
        ):  # fmt: skip
            check(document, path, await web.get(path + query))
        check(document, "/api/reconcile", await web.post({}), "post")
        check(document, "/api/reconcile", await web.post({"process": "nobody"}), "post")
        check(document, "/api/reconcile", await web.post({}, {}), "post")


async def _sees(web: Worker, ref: str) -> bool:
    page = (await web.get("/api/timeline")).body
    return ref in {one["ref"] for one in page.get("lifetimes", [])}


class TestWholeFleet:
    async def test_worker_that_holds_nothing_shows_everything(
        self, start: Start, sessions: Registry
    ) -> None:
        """Whichever worker is asked shows the whole fleet, and reconciles through the one that acts."""
        acting = await start()
        await eventually(lambda: acting.reconciler.partitions)
        idle = await start(acts=False)
        assert idle.reconciler.partitions == []
        await eventually(lambda: _sees(idle, "session/b"))
        fleet = (await idle.get("/api/fleet")).body
        assert fleet["resources"] == {"session": 2}
        assert fleet["unheld_partitions"] == 0
        (process,) = fleet["processes"]
        assert (process["spilled"], process["dropped"], process["outbox_problem"]) == (0, 0, "")
        result = await idle.post({"process": "svc", "dry_run": False})
        assert result.status == 200
        assert result.body["dry_run"] is False

    async def test_reading_changes_nothing(self, start: Start, sessions: Registry) -> None:
        """Looking leaves no event, no lease and no order behind."""
        idle = await start(acts=False)
        await eventually(lambda: _sees(idle, "session/b"))
        before = await idle.reconciler.log.length()
        for path in ("/api/fleet", "/api/drift", "/api/timeline", "/api/events?resource=session/a"):
            assert (await idle.get(path)).status == 200
        assert await idle.reconciler.log.length() == before
        assert idle.view.leases == {}
        rows = (await idle.get("/api/fleet")).body
        assert rows["unheld_partitions"] == idle.reconciler.namespace.partitions

    async def test_view_is_dropped_when_nobody_looks(
        self, web: Worker, sessions: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Some time after the last look nothing of the fleet is kept, and the next look sees it again."""
        await eventually(lambda: _sees(web, "session/a"))
        monkeypatch.setattr(view, "IDLE_SECONDS", 0.0)
        await eventually(lambda: len(web.view.lifetimes) == 0, timeout=15)
        assert web.view.tail.state.processes == {}
        monkeypatch.setattr(view, "IDLE_SECONDS", 60.0)
        await eventually(lambda: _sees(web, "session/a"))

    async def test_remembers_what_ended_before_a_snapshot(self, web: Worker, log: EventLog) -> None:
        """The fold begins with a snapshot; the timeline has what ended before it all the same, once."""
        await log.append(batch(1, 3))
        await log.append([event(4, "cleaned_up", "session/s1", reason="idle")])
        tail = web.reconciler.tail
        await eventually(lambda: "p" in tail.state.processes and tail.state.events == 4)
        partition = web.reconciler.namespace.partition_of("p")
        await web.reconciler.housekeeping.keep(partition)
        await log.append([event(5, "reused", "session/s2")])
        await eventually(lambda: _sees(web, "session/s2"))
        assert web.view.tail.begun[partition] == 4
        page = (await web.get("/api/timeline")).body
        lives = {one["ref"]: (one["reason"], one["use_count"]) for one in page["lifetimes"]}
        assert lives == {
            "session/s1": ("idle", 0), "session/s2": (None, 1), "session/s3": (None, 0),
        }  # fmt: skip
        assert page["complete_since_ms"] == 0


class TestDrift:
    async def test_with_what_is_done(self, start: Start, host: Host) -> None:
        """Each piece of drift says what is being done: tried again when, left alone why, or by nobody."""

        async def fail(id: str, thing: Thing) -> None:
            raise RuntimeError("no answer")

        registry = host.registry("session", name="sessions", teardown=fail)
        policy = Policy(session_idle_timeout=0.05, backoff=600, backoff_max=600)
        worker = await start(policy)
        registry["a"] = Thing()

        async def failed() -> Any:
            rows = (await worker.get("/api/drift")).body.get("rows")
            return rows if rows and rows[0]["failures"] == 1 else None

        (one,) = await eventually(failed, timeout=10)
        assert (one["sort"], one["ref"], one["state"]) == ("orphan", "session/a", "retrying")
        assert "no answer" in one["doing"]
        assert one["next_ms"] > 0
        dry = (await worker.post({})).body
        assert [row["ref"] for row in dry["orphans"]] == ["session/a"]
        assert dry["torn_down"] == []


class TestMoments:
    async def test_past_moment(self, web: Worker, log: EventLog) -> None:
        """A moment shows what was alive then, by time and by entry, one page at a time."""
        await log.append(batch(1, 5))
        entry = [e.id async for e in log.read()][2]
        then = (await web.get(f"/api/moment?at={entry}&limit=2&offset=1")).body
        assert then["resources"] == {"session": 3}
        assert (then["total"], [one["ref"] for one in then["alive"]]) == (
            3,
            ["session/s2", "session/s3"],
        )
        before = int(entry.partition("-")[0]) - 1000
        assert (await web.get(f"/api/moment?at={before / 1000:.3f}")).body["total"] == 0

    @pytest.mark.parametrize(
        ("at", "needle"),
        [("2199-01-01", "in the future"), ("yesterday-ish", "neither a time"), ("", "at:")],
    )
    async def test_moment_that_cannot_be_meant(self, web: Worker, at: str, needle: str) -> None:
        """A time in the future, or no time at all, is a clear 400."""
        answer = await web.get(f"/api/moment?at={at}")
        assert answer.status == 400
        assert needle in answer.body["message"]


class TestChains:
    async def test_pages_of_a_long_chain(self, web: Worker, log: EventLog) -> None:
        """A long life comes in pages; together they are the whole, in order."""
        await log.append([event(n, "created" if n == 1 else "reused") for n in range(1, 26)])
        await eventually(lambda: _sees(web, "session/s"))
        seqs, after = [], "0-0"
        while after:
            page = (await web.get(f"/api/events?resource=session/s&limit=10&after={after}")).body
            seqs += [one["seq"] for one in page["events"]]
            after = page["next"]
        assert seqs == list(range(1, 26))

    async def test_same_name_in_two_processes(self, web: Worker, log: EventLog) -> None:
        """Of a name that two processes have, either one's chain can be asked for, or both."""
        for process in ("p", "q", "r"):
            await log.append([event(1, process=process), event(2, "reused", process=process)])
        await eventually(lambda: _sees(web, "session/s"))
        both = (await web.get("/api/events?resource=session/s")).body["events"]
        assert len(both) == 6
        assert both == sorted(both, key=lambda e: [int(n) for n in e["id"].split("-")])
        one = (await web.get("/api/events?resource=session/s&process=q")).body["events"]
        assert {e["process"] for e in one} == {"q"}

    async def test_unknown_id_offers_the_nearest(self, web: Worker, log: EventLog) -> None:
        """An id that does not exist is a 404 with the ones that may have been meant."""
        names = ["session/weather-1", "session/weather-2", "runner/chess"]
        await log.append([event(n, ref=ref) for n, ref in enumerate(names, 1)])
        await eventually(lambda: _sees(web, "runner/chess"))
        answer = await web.get("/api/events?resource=session/wether-1")
        assert (answer.status, answer.body["error"]) == (404, "unknown_resource")
        assert answer.body["nearest"][0] == "session/weather-1"
        assert "session/weather-1" in answer.body["message"]


class TestBadInput:
    @pytest.mark.parametrize(
        ("body", "needle"),
        [
            ({"dry_run": "yes"}, "dry_run"),
            ({"dryrun": True}, "dryrun: there is no such member"),
            ({"process": 7}, "process"),
            ([], "the body"),
            ("process", "the body"),
        ],
    )
    async def test_body_of_the_wrong_shape(self, web: Worker, body: Any, needle: str) -> None:
        """A body of the wrong shape is a 400 that names the member, and nothing is done."""
        answer = await web.post(body)
        assert (answer.status, answer.body["error"]) == (400, "bad_request")
        assert needle in answer.body["message"]

    async def test_bodies_that_are_not_json_or_too_large(self, web: Worker) -> None:
        """Broken JSON and a huge body are refused without being understood."""
        kind = {**BEARER, "Content-Type": "application/json"}
        broken = await web.send("POST", "/api/reconcile", data="{", headers=kind)
        assert broken.status == 400
        huge = await web.send("POST", "/api/reconcile", data=b"[" * 100_000, headers=kind)
        assert (huge.status, huge.body["error"]) == (413, "too_large")

    @pytest.mark.parametrize(
        ("path", "status"),
        [
            ("/nowhere", 404),
            ("/../../etc/passwd", 404),
            ("/page/index.html", 404),
            ("/api/reconcile", 405),
            ("/api/timeline?limit=0", 400),
            ("/api/timeline?after=-1", 400),
            ("/api/timeline?limit=1&limit=2", 400),
            ("/api/events", 400),
            ("/api/events?resource=nonsense", 400),
            ("/api/events?resource=a/b&after=x", 400),
            ("/api/fleet?since=1", 400),
        ],
    )
    async def test_requests_that_cannot_be_meant(self, web: Worker, path: str, status: int) -> None:
        """Each is a JSON answer with a word for programs and a sentence for people."""
        answer = await web.get(path)
        assert answer.status == status
        assert set(answer.body) >= {"error", "message"}

    async def test_unknown_process(self, web: Worker, host: Host) -> None:
        """Reconciling a process that is not alive is a 404 that names the live ones."""
        answer = await web.post({"process": "chatt"})
        assert (answer.status, answer.body["error"]) == (404, "unknown_process")
        assert host.process in answer.body["message"]

    async def test_no_worker_answers(
        self, start: Start, host: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When nobody holds the partition the request ends with a 503 that says what to do."""
        monkeypatch.setattr("reconciler.request.ANSWER_SECONDS", 0.2)
        answer = await (await start(acts=False)).post({})
        assert (answer.status, answer.body["error"]) == (503, "no_answer")
        assert "Retry-After" in answer.headers


class TestStreams:
    async def test_tells_of_changes(self, web: Worker, log: EventLog) -> None:
        """A stream says at once that something is new, and what is asked for then has it."""
        async with web.session.get(web.address + "/api/stream") as stream:
            assert stream.content_type == "text/event-stream"
            before = (await _tick(stream))["timeline"]
            await log.append([event(1)])
            while (tick := await _tick(stream))["timeline"] == before:
                pass
            assert await _sees(web, "session/s")
            assert tick["trouble"] == ""

    async def test_thousand_clients(self, web: Worker, sessions: Registry) -> None:
        """Of 1,000 streams a bounded number is served, the others get a 503 with Retry-After at once,
        and the worker goes on with its work; when clients go, others may come."""
        await web.get("/api/fleet")

        async def open_one() -> Any:
            return await web.session.get(web.address + "/api/stream")

        opened = await asyncio.gather(*(open_one() for _ in range(1000)))
        statuses = [answer.status for answer in opened]
        assert (statuses.count(200), statuses.count(503)) == (200, 800)
        refused = next(answer for answer in opened if answer.status == 503)
        assert refused.headers["Retry-After"] == "15"
        assert (await refused.json())["error"] == "too_many_streams"
        assert (await web.get("/healthz")).status == 200
        sessions["late"] = Thing()
        await eventually(lambda: _sees(web, "session/late"))
        assert (await web.post({})).status == 200
        for answer in opened:
            answer.close()
        await eventually(lambda: web.view.watchers == 0, timeout=20)
        async with web.session.get(web.address + "/api/stream") as again:
            assert again.status == 200

    async def test_end_with_the_worker(self, store: Store, namespace: str) -> None:
        """A worker that stops ends its streams; nothing waits for a page that is left open."""
        async with worker(store, namespace) as web:
            stream = await web.session.get(web.address + "/api/stream")
            await _tick(stream)
            closing = asyncio.create_task(web.view.close())
            async with asyncio.timeout(1):
                await stream.content.read()
            await asyncio.wait_for(closing, 5)


async def _tick(stream: Any) -> dict[str, Any]:
    async with asyncio.timeout(10):
        async for line in stream.content:
            if line.startswith(b"data: "):
                tick: dict[str, Any] = json.loads(line[6:])
                return tick
    raise AssertionError("the stream ended")


class TestRedisAway:
    async def test_told_and_gone_on_from(
        self, own_redis: Any, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While Redis is away the API says so; when it is back, so is the fleet."""
        monkeypatch.setattr(view, "FULL_SECONDS", 0.5)
        async with connect(own_redis.url) as store, worker(store, namespace) as web:
            await open_namespace(store, namespace)
            await EventLog(store, namespace).append([event(1)])
            await eventually(lambda: _sees(web, "session/s"))
            own_redis.kill()

            async def troubled() -> bool:
                return bool((await web.get("/api/fleet")).body.get("trouble"))

            await eventually(troubled, timeout=15)
            away = await web.get("/api/moment?at=2026-01-01")
            assert (away.status, away.body["error"]) == (503, "redis_away")
            own_redis.start()

            async def back() -> bool:
                return (await web.get("/api/fleet")).body.get("trouble") == ""

            await eventually(back, timeout=20)


class TestFilesOfThePage:
    async def test_everything_the_page_names_is_served(self, web: Worker) -> None:
        """The page and its modules name only files that this worker serves, and no other address."""
        for name, (content, _) in app.page_files().items():
            text = content.decode()
            for named in re.findall(r'(?:from|href|src)[ =]"(\.?/[\w./-]+)"', text):
                path = "/" + named.removeprefix(".").lstrip("/")
                assert (await web.get(path)).status == 200, f"{name} names {named}"
            outside = set(re.findall(r"https?://[^\"' )]+", text)) - {"http://www.w3.org/2000/svg"}
            assert outside == set(), name

    def test_no_markup_from_strings(self) -> None:
        """The modules never make markup or code out of strings."""
        folder = Path(app.__file__).parent / "page"
        for file in folder.glob("*.js"):
            for word in ("innerHTML", "insertAdjacentHTML", "outerHTML", "eval(", "document.write"):
                assert word not in file.read_text(), f"{file.name} has {word}"
