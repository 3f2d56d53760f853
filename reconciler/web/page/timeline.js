// The timeline: one bar per lifetime, grouped by process. Only the rows in sight exist as elements, so
// ten thousand of them scroll like fifty. A listbox for the keyboard: arrows move, Enter chooses.

import { $, el, svg } from "./dom.js";
import { clock, colourOf, count, fine, idOf, kindOf, number, processName, span, stamp } from "./format.js";

const AHEAD = 8;
const NARROW = 640;
const ENDS = { own: "ended by its service", order: "ended by the reconciler", lost: "ended with its process" };

export class Timeline {
  constructor(onChoose) {
    this.onChoose = onChoose;
    this.lifetimes = new Map();
    this.lines = [];
    this.pool = [];
    this.active = null;
    this.chosen = null;
    this.moment = null;
    this.from = 0;
    this.to = 1;
    this.nowMs = 0;
    this.box = $("scroller");
    this.list = $("rows");
    this.box.addEventListener("scroll", () => this.later(), { passive: true });
    new ResizeObserver(() => this.later()).observe(this.box);
    for (const id of ["find", "of-process", "of-kind", "of-state", "span"]) {
      $(id).addEventListener("input", () => this.arrange());
    }
    this.list.addEventListener("click", (event) => this.clicked(event));
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("focus", () => this.active === null && this.activate(this.nextRow(-1, 1)));
  }

  clear() {
    this.lifetimes.clear();
    this.active = null;
  }

  // A page of the API. What the worker no longer keeps is not kept here either.
  take(page) {
    for (const one of page.lifetimes) this.lifetimes.set(one.n, one);
    this.completeSince = page.complete_since_ms;
    if (page.more || this.lifetimes.size <= page.kept) return;
    const ended = [...this.lifetimes.values()].filter((one) => one.ended_ms !== null).sort((a, b) => a.ended_ms - b.ended_ms);
    for (const one of ended.slice(0, this.lifetimes.size - page.kept)) this.lifetimes.delete(one.n);
  }

  // The times at which a resource appeared or went, in order: what Shift and an arrow jump along.
  changes() {
    const times = new Set();
    for (const one of this.lifetimes.values()) {
      times.add(one.created_ms);
      if (one.ended_ms !== null) times.add(one.ended_ms);
    }
    return [...times].sort((a, b) => a - b);
  }

  first() {
    let first = Infinity;
    for (const one of this.lifetimes.values()) first = Math.min(first, one.created_ms);
    return first === Infinity ? null : first;
  }

  // Chooses and orders the lines anew: after new data, or another filter.
  arrange(nowMs = this.nowMs) {
    this.nowMs = nowMs;
    const find = $("find").value.trim().toLowerCase();
    const process = $("of-process").value;
    const kind = $("of-kind").value;
    const state = $("of-state").value;
    const length = Number($("span").value);
    const begin = this.first() ?? nowMs - 1000;
    this.to = nowMs;
    this.from = length ? Math.max(nowMs - length, Math.min(begin, nowMs - 1000)) : Math.min(begin, nowMs - 1000);
    const groups = new Map();
    let kept = 0;
    for (const one of this.lifetimes.values()) {
      if (process && one.process !== process) continue;
      if (kind && kindOf(one.ref) !== kind) continue;
      if (state && (one.ended_ms === null) !== (state === "alive")) continue;
      if (find && !one.ref.toLowerCase().includes(find)) continue;
      if ((one.ended_ms ?? nowMs) < this.from) continue;
      if (!groups.has(one.process)) groups.set(one.process, []);
      groups.get(one.process).push(one);
      kept += 1;
    }
    this.lines = [];
    for (const name of [...groups.keys()].sort()) {
      const ones = groups.get(name).sort((a, b) => a.created_ms - b.created_ms || a.n - b.n);
      this.lines.push({ process: name, count: ones.length });
      ones.forEach((one) => this.lines.push({ one }));
    }
    this.options();
    const all = this.lifetimes.size;
    const left = this.completeSince ? `; what ended before ${clock(this.completeSince)} is left off` : "";
    $("timeline-note").textContent = (kept === all ? count(all, "lifetime") : `${number(kept)} of ${count(all, "lifetime")}`) + left;
    $("timeline-note").dataset.shown = kept;
    this.positions = new Map(this.lines.map((line, at) => [line.one?.n, at]));
    this.draw();
  }

  options() {
    const processes = new Set();
    const kinds = new Set();
    for (const one of this.lifetimes.values()) {
      processes.add(one.process);
      kinds.add(kindOf(one.ref));
    }
    fill($("of-process"), [...processes].sort());
    fill($("of-kind"), [...kinds].sort());
  }

  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  draw() {
    const narrow = this.box.clientWidth < NARROW;
    this.list.classList.toggle("narrow", narrow);
    this.height = narrow ? 42 : 26;
    const total = this.lines.length * this.height;
    this.list.style.height = `${total}px`;
    const from = Math.max(0, Math.floor(this.box.scrollTop / this.height) - AHEAD);
    const until = Math.min(this.lines.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / this.height) + AHEAD);
    while (this.pool.length < until - from) this.pool.push(makeRow(this.list));
    this.pool.forEach((made, at) => {
      const line = this.lines[from + at];
      made.node.hidden = at >= until - from;
      if (made.node.hidden) forget(made.node);
      else {
        made.node.style.transform = `translateY(${(from + at) * this.height}px)`;
        this.fillRow(made, line, from + at);
      }
    });
    this.drawAxis();
  }

  fillRow(made, line, at) {
    const { node } = made;
    const group = line.one === undefined;
    node.classList.toggle("group", group);
    if (group) {
      const [name, rest] = processName(line.process);
      node.setAttribute("role", "presentation");
      forget(node);
      made.label.textContent = name;
      made.reason.textContent = `${rest} · ${number(line.count)}`;
      made.bars.replaceChildren();
      return;
    }
    const { one } = line;
    const alive = one.ended_ms === null;
    const end = endOf(one);
    node.id = `row-${one.n}`;
    node.setAttribute("role", "option");
    node.dataset.ref = one.ref;
    node.dataset.n = one.n;
    node.setAttribute("aria-setsize", this.lines.length);
    node.setAttribute("aria-posinset", at + 1);
    node.setAttribute("aria-selected", String(this.chosen === one.n));
    node.classList.toggle("active", this.active === one.n);
    node.classList.toggle("off", this.moment !== null && !aliveAt(one, this.moment));
    const life = alive ? `alive for ${span(this.nowMs - one.created_ms)}` : `lived ${span(one.ended_ms - one.created_ms)}, ${ENDS[end]} at ${clock(one.ended_ms)}`;
    const words = `${one.ref} in ${one.process}, since ${fine(one.created_ms)}, ${life}${one.reason ? `: ${one.reason}` : ""}, used ${count(one.use_count, "time")}${one.in_use ? ", in use now" : ""}`;
    node.setAttribute("aria-label", words);
    node.title = words;
    made.label.replaceChildren(el("span", { class: `swatch ${colourOf(kindOf(one.ref))}` }), el("span", { class: "kind" }, `${kindOf(one.ref)}/`), idOf(one.ref));
    made.reason.textContent = alive ? (one.in_use ? "in use" : "") : (one.reason ?? ENDS[end]);
    this.drawBar(made.bars, one, end);
  }

  x(ms) {
    return ((ms - this.from) / (this.to - this.from)) * this.width;
  }

  drawBar(bars, one, end) {
    this.width = Math.max(10, bars.clientWidth - 10);
    const x1 = Math.max(0, this.x(one.created_ms));
    const x2 = Math.max(x1 + 3, Math.min(this.width, this.x(one.ended_ms ?? this.nowMs)));
    const parts = [svg("rect", { class: `bar ${colourOf(kindOf(one.ref))}${end ? "" : " open"}`, x: x1, y: 4, width: x2 - x1, height: 10, rx: 2.5 })];
    // Marks closer than they are wide become one; the first and the last stay within the bar.
    const within = one.used.filter((ms) => ms >= this.from).map((ms) => Math.round(Math.min(Math.max(this.x(ms), x1 + 2), x2 - 1) / 3) * 3);
    const marks = [...new Set(within)];
    if (marks.length) parts.push(svg("path", { class: "mark", d: marks.map((x) => `M${x} 4v10`).join("") }));
    if (end === "lost") parts.push(svg("path", { class: "end-lost", d: `M${x2 - 3} 5l7 8m0-8l-7 8` }));
    else if (end) parts.push(svg("circle", { class: `end-${end}`, cx: x2, cy: 9, r: 3.5 }));
    bars.replaceChildren(...parts);
  }

  drawAxis() {
    const sample = this.pool.find((made) => !made.node.hidden && !made.node.classList.contains("group"));
    const axis = $("axis");
    const cursor = $("cursor");
    if (!sample) {
      axis.replaceChildren();
      cursor.hidden = true;
      return;
    }
    const left = sample.bars.getBoundingClientRect().left - this.box.getBoundingClientRect().left;
    axis.style.left = `${left}px`;
    axis.style.width = `${this.width}px`;
    const step = niceStep((this.to - this.from) / Math.max(2, Math.floor(this.width / 85)));
    const ticks = [];
    for (let at = Math.ceil(this.from / step) * step; at < this.to; at += step) {
      const tick = el("span", {}, step < 1000 ? fine(at) : clock(at));
      tick.style.left = `${this.x(at)}px`;
      if (this.x(at) < this.width - 50) ticks.push(tick);
    }
    axis.replaceChildren(...ticks);
    cursor.hidden = this.moment === null || this.moment < this.from;
    cursor.style.height = `${Math.max(this.lines.length * this.height, this.box.clientHeight)}px`;
    cursor.style.transform = `translateX(${left + this.x(this.moment ?? this.from)}px)`;
  }

  showMoment(ms) {
    this.moment = ms;
    this.draw();
  }

  clicked(event) {
    const node = event.target.closest("[data-n]");
    if (node) this.choose(Number(node.dataset.n), false);
  }

  choose(n, focus) {
    const one = this.lifetimes.get(n);
    if (!one) return;
    this.chosen = n;
    this.active = n;
    this.list.setAttribute("aria-activedescendant", `row-${n}`);
    this.draw();
    this.onChoose(one.ref, one.process, focus);
  }

  // The next line that is a lifetime, from a position in a direction.
  nextRow(at, way) {
    for (let next = at + way; next >= 0 && next < this.lines.length; next += way) {
      if (this.lines[next].one) return next;
    }
    return null;
  }

  activate(at) {
    if (at === null) return;
    const { n } = this.lines[at].one;
    this.active = n;
    const top = at * this.height;
    if (top < this.box.scrollTop + this.height) this.box.scrollTop = top - this.height;
    else if (top + this.height > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + this.height - this.box.clientHeight;
    this.draw();
    this.list.setAttribute("aria-activedescendant", `row-${n}`);
  }

  key(event) {
    const at = this.positions?.get(this.active) ?? -1;
    const page = Math.max(1, Math.floor(this.box.clientHeight / this.height) - 2);
    const last = this.lines.length;
    const moves = {
      ArrowDown: () => this.nextRow(at, 1), ArrowUp: () => this.nextRow(at, -1),
      PageDown: () => this.nextRow(Math.min(last - 2, at + page - 1), 1), PageUp: () => this.nextRow(Math.max(0, at - page - 1), 1),
      Home: () => this.nextRow(-1, 1), End: () => this.nextRow(last, -1),
    };
    if (moves[event.key]) {
      event.preventDefault();
      this.activate(moves[event.key]());
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (this.active !== null) this.choose(this.active, event.key === "Enter");
    }
  }
}

const aliveAt = (one, ms) => one.created_ms <= ms && (one.ended_ms === null || one.ended_ms > ms);

function endOf(one) {
  if (one.ended_ms === null) return null;
  if (one.end !== "cleaned_up") return "lost";
  return one.order_id ? "order" : "own";
}

function makeRow(list) {
  const label = el("span", { class: "label" });
  const bars = svg("svg", { class: "bars", height: 18, "aria-hidden": "true" });
  const reason = el("span", { class: "reason" });
  const node = el("div", { class: "line" }, label, reason);
  label.after(bars);
  list.append(node);
  return { node, label, bars, reason };
}

// A row that is out of sight, or a heading, answers to no resource's name.
function forget(node) {
  for (const name of ["id", "aria-selected", "aria-label", "aria-setsize", "aria-posinset", "data-ref", "data-n", "title"]) node.removeAttribute(name);
  node.classList.remove("active", "off");
}

function fill(select, values) {
  if (select.dataset.values === values.join("\n")) return;
  select.dataset.values = values.join("\n");
  const kept = select.value;
  select.replaceChildren(el("option", { value: "" }, "all"), ...values.map((value) => el("option", { value }, value)));
  select.value = values.includes(kept) ? kept : "";
}

function niceStep(ms) {
  const steps = [100, 250, 500, 1e3, 2e3, 5e3, 10e3, 15e3, 30e3, 60e3, 120e3, 300e3, 600e3, 900e3, 1800e3, 3600e3, 7200e3, 21600e3, 43200e3, 86400e3];
  return steps.find((step) => step >= ms) ?? Math.ceil(ms / 86400e3) * 86400e3;
}
