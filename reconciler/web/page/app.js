// The page: hears from the worker that something changed, asks what, and shows it.

import { Failure, get } from "./api.js";
import { showChain } from "./chain.js";
import { $, show } from "./dom.js";
import { renderDrift } from "./drift.js";
import { renderFleet, renderFooter } from "./fleet.js";
import { Moment } from "./moment.js";
import { openReconcile } from "./reconcile.js";
import { Timeline } from "./timeline.js";

const SPACING_MS = 300;
const AGAIN_MS = 3000;
const PAGE = 2000;
const state = { fleet: null, drift: null, then: null, epoch: null, after: 0, running: false, again: false };

const choose = (ref, process, focus = false) => showChain(ref, process, choose, { focus });
const timeline = new Timeline(choose);
const moment = new Moment(
  () => timeline.changes(),
  (ms) => timeline.showMoment(ms),
  (then) => {
    state.then = then;
    render();
  },
);
$("reconcile-all").addEventListener("click", () => reconcile(null));

function reconcile(process) {
  openReconcile(process, state.fleet.changes_allowed, () => refresh());
}

function render() {
  if (!state.fleet) return;
  renderFleet(state.fleet, state.then, reconcile);
  if (state.drift) renderDrift(state.drift, state.then !== null, choose);
  renderFooter(state.fleet);
  $("namespace").textContent = state.fleet.namespace;
  document.title = `${state.drift?.total ? `(${state.drift.total}) ` : ""}agent-reconciler · ${state.fleet.namespace}`;
}

function connection(kind, text) {
  $("link").className = `link ${kind}`;
  if ($("link-text").textContent !== text) $("link-text").textContent = text;
}

// Lifetimes come in pages; the same question later gives only what changed since.
async function readTimeline() {
  for (;;) {
    const page = await get("/api/timeline", { after: state.after, limit: PAGE });
    if (page.epoch !== state.epoch) {
      const begun = state.after === 0;
      Object.assign(state, { epoch: page.epoch, after: 0 });
      timeline.clear();
      if (!begun) continue;
    }
    timeline.take(page);
    state.after = page.next;
    if (!page.more) return page.now_ms;
  }
}

async function refresh() {
  if (state.running) {
    state.again = true;
    return;
  }
  state.running = true;
  state.again = false;
  try {
    const [fleet, drift] = await Promise.all([get("/api/fleet"), get("/api/drift", { limit: 100 })]);
    Object.assign(state, { fleet, drift });
    render();
    const now = Math.max(await readTimeline(), fleet.now_ms);
    moment.cover(timeline.first() ?? now - 1000, now);
    timeline.arrange(now);
    if (fleet.trouble) connection("bad", fleet.trouble);
    else connection("good", "Live");
    document.body.dataset.version = fleet.version;
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    connection("bad", failure.message);
    setTimeout(refresh, AGAIN_MS);
  } finally {
    setTimeout(() => {
      state.running = false;
      if (state.again) refresh();
    }, SPACING_MS);
  }
}

// While nobody sees the page it asks for nothing; the first look brings it up to date.
function changed() {
  if (document.hidden) state.missed = true;
  else refresh();
}
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && state.missed) {
    state.missed = false;
    refresh();
  }
});

function listen() {
  const source = new EventSource("/api/stream");
  source.addEventListener("tick", changed);
  source.addEventListener("error", () => {
    connection("bad", "The worker does not answer; trying again");
    // A browser tries again by itself, but not after a refusal: too many streams, or a restart.
    if (source.readyState === EventSource.CLOSED) {
      setTimeout(listen, AGAIN_MS);
      setTimeout(refresh, AGAIN_MS);
    }
  });
}

show($("moment-error"), "");
refresh();
listen();
