// Numbers and times for people. Times are those of Redis, in UTC, as in the log and the command line.

export const stamp = (ms) => new Date(ms).toISOString().replace("T", " ").replace("Z", "");
export const clock = (ms) => stamp(ms).slice(11, 19);
export const fine = (ms) => stamp(ms).slice(11);
export const number = (value) => value.toLocaleString("en");

export function span(ms) {
  const seconds = Math.max(0, ms) / 1000;
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.round(seconds / length)} ${unit}`;
  }
  return seconds < 10 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds)} s`;
}

export const size = (bytes) => (bytes === null || bytes === undefined ? "–" : `${(bytes / 2 ** 20).toFixed(0)} MiB`);
export const count = (value, one, many) => `${number(value)} ${value === 1 ? one : many ?? one + "s"}`;
export const kindOf = (ref) => ref.slice(0, ref.indexOf("/"));
export const idOf = (ref) => ref.slice(ref.indexOf("/") + 1);

// name@hostname:pid:start -> name, and the rest.
export function processName(id) {
  const at = id.indexOf("@");
  return at < 0 ? [id, ""] : [id.slice(0, at), id.slice(at + 1)];
}

// The first three kinds have a colour of their own; others take the next one as they come.
const fixed = new Map([["session", 0], ["runner", 1], ["agent", 2]]);
const COLOURS = 8;
export function colourOf(kind) {
  if (!fixed.has(kind)) fixed.set(kind, fixed.size < COLOURS ? fixed.size : 3 + (fixed.size % (COLOURS - 3)));
  return `k${fixed.get(kind)}`;
}
