// The worker's JSON API. A failure is thrown as it was told: status, a word for programs, a sentence.

export class Failure extends Error {
  constructor(status, body) {
    super(body.message ?? `the worker answered ${status}`);
    this.status = status;
    this.error = body.error ?? "";
    this.nearest = body.nearest ?? [];
  }
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", credentials: "omit", ...options });
  } catch {
    throw new Failure(0, { error: "away", message: "The worker does not answer." });
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Failure(answer.status, body);
  return body;
}

export function get(path, values = {}) {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const query = new URLSearchParams(given).toString();
  return ask(query ? `${path}?${query}` : path);
}

export function post(path, body, token) {
  const headers = { "Content-Type": "application/json", Authorization: `Bearer ${token}` };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body) });
}
