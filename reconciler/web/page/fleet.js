// What is alive, by kind and by process: now, or at the moment that the slider shows.

import { $, cell, el, head, replace, row } from "./dom.js";
import { clock, colourOf, count, number, processName, size, span, stamp } from "./format.js";

const byCount = (resources) => Object.keys(resources).sort((a, b) => resources[b] - resources[a] || a.localeCompare(b));

export function renderFleet(fleet, then, onReconcile) {
  const shown = then ?? fleet;
  const kinds = byCount(shown.resources);
  renderTiles(shown.resources, kinds);
  const total = Object.values(shown.resources).reduce((a, b) => a + b, 0);
  const when = then ? `at ${stamp(then.at_ms)} UTC` : "";
  $("alive-note").textContent = `${count(total, "resource")} in ${count(shown.processes.length, "process", "processes")} ${when}`;
  $("alive-note").dataset.total = total;
  $("reconcile-all").disabled = Boolean(then) || shown.processes.length === 0;
  renderProcesses(shown, kinds, fleet.now_ms, Boolean(then), onReconcile);
}

function renderTiles(resources, kinds) {
  replace($("tiles"), kinds.map((kind) => el("li", { class: `tile ${colourOf(kind)}`, "data-kind": kind, "data-count": resources[kind] },
    el("span", { class: "tile-count" }, number(resources[kind])),
    el("span", { class: "tile-kind" }, kind))));
  $("tiles").hidden = kinds.length === 0;
}

function renderProcesses(shown, kinds, now, past, onReconcile) {
  const table = $("processes");
  table.hidden = shown.processes.length === 0;
  const columns = [head("process"), head(past ? "since" : "up", true), ...kinds.map((kind) => head(kind, true))];
  if (!past) columns.push(head("in use", true), head("memory", true), head("files", true), head("unsent", true), head(""));
  replace(table.tHead, [row(...columns)]);
  replace(table.tBodies[0], shown.processes.map((process) => {
    const [name, rest] = processName(process.process);
    const cells = [
      el("th", { role: "rowheader", scope: "row" }, el("span", { class: "strong" }, name), el("span", { class: "quiet" }, rest)),
      cell(past ? "since" : "up", past ? clock(process.started_ms) : span(now - process.started_ms)),
      ...kinds.map((kind) => {
        const made = cell(kind, process.resources[kind] ? number(process.resources[kind]) : "–");
        made.dataset.kind = kind;
        made.dataset.count = process.resources[kind] ?? 0;
        return made;
      }),
    ];
    if (!past) {
      cells.push(cell("in use", number(process.in_use)), cell("memory", size(process.rss)),
        cell("files", process.fds === null ? "–" : number(process.fds)), cell("unsent", process.outbox === null ? "–" : number(process.outbox)),
        cell("", el("button", {
          type: "button", class: "button small", "data-key": `reconcile ${process.process}`,
          "aria-label": `Reconcile ${process.process}`, onclick: () => onReconcile(process.process),
        }, "Reconcile…")));
    }
    const made = row(...cells);
    made.dataset.process = process.process;
    return made;
  }));
}

export function renderFooter(fleet) {
  const workers = Object.entries(fleet.workers);
  const parts = [workers.length ? count(workers.length, "worker") : "no worker has been heard of yet"];
  if (fleet.unheld_partitions) parts.push(`${count(fleet.unheld_partitions, "partition")} held by nobody`);
  parts.push(`${count(fleet.events, "event")} in the log`);
  if (fleet.processes_lost) parts.push(`${count(fleet.processes_lost, "process", "processes")} lost`);
  const quarantined = Object.keys(fleet.quarantined).length;
  if (quarantined) parts.push(`${count(quarantined, "malformed entry", "malformed entries")} set aside`);
  $("footer").textContent = `Read by ${fleet.worker} · ${parts.join(" · ")}`;
}
