/** The view in which a person talks with the model and judges each answer. */

import { ask, events } from "./api.js";
import { announce, byId, copyOf, part, sendOnEnter, showTrouble } from "./dom.js";
import { offerJudging } from "./judging.js";

const ROUTE = "v1/chat/completions";
const NEAR_THE_END = 80; // pixels

export class Chat {
  #model;
  #outbox;
  #exchanges = [];
  #running = null;

  /** `model()` is the part of a request that names the model. */
  constructor(model, outbox) {
    this.#model = model;
    this.#outbox = outbox;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", () => this.#running.abort());
    byId("new-chat").addEventListener("click", () => this.#clear());
    sendOnEnter(byId("question"));
  }

  open() {
    toTheEnd();
    if (matchMedia("(hover: hover)").matches) byId("question").focus(); // elsewhere a keyboard would cover the page
  }

  #send() {
    const question = byId("question").value.trim();
    if (!question || this.#running) return;
    byId("question").value = "";
    byId("chat-empty").hidden = true;
    byId("new-chat").hidden = false;
    const turn = copyOf("question-turn");
    part(turn, "text").textContent = question;
    byId("turns").append(turn);
    const exchange = { question, answer: "" };
    this.#exchanges.push(exchange);
    this.#answer(exchange);
  }

  #clear() {
    this.#running?.abort();
    this.#exchanges = [];
    byId("turns").replaceChildren();
    byId("chat-trouble").replaceChildren();
    byId("chat-empty").hidden = false;
    byId("new-chat").hidden = true;
    byId("question").focus();
  }

  /** What was said so far, for the model; a question without an answer is left out, except the last. */
  #messages(exchange) {
    const past = this.#exchanges.filter((other) => other !== exchange && other.answer);
    const said = past.flatMap(({ question, answer }) => [
      { role: "user", content: question },
      { role: "assistant", content: answer },
    ]);
    return [...said, { role: "user", content: exchange.question }];
  }

  async #answer(exchange) {
    const turn = copyOf("answer-turn");
    const running = new AbortController();
    this.#begin(turn, running);
    const answer = new Answer(turn);
    try {
      await this.#stream(answer, exchange, running.signal);
      offerJudging(answer.judged(), this.#outbox);
      announce("The answer is complete.");
    } catch (trouble) {
      if (running.signal.aborted) answer.note("stopped");
      else this.#failed(trouble, answer, exchange);
    } finally {
      exchange.answer = answer.text;
      this.#end(turn, running);
    }
  }

  async #stream(answer, exchange, signal) {
    const body = { ...this.#model(), messages: this.#messages(exchange), stream: true };
    const response = await ask(ROUTE, { body, signal });
    answer.about(body.model, response.headers.get("x-model-version"));
    for await (const event of events(ROUTE, response)) stayAtTheEnd(() => answer.take(event));
  }

  #begin(turn, running) {
    this.#running = running;
    turn.setAttribute("aria-busy", "true");
    byId("turns").append(turn);
    byId("chat-trouble").replaceChildren();
    announce("Answering.");
    this.#showButtons();
    toTheEnd();
  }

  #end(turn, running) {
    turn.removeAttribute("aria-busy");
    if (this.#running === running) this.#running = null;
    this.#showButtons();
  }

  #failed(trouble, answer, exchange) {
    if (answer.text) answer.note("broke off");
    else answer.turn.remove();
    showTrouble(byId("chat-trouble"), trouble, () => {
      answer.turn.remove();
      this.#answer(exchange);
    });
    toTheEnd();
  }

  #showButtons() {
    const [shown, gone] = this.#running ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
    const hadFocus = document.activeElement === gone;
    shown.hidden = false;
    if (hadFocus) shown.focus();
    gone.hidden = true;
  }
}

/** One answer while it comes in. */
class Answer {
  text = "";
  #id = null;
  #node = document.createTextNode("");
  #notes = [];

  constructor(turn) {
    this.turn = turn;
    part(turn, "text").append(this.#node);
  }

  /** Takes one chunk of the stream. */
  take({ id, choices }) {
    this.#id ??= id;
    const choice = choices[0];
    const piece = choice?.delta?.content ?? "";
    this.text += piece;
    this.#node.appendData(piece);
    if (choice?.finish_reason === "length") this.note("cut off at the greatest length");
  }

  about(model, version) {
    this.note(model);
    if (version) this.note(`version ${version}`);
  }

  note(text) {
    this.#notes.push(text);
    part(this.turn, "about").textContent = this.#notes.join(" · ");
  }

  /** What `offerJudging` wants to know: the service calls the one answer of a completion by its id and index 0. */
  judged() {
    const { turn, text } = this;
    return { id: `${this.#id}-0`, text, buttons: part(turn, "judging"), below: part(turn, "below") };
  }
}

/** Changes the page, and keeps its end in sight if it was; who has scrolled up to read is left alone. */
function stayAtTheEnd(change) {
  const page = document.scrollingElement;
  const atTheEnd = page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_THE_END;
  change();
  if (atTheEnd) toTheEnd();
}

function toTheEnd() {
  scrollTo(0, document.scrollingElement.scrollHeight);
}
