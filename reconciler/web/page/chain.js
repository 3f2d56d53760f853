// The chain of events of one resource: what happened to it, by whom, why, and by which order.

import { Failure, get } from "./api.js";
import { $, el } from "./dom.js";
import { fine, stamp } from "./format.js";

const TYPES = {
  created: "created", adopted: "adopted", reused: "used", cleaned_up: "ended", cleanup_requested: "teardown ordered",
  cleanup_failed: "teardown failed", cleanup_refused: "teardown refused", process_started: "process started",
  process_stopped: "process stopped", process_lost: "process lost",
};
let asked = 0;

export async function showChain(ref, process, onChoose, { focus = false } = {}) {
  const mine = (asked += 1);
  const body = $("chain-body");
  $("chain-title").textContent = ref;
  $("chain").dataset.ref = ref;
  body.replaceChildren(el("p", { class: "note" }, "Reading the log…"));
  if (focus) $("chain").focus({ preventScroll: false });
  try {
    const chain = await get("/api/events", { resource: ref, process });
    if (mine !== asked) return;
    const list = el("ol", { class: "events" }, ...chain.events.map((event) => line(event, onChoose)));
    body.replaceChildren(el("p", { class: "quiet" }, process ?? ""), list);
    more(body, list, chain, ref, process, onChoose);
  } catch (failure) {
    if (mine !== asked) return;
    if (!(failure instanceof Failure)) throw failure;
    body.replaceChildren(el("p", { class: "error", role: "alert" }, failure.message),
      ...failure.nearest.map((near) => link(near, null, onChoose)));
  }
}

function more(body, list, chain, ref, process, onChoose) {
  if (!chain.next) return;
  const button = el("button", { type: "button", class: "button small", onclick: async () => {
    const next = await get("/api/events", { resource: ref, process, after: chain.next });
    button.remove();
    list.append(...next.events.map((event) => line(event, onChoose)));
    more(body, list, next, ref, process, onChoose);
  } }, "Look further");
  body.append(button);
}

const link = (ref, process, onChoose) =>
  el("button", { type: "button", class: "as-link", onclick: () => onChoose(ref, process) }, ref);

function line(event, onChoose) {
  const attrs = event.attrs ?? {};
  const facts = [];
  const fact = (name, ...value) => facts.push(el("div", {}, el("dt", {}, name), el("dd", {}, ...value)));
  const holder = event.holder ?? event.process;
  if (attrs.registry) fact("entry", `${attrs.registry}[${attrs.key}]`);
  if (event.uses?.length) fact("uses", ...event.uses.flatMap((used) => [link(used, holder, onChoose), " "]));
  if (event.owned_by) fact("owned by", link(event.owned_by, holder, onChoose));
  if (attrs.in_use !== undefined) fact("in use by", String(attrs.in_use));
  if (event.order_id) fact("order", el("code", {}, event.order_id));
  if (event.trace_id) fact("trace", el("code", {}, event.trace_id));
  fact("by", `${event.process} #${event.seq}`);
  fact("entry id", el("code", {}, event.id));
  return el("li", { class: `event event-${event.type}`, "data-id": event.id, "data-type": event.type },
    el("div", { class: "event-head" }, el("span", { class: "strong" }, TYPES[event.type] ?? event.type),
      el("time", { datetime: new Date(event.at_ms).toISOString(), title: `${stamp(event.at_ms)} UTC` }, fine(event.at_ms))),
    event.reason ? el("p", {}, event.reason) : null,
    el("details", {}, el("summary", {}, "Details"), el("dl", {}, ...facts)));
}
