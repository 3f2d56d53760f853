// The dialog that reconciles: a dry run first, then for real. The token is asked for once and kept in
// sessionStorage: it is gone with the tab, and never in a URL.

import { Failure, post } from "./api.js";
import { $, el, show } from "./dom.js";
import { count, processName } from "./format.js";

const TOKEN = "agent-reconciler-token";
const FOUND = ["orphans", "dangling", "ghosts", "untracked"];
const DONE = ["torn_down", "corrected", "refused", "failed", "waiting"];
const WORDS = { torn_down: "torn down", waiting: "left for now" };
const SHOWN = 200;
let process = null;
let afterwards = () => {};

export function openReconcile(chosen, changesAllowed, onDone) {
  process = chosen;
  afterwards = onDone;
  $("dialog-title").textContent = chosen ? `Reconcile ${processName(chosen)[0]}` : "Reconcile everything";
  $("dialog-process").textContent = chosen ?? "Every process of the namespace";
  $("dialog").showModal();
  if (!changesAllowed) {
    step("off", [el("p", {}, "Nothing can be changed through this worker. Start it with --token-file, or use "),
      el("p", {}, el("code", {}, "agent-reconciler reconcile"))], [closeButton()]);
  } else if (sessionStorage.getItem(TOKEN)) dryRun();
  else askToken();
}

function step(name, body, foot, error = "") {
  $("dialog").dataset.step = name;
  $("dialog-body").replaceChildren(...body);
  $("dialog-foot").replaceChildren(...foot);
  show($("dialog-error"), error);
  $("dialog").querySelector("[autofocus]")?.focus();
}

const closeButton = (text = "Close", first = true) =>
  el("button", { type: "button", class: "button", autofocus: first, onclick: () => $("dialog").close() }, text);

function askToken(error = "") {
  const input = el("input", { id: "token", type: "password", autocomplete: "off", spellcheck: "false", required: true, autofocus: true });
  const submit = (event) => {
    event.preventDefault();
    if (!input.value.trim()) return;
    sessionStorage.setItem(TOKEN, input.value.trim());
    dryRun();
  };
  const form = el("form", { id: "token-form", class: "token-form", novalidate: true, onsubmit: submit },
    el("label", { for: "token" }, "Token of the worker"), input,
    el("p", { class: "note" }, "The one from --token-file. It is kept until this tab is closed."));
  step("token", [form], [closeButton("Cancel", false),
    el("button", { type: "submit", form: "token-form", class: "button primary" }, "Dry run")], error);
}

async function ask(dry) {
  step(dry ? "looking" : "working", [el("p", { class: "note", role: "status" },
    dry ? "Asking the hosts what they hold…" : "Tearing down, and waiting for the outcomes…")], []);
  try {
    return await post("/api/reconcile", { process, dry_run: dry }, sessionStorage.getItem(TOKEN));
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    if (failure.status === 401 || failure.error === "token_malformed") {
      sessionStorage.removeItem(TOKEN);
      askToken(`${failure.message}. Nothing was changed.`);
    } else step("failed", [], [closeButton()], failure.message);
    return null;
  }
}

async function dryRun() {
  const found = await ask(true);
  if (!found) return;
  const rows = FOUND.flatMap((name) => found[name].map((item) => ({ list: name, ...item })));
  const acted = rows.filter((item) => !item.waits);
  if (rows.length === 0) {
    step("plan", [el("p", {}, "There is nothing to do: what is alive is what should be.")], [closeButton()]);
    return;
  }
  const left = rows.length - acted.length;
  const body = [el("p", {}, `A dry run: nothing has been changed yet. ${count(acted.length, "thing")} would go` + (left ? `, ${count(left, "other")} would be left for now.` : ".")), list(rows)];
  const foot = [closeButton("Cancel", acted.length === 0)];
  if (acted.length) foot.push(el("button", { type: "button", class: "button danger", autofocus: true, id: "carry-out", onclick: carryOut }, `Carry out ${acted.length}`));
  step("plan", body, foot);
}

async function carryOut() {
  const done = await ask(false);
  if (!done) return;
  const rows = DONE.flatMap((name) => done[name].map((item) => ({ list: name, ...item })));
  const summary = DONE.filter((name) => done[name].length).map((name) => `${done[name].length} ${WORDS[name] ?? name}`).join(", ");
  step("done", [el("p", { role: "status" }, summary ? `Done: ${summary}.` : "Done: there was nothing left to do."), list(rows)], [closeButton()]);
  afterwards();
}

function list(rows) {
  const items = rows.slice(0, SHOWN).map((item) => el("li", {
    "data-list": item.list, "data-ref": item.ref, "data-entry": item.registry ? `${item.registry}[${item.key}]` : "", "data-waits": item.waits ?? "",
  },
  el("span", { class: `badge list-${item.list}` }, WORDS[item.list] ?? item.list),
  el("span", { class: "found" }, el("span", { class: "strong" }, item.ref), item.registry ? ` in ${item.registry}[${item.key}]` : "",
    el("span", { class: "quiet" }, item.waits ? `left: ${item.waits}` : item.reason))));
  if (rows.length > SHOWN) items.push(el("li", { class: "note" }, `and ${rows.length - SHOWN} more`));
  return el("ul", { class: "found-list", tabindex: "0", "aria-label": "What was found" }, ...items);
}
