/**
 * Judgements on their way to the service. One counts as saved when the service has said so, and not before.
 *
 * They go one after another, in the order in which they were made. What a lost connection or a busy service holds up is
 * sent again by itself, under the same mark, so that the service cannot take it twice; what the service refuses waits
 * for the person. The unsaved ones outlive a reload of the page, in the tab that they were made in.
 *
 * States: waiting → sending → saved | late (again by itself, later) | refused (again when the person says so).
 */

import { askJson, PATIENCE_MS } from "./api.js";
import { untilThen } from "./dom.js";
import { forget, recall, remember } from "./session.js";
import { Trouble, UNREACHABLE } from "./trouble.js";

const ROUTE = "v1/feedback";
const NAME = "raylign-unsaved";
const FIRST_PAUSE_S = 4;
const LONGEST_PAUSE_S = 60;

export class Outbox {
  /** What is not saved, oldest first. */
  items = [];
  #watch;
  #sending = false;
  #pauseS = FIRST_PAUSE_S;
  #stopWaiting = null;

  /** `watch(items, secondsLeft)` is called whenever something changes; the seconds are those to the next attempt. */
  constructor(watch) {
    this.#watch = watch;
    this.items = recalled().map((kept) => ({ ...kept, state: "waiting", trouble: null, tell: () => {} }));
    addEventListener("online", () => this.#again("late"));
    addEventListener("beforeunload", (event) => {
      if (this.items.length) event.preventDefault(); // the browser asks whether to leave
    });
  }

  /** Takes a judgement, the body of POST /v1/feedback; `tell(item)` is called at each of its states. */
  put(judgement, tell) {
    const item = { mark: newMark(), judgement, state: "waiting", trouble: null, note: null, tell };
    this.#supersede(judgement);
    this.items.push(item);
    if (this.#stopWaiting) Object.assign(item, { state: "late", trouble: this.#first("late")?.trouble ?? null });
    this.#changed(item);
    this.send();
  }

  /** Sends everything that failed again, now. */
  retry() {
    this.#again("late", "refused");
  }

  /** Gives up what the service refused. */
  drop() {
    this.items = this.items.filter((item) => item.state !== "refused");
    this.#changed();
  }

  clear() {
    this.items = [];
    this.#changed();
  }

  async send() {
    if (this.#sending) return;
    this.#sending = true;
    for (let item = this.#first("waiting"); item; item = this.#first("waiting")) await this.#deliver(item);
    this.#sending = false;
  }

  #again(...states) {
    this.#stopWaiting?.();
    this.#stopWaiting = null;
    for (const item of this.items) if (states.includes(item.state)) this.#set(item, "waiting");
    this.send();
  }

  /** The later judgement is the one that counts; an older one that is on its way already says no more about itself. */
  #supersede({ kind, id }) {
    const older = this.items.filter(({ judgement }) => judgement.kind === kind && judgement.id === id);
    for (const item of older) item.tell = () => {};
    this.items = this.items.filter((item) => item.state === "sending" || !older.includes(item));
  }

  #first(state) {
    return this.items.find((item) => item.state === state);
  }

  async #deliver(item) {
    this.#set(item, "sending");
    try {
      item.note = await deliver(item);
      this.#pauseS = FIRST_PAUSE_S;
      this.items = this.items.filter((other) => other !== item);
      this.#set(item, "saved");
    } catch (trouble) {
      this.#set(item, trouble.mendsByWaiting ? "late" : "refused", trouble);
      if (trouble.mendsByWaiting) this.#wait(trouble.waitS);
    }
  }

  /** Everything waits while the service is away: the next would fail as well. */
  #wait(namedS) {
    for (const item of this.items) if (item.state === "waiting") this.#set(item, "late", this.#first("late").trouble);
    const seconds = namedS ?? this.#pauseS;
    this.#pauseS = Math.min(2 * this.#pauseS, LONGEST_PAUSE_S);
    this.#stopWaiting = untilThen(Date.now() + seconds * 1000, (left) => {
      if (left > 0) this.#watch(this.items, left);
      else this.#again("late");
    });
  }

  #set(item, state, trouble = null) {
    Object.assign(item, { state, trouble });
    this.#changed(item);
  }

  #changed(item = null) {
    const kept = this.items.map(({ mark, judgement }) => ({ mark, judgement }));
    if (kept.length) remember(NAME, JSON.stringify(kept));
    else forget(NAME);
    this.#watch(this.items, null);
    item?.tell(item);
  }
}

/** Returns why nothing will be learned from it, or null. */
async function deliver({ judgement, mark }) {
  const receipt = await askJson(ROUTE, { body: judgement, mark, timeoutMs: PATIENCE_MS });
  if (typeof receipt.id !== "string") throw new Trouble(ROUTE, UNREACHABLE); // no receipt, so nothing was saved
  return receipt.note ?? null;
}

function recalled() {
  try {
    return JSON.parse(recall(NAME) ?? "[]");
  } catch {
    return [];
  }
}

/** Random, 128 bits. Not `randomUUID`: browsers have that on https only. */
function newMark() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
