"""The page in a real browser, against a real worker, with the example host leaking.

What the page shows is compared with what the command line prints; neither knows of the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from store import EventLog, connect
from store.event import NO_DIGEST, EventRow, encode
from tests.browser.conftest import TOKEN
from tests.e2e.programs import NAMESPACE, Cli, HostProgram, Program, eventually, http_of

pytestmark = pytest.mark.xdist_group("browser")

Open = Callable[..., Page]
Start = Callable[..., Program]

# Idle sessions are orphans at once, and stay: their teardown fails, and is not tried again for long.
STUBBORN = {"session_idle_timeout": 1, "backoff": 600, "backoff_max": 600}

TALK = """
import asyncio
ids = []
for number, topic in enumerate(topics):
    id = await service.open_chat(f"user-{number % 3}", topic)
    ids.append(id)
    for turn in range(1 + number % 4):
        async with host.acquire(f"session/{id}"):
            await service.send(id, "hello")
        await asyncio.sleep(pause)
    if number % 3 == 0:
        service.save_recovery(id)
    if number % 4 == 3:
        service.restart_agent(topic)
return ids
"""
BREAK = """
async def broken(id):
    raise RuntimeError("the vector store does not answer")
kept["forget"], service.forget_chat = service.forget_chat, broken
kept["busy"] = host.acquire("session/" + ids[0])
await kept["busy"].__aenter__()
"""
MEND = "service.forget_chat = kept['forget']"


def iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")


def tiles(page: Page) -> dict[str, int]:
    """Kind -> count, as the page shows it."""
    shown = page.locator("#tiles .tile")
    return {
        one.locator(".tile-kind").inner_text(): int(
            one.locator(".tile-count").inner_text().replace(",", "")
        )
        for one in shown.all()
    }


def per_process(page: Page) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = page.locator("#processes tbody tr").evaluate_all(
        """rows => Object.fromEntries(rows.map(row => [row.dataset.process, Object.fromEntries(
            [...row.querySelectorAll('[data-kind]')].map(c => [c.dataset.kind, Number(c.dataset.count)])
              .filter(([, count]) => count > 0))]))"""
    )
    return found


def listed(page: Page, **attributes: str) -> set[tuple[str, str]]:
    """(resource, entry) of the rows in the dialog's list."""
    rows: list[dict[str, str]] = page.locator("#dialog .found-list li").evaluate_all(
        "rows => rows.map(row => ({...row.dataset}))"
    )
    return {
        (row["ref"], row["entry"])
        for row in rows
        if all(row[name] == value for name, value in attributes.items())
    }


class World:
    """A host that leaks, a worker that cannot clean it up, and what happened when."""

    def __init__(self, chat: HostProgram, cli: Cli, start: Start, token_file: str) -> None:
        self.chat, self.cli = chat, cli
        ids = chat.do(TALK, topics=["chess", "birds", "music", "chess"], pause=0.01)
        self.early_ms: int = cli.json("replay")["at_ms"]
        ids += chat.do(TALK, topics=["travel", "birds", "music", "chess"] * 2, pause=0.02)
        chat.do(BREAK, ids=ids)
        self.ids: list[str] = ids
        self.worker = start("--token-file", token_file, policy=STUBBORN)
        self.address = http_of(self.worker)
        eventually(self.all_failed, "every idle session was tried once")

    def all_failed(self) -> bool:
        with contextlib.suppress(urllib.error.URLError):
            with urllib.request.urlopen(self.address + "/api/drift", timeout=10) as answer:
                rows = json.load(answer)["rows"]
            return sum(row["failures"] == 1 for row in rows) == len(self.ids) - 1
        return False

    def sessions(self) -> set[str]:
        return {f"session/{id}" for id in self.chat.do("return list(service.chats)")}


@pytest.fixture
def world(chat: HostProgram, cli: Cli, start_worker: Start, token_file: str) -> World:
    return World(chat, cli, start_worker, token_file)


class TestLooking:
    def test_page_agrees_with_the_command_line(
        self, world: World, open_page: Open, artefacts: Path
    ) -> None:
        """Counts, drift, a past moment and a chain of events are those of the command line."""
        page = open_page(world.address)
        self.counts(page, world)
        self.past(page, world)
        self.chain(page, world)
        self.updates(page, world)
        self.keyboard(page)
        self.pictures(world, open_page, artefacts)

    def counts(self, page: Page, world: World) -> None:
        status: dict[str, Any] = {}

        def same() -> bool:
            status.update(world.cli.json("status"))
            return tiles(page) == status["resources"] and per_process(page) == {
                p["process"]: p["resources"] for p in status["processes"]
            }

        eventually(same, "the counts are those of `status --json`")
        assert status["drift"]["orphans"] == len(world.ids) - 1
        drift = page.locator("#drift tbody tr")
        expect(drift).to_have_count(sum(status["drift"].values()))
        assert set(drift.evaluate_all("rows => rows.map(r => r.dataset.state)")) == {"retrying"}
        expect(drift.first).to_contain_text("the vector store does not answer")

    def past(self, page: Page, world: World) -> None:
        slider = page.locator("#slider")
        first = int(slider.get_attribute("data-first") or 0)
        slider.fill(str(world.early_ms - first))
        replay = world.cli.json("replay", "--at", iso(world.early_ms))
        self.shows(page, replay)
        expect(page.locator("#moment-shown")).to_contain_text(
            iso(world.early_ms).replace("T", " ").removesuffix("+00:00")
        )
        off = page.locator("#rows .line.off").count()
        assert off > 0
        # An entry of the log is a moment as well, down to the entry.
        entry = world.cli.log("--resource", f"session/{world.ids[6]}")[0]["id"]
        page.fill("#moment-text", entry)
        page.press("#moment-text", "Enter")
        self.shows(page, world.cli.json("replay", "--at", entry))
        page.fill("#moment-text", "2199-01-01T00:00:00")
        page.press("#moment-text", "Enter")
        expect(page.locator("#moment-error")).to_contain_text("is in the future")
        page.click("#now")
        expect(page.locator("#moment-error")).to_be_hidden()
        eventually(lambda: tiles(page) == world.cli.json("status")["resources"], "now is back")

    def shows(self, page: Page, replay: dict[str, Any]) -> None:
        expected: dict[str, dict[str, int]] = {p: {} for p in replay["processes"]}
        for one in replay["alive"]:
            of = expected[one["process"]]
            kind = one["ref"].partition("/")[0]
            of[kind] = of.get(kind, 0) + 1
        assert replay["alive"]
        eventually(lambda: per_process(page) == expected, "the moment is that of `replay --at`")
        expect(page.locator("#alive-note")).to_have_attribute(
            "data-total", str(len(replay["alive"]))
        )

    def chain(self, page: Page, world: World) -> None:
        ref = f"session/{world.ids[1]}"
        page.fill("#find", world.ids[1])
        page.select_option("#of-kind", "session")
        expect(page.locator("#timeline-note")).to_have_attribute("data-shown", "1")
        bar = page.locator(f'#rows [data-ref="{ref}"]')
        expect(bar.locator("path.mark")).to_have_count(1)
        bar.click()
        expect(page.locator("#chain-title")).to_have_text(ref)
        told = world.cli.log("--resource", ref)
        expect(page.locator("#chain .event")).to_have_count(len(told))
        shown = page.locator("#chain .event").evaluate_all("all => all.map(e => e.dataset.id)")
        assert shown == [event["id"] for event in told]
        # What ended shows why at its end.
        page.fill("#find", "")
        page.select_option("#of-kind", "runner")
        page.select_option("#of-state", "ended")
        ended = page.locator("#rows [role=option]:visible").first
        expect(ended.locator(".reason")).to_contain_text("removed from its registry")
        page.select_option("#of-kind", "")
        page.select_option("#of-state", "")

    def updates(self, page: Page, world: World) -> None:
        before = tiles(page)["session"]
        world.chat.do("await service.open_chat('late', 'chess')")
        expect(page.locator('#tiles [data-kind="session"]')).to_have_attribute(
            "data-count", str(before + 1)
        )

    def keyboard(self, page: Page) -> None:
        page.locator("#slider").focus()
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#now")).to_have_attribute("aria-pressed", "false")
        before = page.locator("#moment-shown").inner_text()
        page.keyboard.press("Shift+ArrowLeft")
        assert page.locator("#moment-shown").inner_text() != before
        page.locator("#now").focus()
        page.keyboard.press("Space")
        expect(page.locator("#moment-shown")).to_have_text("Now")
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        page.locator("#rows").focus()
        for key in ("ArrowDown", "End", "Home", "ArrowDown"):
            page.keyboard.press(key)
        active = page.locator("#rows").get_attribute("aria-activedescendant")
        wanted = page.locator(f"#{active}")
        expect(wanted).to_have_attribute("role", "option")
        ref = wanted.get_attribute("data-ref")
        page.keyboard.press("Enter")
        expect(page.locator("#chain-title")).to_have_text(ref or "")
        assert page.evaluate("document.activeElement.id") == "chain"
        button = page.locator("#processes button").first
        button.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#token")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator("#dialog")).not_to_be_visible()
        expect(button).to_be_focused()
        names = page.locator("button, input, select").evaluate_all(
            """all => all.filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length))
                 .map(e => e.outerHTML)"""
        )
        assert names == []

    def pictures(self, world: World, open_page: Open, artefacts: Path) -> None:
        wide = {"width": 1360, "height": 1420}
        for name, scheme, size in (
            ("light", "light", wide),
            ("dark", "dark", wide),
            ("narrow", "light", {"width": 390, "height": 844}),
        ):
            page = open_page(world.address, viewport=size, color_scheme=scheme)
            page.locator(f'#rows [data-ref="session/{world.ids[1]}"]').click()
            expect(page.locator("#chain .event-cleanup_failed")).to_be_visible()
            over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert over <= 0, f"{name}: {over} px wider than the window"
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=artefacts / f"page-{name}.png", full_page=name == "narrow")
            page.close()


MANY = 10_000


def bulk(process: str, count: int) -> list[EventRow]:
    """A process with many resources, a tenth of them ended, most of them used."""
    rows = [EventRow("process_started", f"process/{process}", process, 1)]
    kinds = ("session", "runner", "agent", "http_client")

    def say(type: str, ref: str, **more: Any) -> None:
        rows.append(EventRow(type, ref, process, len(rows) + 1, **more))

    for number in range(count):
        ref = f"{kinds[number % len(kinds)]}/{process.partition('@')[0]}-{number:05d}"
        say("created", ref)
        if number % 3:
            say("reused", ref)
        if number % 10 == 0:
            say("cleaned_up", ref, reason="no longer needed")
    return rows


async def write(url: str, namespace: str, processes: list[str], each: int) -> None:
    async with connect(url) as store:
        log = EventLog(store, namespace)
        for process in processes:
            digest, payloads = NO_DIGEST, []
            for row in bulk(process, each):
                payload, digest = encode(row, digest)
                payloads.append(payload)
            for first in range(0, len(payloads), 1000):
                await log.append_encoded(process, first + 1, payloads[first : first + 1000])


@pytest.fixture
def many(url: str) -> list[str]:
    """Ten thousand resources in four processes, in the log before anybody looks."""
    processes = [f"svc{n}@host:1:{n + 1}" for n in range(4)]
    asyncio.run(write(url, NAMESPACE, processes, MANY // len(processes)))
    return processes


class TestManyResources:
    def test_ten_thousand_stay_usable(
        self, many: list[str], start_worker: Start, open_page: Open, capsys: Any
    ) -> None:
        """With 10,000 resources the page opens, scrolls, filters and takes the keyboard at once."""
        worker = start_worker(policy={"session_idle_timeout": 3600})
        began = time.monotonic()
        page = open_page(http_of(worker))
        note = page.locator("#timeline-note")
        expect(note).to_have_attribute("data-shown", str(MANY), timeout=20_000)
        opened = time.monotonic() - began
        assert page.locator("#rows .line").count() < 100
        frames: list[float] = page.evaluate(
            """async () => {
                const box = document.getElementById('scroller'), times = [];
                const frame = () => new Promise(requestAnimationFrame);
                for (let step = 0; step < 60; step += 1) {
                    const began = performance.now();
                    box.scrollTop = (box.scrollHeight * step) / 60;
                    await frame(); await frame();
                    times.push(performance.now() - began);
                }
                return times;
            }"""
        )
        page.locator("#rows").focus()
        page.keyboard.press("End")
        expect(page.locator("#rows .line.active")).to_be_visible()
        began = time.monotonic()
        page.fill("#find", "svc2-00017")
        expect(note).to_have_attribute("data-shown", "1")
        filtered = time.monotonic() - began
        page.fill("#find", "")
        page.select_option("#of-state", "ended")
        expect(note).to_have_attribute("data-shown", str(MANY // 10))
        assert set(tiles(page)) == {"session", "runner", "agent", "http_client"}
        assert sum(tiles(page).values()) == MANY - MANY // 10
        middle = statistics.median(frames)
        with capsys.disabled():
            print(
                f"\n10,000 resources: open in {opened:.1f} s, a scroll step {middle:.0f} ms "
                f"(worst {max(frames):.0f}), a filter {filtered * 1000:.0f} ms"
            )
        assert opened < 15
        assert middle < 200
        assert filtered < 3


class TestReconciling:
    def test_dry_run_lists_what_the_real_run_removes(
        self, world: World, open_page: Open, artefacts: Path
    ) -> None:
        """A wrong token changes nothing; the dry run neither; the real run does what it listed."""
        world.chat.do(MEND)
        before, events = world.sessions(), len(world.cli.log())
        busy = f"session/{world.ids[0]}"
        page = open_page(world.address)
        page.locator("#processes button").first.click()
        page.fill("#token", "not-the-token")
        page.keyboard.press("Enter")
        expect(page.locator("#dialog-error")).to_contain_text("Nothing was changed")
        assert page.evaluate("sessionStorage.length") == 0
        assert (world.sessions(), len(world.cli.log())) == (before, events)

        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#carry-out")).to_be_focused(timeout=20_000)
        planned = listed(page, waits="")
        sessions = {ref for ref, entry in planned if not entry}
        assert sessions == before - {busy}
        assert {entry.partition("[")[0] for _, entry in planned} == {"", "_agent_sessions"}
        assert (world.sessions(), len(world.cli.log())) == (before, events)
        page.screenshot(path=artefacts / "page-dry-run.png")

        page.keyboard.press("Enter")
        expect(page.locator('#dialog[data-step="done"]')).to_be_visible(timeout=30_000)
        assert listed(page, list="torn_down") == planned
        assert world.sessions() == {busy}
        page.keyboard.press("Enter")
        expect(page.locator("#dialog")).not_to_be_visible()
        expect(page.locator("#drift tbody tr")).to_have_count(0)
        # The token is not asked for again in this tab.
        page.locator("#reconcile-all").click()
        expect(page.locator("#dialog-body")).to_contain_text("nothing to do", timeout=20_000)
