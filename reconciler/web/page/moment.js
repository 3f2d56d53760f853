// The slider over time: any past moment, exact to the millisecond. While it moves, the timeline shows
// what it knows at once; the counts come from the worker, which folds the log up to that moment.

import { Failure, get } from "./api.js";
import { $, show } from "./dom.js";
import { span, stamp } from "./format.js";

const SETTLE_MS = 120;
const STEPS = 200;

export class Moment {
  // changes: () -> sorted times at which something happened; onMove: ms or null; onShown: the fleet then.
  constructor(changes, onMove, onShown) {
    this.ms = null;
    this.first = null;
    this.last = Date.now();
    this.changes = changes;
    this.onMove = onMove;
    this.onShown = onShown;
    this.asked = 0;
    $("slider").addEventListener("input", () => this.slid());
    $("slider").addEventListener("keydown", (event) => this.key(event));
    $("now").addEventListener("click", () => this.now());
    $("moment-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = $("moment-text").value.trim();
      if (text) this.ask(text);
    });
  }

  // The span that the slider covers grows with time; a moment that is shown stays where it is.
  cover(first, last) {
    this.first = first;
    this.last = Math.max(last, first + 1000);
    const slider = $("slider");
    slider.min = 0;
    slider.max = this.last - this.first;
    slider.step = 1;
    slider.dataset.first = this.first;
    slider.value = this.ms === null ? slider.max : this.ms - this.first;
    this.label();
  }

  slid() {
    const slider = $("slider");
    if (Number(slider.value) >= Number(slider.max)) this.now();
    else this.go(this.first + Number(slider.value));
  }

  key(event) {
    const way = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
    if (!way || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const at = this.ms ?? this.last;
    let next = at + (way * (this.last - this.first)) / STEPS;
    if (event.shiftKey) {
      const times = this.changes();
      next = way > 0 ? times.find((time) => time > at) : times.findLast((time) => time < at);
      if (next === undefined) next = way > 0 ? this.last : this.first;
    }
    if (next >= this.last) this.now();
    else this.go(Math.max(this.first, Math.round(next)));
  }

  go(ms) {
    this.ms = ms;
    $("slider").value = ms - this.first;
    this.label();
    this.onMove(ms);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(new Date(ms).toISOString()), SETTLE_MS);
  }

  now() {
    clearTimeout(this.timer);
    this.asked += 1;
    this.ms = null;
    $("slider").value = $("slider").max;
    show($("moment-error"), "");
    this.label();
    this.onMove(null);
    this.onShown(null);
  }

  async ask(at) {
    const mine = (this.asked += 1);
    try {
      const then = await get("/api/moment", { at, limit: 0 });
      if (mine !== this.asked) return;
      show($("moment-error"), "");
      if (this.ms !== then.at_ms) {
        this.ms = then.at_ms;
        this.onMove(then.at_ms);
        this.cover(Math.min(this.first ?? then.at_ms, then.at_ms), this.last);
      }
      this.label();
      this.onShown(then);
    } catch (failure) {
      if (mine !== this.asked) return;
      if (!(failure instanceof Failure)) throw failure;
      show($("moment-error"), failure.message);
    }
  }

  label() {
    const past = this.ms !== null;
    const text = past ? `${stamp(this.ms)} UTC, ${span(this.last - this.ms)} ago` : "Now";
    $("moment-shown").textContent = text;
    $("slider").setAttribute("aria-valuetext", text);
    $("now").setAttribute("aria-pressed", String(!past));
    document.body.classList.toggle("past", past);
  }
}
