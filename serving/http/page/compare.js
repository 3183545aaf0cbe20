/** The view in which a person sees two answers to one prompt and says which is better, prompt after prompt. */

import { askJson } from "./api.js";
import { announce, byId, part, showTrouble } from "./dom.js";
import { stateInWords } from "./judging.js";
import { Trouble, UNREACHABLE } from "./trouble.js";

const ROUTE = "v1/comparisons";
const PAUSE_MS = 700; // between a verdict and the next prompt, so that the verdict is seen

const KEYS = {
  a: "a",
  arrowleft: "a",
  b: "b",
  arrowright: "b",
  t: "tie",
  x: "both_bad",
  n: "next",
  u: "undo",
};
const VERDICTS = { a: "A is better", b: "B is better", tie: "A tie", both_bad: "Both are bad" };

/** One prompt of the list: what the service answered to it, and what the person said about that. */
class Round {
  verdict = null;
  /** The verdict on its way to the service, as the outbox has it. */
  item = null;
  /** The person is about to give another verdict; until then the first one counts. */
  reopened = false;
  #asked = null;
  #stop = new AbortController();

  constructor(prompt) {
    this.prompt = prompt;
  }

  /** The comparison; asked for at the first call, and again after a failure. */
  answers(settings) {
    if (this.#asked) return this.#asked;
    const asked = this.#ask(settings);
    this.#asked = asked;
    asked.catch(() => {
      if (this.#asked === asked) this.#asked = null;
    });
    return asked;
  }

  get isJudged() {
    return this.verdict !== null && !this.reopened;
  }

  /** Gives up waiting, which frees the engine. */
  stop() {
    this.#stop.abort();
    this.#stop = new AbortController();
  }

  /** Forgets the answers: the next call of `answers` asks for others. */
  renew() {
    this.stop();
    this.#asked = null;
  }

  async #ask(settings) {
    const body = { ...settings, messages: [{ role: "user", content: this.prompt }] };
    const comparison = await askJson(ROUTE, { body, signal: this.#stop.signal });
    if (comparison.answers?.length !== 2) throw new Trouble(ROUTE, UNREACHABLE);
    return comparison;
  }
}

export class Compare {
  #model;
  #outbox;
  #rounds = [];
  #at = 0;
  #shown = null;
  #open = false;
  #pause = 0;

  /** `model()` is the part of a request that names the model. */
  constructor(model, outbox) {
    this.#model = model;
    this.#outbox = outbox;
    this.#listenToSetup();
    this.#listenToRound();
    addEventListener("keydown", (event) => this.#onKey(event));
  }

  open() {
    this.#open = true;
    scrollTo(0, 0);
  }

  close() {
    this.#open = false;
    clearTimeout(this.#pause);
  }

  /** The answers that were fetched ahead are another model's now. */
  modelChanged() {
    for (const round of this.#rounds.slice(this.#at + 1)) if (!round.verdict) round.renew();
  }

  #listenToSetup() {
    byId("compare-setup").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#start(promptsGiven());
    });
    byId("fill").addEventListener("click", () => fillIn(exampleButtons().map((button) => button.textContent)));
    for (const button of exampleButtons()) button.addEventListener("click", () => fillIn([button.textContent]));
  }

  #listenToRound() {
    for (const button of verdictButtons()) button.addEventListener("click", () => this.#judge(button.dataset.winner));
    byId("undo").addEventListener("click", () => this.#undo());
    byId("next").addEventListener("click", () => this.#next());
    byId("leave").addEventListener("click", () => this.#leave());
    byId("more").addEventListener("click", () => this.#leave());
    byId("again").addEventListener("click", () => this.#start(this.#rounds.map((round) => round.prompt)));
  }

  #onKey(event) {
    const what = KEYS[event.key.toLowerCase()];
    if (!what || !this.#open || event.repeat || !mayBeShortcut(event)) return;
    event.preventDefault();
    if (what === "next") this.#next();
    else if (what === "undo") this.#undo();
    else this.#judge(what);
  }

  #start(prompts) {
    if (!prompts.length) {
      byId("prompts").focus();
      return;
    }
    this.#stop();
    this.#rounds = prompts.map((prompt) => new Round(prompt));
    this.#show(0);
  }

  #leave() {
    this.#stop();
    this.#rounds = [];
    this.#shown = null;
    showOnly("compare-setup");
    byId("prompts").focus();
  }

  #stop() {
    clearTimeout(this.#pause);
    for (const round of this.#rounds) round.stop();
  }

  async #show(at) {
    clearTimeout(this.#pause);
    this.#at = at;
    this.#shown = null;
    const round = this.#rounds[at];
    showOnly("round");
    this.#head(round);
    this.#paint();
    try {
      const comparison = await round.answers(this.#settings());
      if (round === this.#rounds[this.#at]) this.#fill(comparison);
    } catch (trouble) {
      if (round === this.#rounds[this.#at]) this.#failed(trouble);
    }
  }

  #failed(trouble) {
    const at = this.#at;
    showTrouble(byId("round-trouble"), trouble, () => this.#show(at));
    this.#paint();
  }

  #settings() {
    const longest = byId("longest").valueAsNumber;
    return { ...this.#model(), ...(longest > 0 && { max_tokens: Math.floor(longest) }) };
  }

  #head(round) {
    byId("round-title").textContent = `Comparison ${this.#at + 1} of ${this.#rounds.length}`;
    byId("round-progress").max = this.#rounds.length;
    byId("round-progress").value = this.#at;
    byId("asked").textContent = round.prompt;
    byId("round-trouble").replaceChildren();
    for (const side of sides()) part(side, "text").textContent = "";
    byId("round-title").focus({ preventScroll: true });
    scrollTo(0, 0);
  }

  /** Shows the two answers in the order that the service gave, which is random so that the place says nothing. */
  #fill(comparison) {
    this.#shown = comparison;
    sides().forEach((side, index) => {
      part(side, "text").textContent = comparison.answers[index].text;
    });
    this.#paint();
    announce(`${byId("round-title").textContent} is ready.`);
    this.#fetchAhead();
  }

  #fetchAhead() {
    const ahead = this.#rounds[this.#at + 1];
    ahead?.answers(this.#settings()).catch(() => {}); // told when its turn comes, after another attempt
  }

  #judge(verdict) {
    const round = this.#rounds[this.#at];
    if (!this.#shown || !round || round.isJudged) return;
    Object.assign(round, { verdict, reopened: false });
    const { id, answers } = this.#shown;
    const winner = { a: answers[0].id, b: answers[1].id }[verdict] ?? verdict;
    this.#outbox.put({ kind: "choice", id, winner }, (item) => {
      round.item = item;
      this.#paint();
    });
    const last = this.#at + 1 === this.#rounds.length;
    if (byId("go-on").checked && !last) this.#pause = setTimeout(() => this.#next(), PAUSE_MS);
  }

  /** Judges again: this comparison if it has a verdict, otherwise the last one before it that has. */
  #undo() {
    const at = this.#rounds.findLastIndex((round, index) => round.isJudged && index <= this.#at);
    if (at < 0) return;
    this.#rounds[this.#at].reopened = false;
    this.#rounds[at].reopened = true;
    this.#show(at);
  }

  #next() {
    const round = this.#rounds[this.#at];
    if (!round || byId("round").hidden) return;
    round.reopened = false;
    if (!this.#shown) round.stop();
    if (this.#at + 1 < this.#rounds.length) this.#show(this.#at + 1);
    else this.#finish();
  }

  #finish() {
    clearTimeout(this.#pause);
    this.#shown = null;
    const judged = this.#rounds.filter((round) => round.verdict).length;
    const skipped = this.#rounds.length - judged;
    byId("done-text").textContent = `${judged} judged${skipped ? `, ${skipped} skipped` : ""}.`;
    showOnly("compare-done");
    byId("done-title").focus();
  }

  #paint() {
    const round = this.#rounds[this.#at];
    if (!round) return; // a verdict of a list that was left
    const given = round.verdict;
    byId("pair").setAttribute("aria-busy", String(!this.#shown));
    byId("pair").dataset.verdict = round.isJudged ? given : "";
    for (const button of verdictButtons()) {
      button.disabled = !this.#shown || round.isJudged;
      button.setAttribute("aria-pressed", String(button.dataset.winner === given));
    }
    part(byId("next"), "word").textContent = given ? "Next" : "Skip";
    part(byId("undo"), "word").textContent = round.isJudged ? "Judge again" : "Back";
    byId("undo").disabled = !this.#rounds.slice(0, this.#at + 1).some((other) => other.isJudged);
    paintState(round, this.#shown);
  }
}

function paintState(round, shown) {
  const state = byId("verdict-state");
  state.textContent = inWords(round, shown);
  state.dataset.state = round.item?.state ?? "";
}

function inWords({ verdict, item, reopened }, shown) {
  if (item) return `${VERDICTS[verdict]}. ${stateInWords(item)}${reopened ? " Choose again." : ""}`;
  if (!shown) return byId("round-trouble").hasChildNodes() ? "" : "The model is answering…";
  return shown.answers[0].text === shown.answers[1].text ? "The two answers are the same." : "";
}

/** Letters belong to the text field that has the focus, and combinations to the browser. */
function mayBeShortcut(event) {
  const typing = event.target.closest?.("input:not([type=checkbox]), textarea, select, dialog");
  return byId("use-keys").checked && !typing && !event.ctrlKey && !event.metaKey && !event.altKey && !event.isComposing;
}

function promptsGiven() {
  const text = byId("prompts").value;
  const prompts = byId("by-line").checked ? text.split("\n") : [text];
  return prompts.map((prompt) => prompt.trim()).filter(Boolean);
}

function fillIn(prompts) {
  byId("prompts").value = prompts.join("\n");
  byId("by-line").checked = prompts.length > 1;
  byId("prompts").focus();
}

function showOnly(shown) {
  for (const id of ["compare-setup", "round", "compare-done"]) byId(id).hidden = id !== shown;
}

const exampleButtons = () => [...byId("examples").querySelectorAll("button")];
const verdictButtons = () => [...byId("verdicts").querySelectorAll("button")];
const sides = () => [...byId("pair").querySelectorAll("[data-side]")];
