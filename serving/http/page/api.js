/** Requests to the service's HTTP API, which lies beside the page: whole JSON answers, and streamed ones. */

import { anotherKey, currentKey } from "./key.js";
import { Trouble, UNREACHABLE } from "./trouble.js";

const LONGEST_WAIT_S = 3600;

/** Milliseconds for what needs no model and is answered at once; later than that, the service is away. */
export const PATIENCE_MS = 20_000;

/**
 * Asks the service; where it wants a key, asks the person for one and goes on.
 *
 * @param {string} route for example `v1/models`
 * @param {{body?: object, signal?: AbortSignal, timeoutMs?: number, mark?: string}} options `body` makes it a POST;
 *   `timeoutMs` is for each attempt, in place of a signal; `mark` lets the service recognise the same request when it
 *   comes again (Idempotency-Key)
 * @returns {Promise<Response>} with status 200
 * @throws {Trouble} anything else came, or nothing
 */
export async function ask(route, options = {}) {
  for (;;) {
    const key = currentKey();
    const response = await reach(route, options, key);
    if (response.ok) return response;
    if (response.status !== 401 || !(await anotherKey(key))) throw await refusal(route, response);
  }
}

/** The same for an answer that is one JSON object. */
export async function askJson(route, options) {
  const response = await ask(route, options);
  try {
    return await response.json();
  } catch {
    // cut off, or not the service's: a network's sign-in page answers 200 as well
    throw new Trouble(route, UNREACHABLE);
  }
}

async function reach(route, { body, signal, timeoutMs, mark }, key) {
  const headers = {};
  if (key !== null) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  if (mark) headers["idempotency-key"] = mark;
  if (timeoutMs) signal = AbortSignal.timeout(timeoutMs);
  try {
    return await fetch(route, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch {
    throw new Trouble(route, UNREACHABLE);
  }
}

async function refusal(route, response) {
  const waitS = secondsToWait(response.headers.get("retry-after"));
  try {
    const { error } = await response.json();
    return new Trouble(route, response.status, String(error.message), waitS, error.code);
  } catch {
    return new Trouble(route, response.status, "", waitS);
  }
}

/** `Retry-After` is a number of seconds or a date. */
function secondsToWait(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header) ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000);
  return seconds > 0 ? Math.min(seconds, LONGEST_WAIT_S) : null;
}

/**
 * The JSON objects of a stream of server-sent events, up to `[DONE]`.
 *
 * @throws {Trouble} the service gave up in the middle, or the stream ended without saying that it was complete
 */
export async function* events(route, response) {
  for await (const data of eventData(route, response.body)) {
    if (data === "[DONE]") return;
    const event = parsed(route, data);
    if (event.error) throw new Trouble(route, event.error.code, String(event.error.message));
    yield event;
  }
  throw new Trouble(route, UNREACHABLE);
}

async function* eventData(route, body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await read(route, reader);
      if (done) return;
      const whole = (rest + value).split(/\r?\n\r?\n/);
      rest = whole.pop();
      yield* whole.map((text) => /^data:(.*)$/m.exec(text)?.[1].trim()).filter(Boolean);
    }
  } finally {
    reader.cancel().catch(() => {}); // frees the service's side when the reader has seen enough
  }
}

function parsed(route, data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Trouble(route, UNREACHABLE);
  }
}

async function read(route, reader) {
  try {
    return await reader.read();
  } catch {
    throw new Trouble(route, UNREACHABLE);
  }
}
