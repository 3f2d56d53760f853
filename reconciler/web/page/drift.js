// Drift, and what is being done about each piece of it.

import { $, cell, el, head, replace, row } from "./dom.js";
import { clock, count, processName, span } from "./format.js";

const WORDS = { due: "due", under_way: "under way", retrying: "retrying", stuck: "stuck", held: "held", nobody: "nobody" };
const SHOWN = 100;

export function renderDrift(drift, past, onChoose) {
  const table = $("drift");
  $("drift-title").parentElement.parentElement.classList.toggle("dimmed", past);
  table.hidden = drift.total === 0;
  $("drift-note").textContent = note(drift, past);
  $("drift-note").dataset.total = drift.total;
  replace(table.tHead, [row(head("sort"), head("resource"), head("process"), head("why"), head("what is done"))]);
  replace(table.tBodies[0], drift.rows.slice(0, SHOWN).map((item) => line(item, drift.now_ms, onChoose)));
}

function note(drift, past) {
  const when = past ? " This is the drift of now; the past has none to act on." : "";
  if (drift.total === 0) return `None: what is alive is what should be.${when}`;
  const more = drift.total > SHOWN ? `, the first ${SHOWN} of them below` : "";
  return `${count(drift.total, "difference")}${more}.${when}`;
}

function line(item, now, onChoose) {
  const entry = item.registry ? el("span", { class: "quiet" }, `in ${item.registry}[${item.key}]`) : null;
  const next = item.next_ms > now ? ` in ${span(item.next_ms - now)}, at ${clock(item.next_ms)}` : "";
  const key = `${item.process} ${item.ref} ${item.registry} ${item.key}`;
  const made = row(
    cell("sort", el("span", { class: `badge sort-${item.sort}` }, item.sort)),
    cell("resource", el("button", {
      type: "button", class: "as-link", "data-key": key, onclick: () => onChoose(item.ref, item.process),
    }, item.ref), entry),
    cell("process", processName(item.process)[0]),
    cell("why", item.reason.replace(/(\d) s\b/g, "$1\u00a0s")),
    cell("what is done", el("span", { class: `badge state-${item.state}` }, WORDS[item.state]), ` ${item.doing}${next}`),
  );
  made.dataset.ref = item.ref;
  made.dataset.state = item.state;
  return made;
}
