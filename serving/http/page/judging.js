/** Under an answer: two thumbs, and a field for the answer that it should have been. */

import { copyOf, part } from "./dom.js";

/**
 * What a judgement's state is called next to what was judged.
 *
 * @param {{state: string, trouble: Error|null, note: string|null}} item of the outbox
 */
export function stateInWords({ state, trouble, note }) {
  if (state === "saved") return note ? `Saved. ${note}` : "Saved";
  if (state === "waiting" || state === "sending") return "Saving…";
  return trouble ? `Not saved. ${trouble.message}` : "Not saved yet";
}

/** Shows the state of a judgement in an element, in words and by its colour. */
export function showState(element, item) {
  element.textContent = stateInWords(item);
  element.dataset.state = item.state;
}

/**
 * Offers to judge an answer.
 *
 * @param {{id: string, text: string, buttons: Element, below: Element}} answer `id` is the service's; `buttons` and
 *   `below` are where the thumbs and the correction go
 * @param {Outbox} outbox
 */
export function offerJudging(answer, outbox) {
  const thumbs = copyOf("thumbs");
  const state = part(thumbs, "state");
  for (const way of ["up", "down"]) {
    part(thumbs, way).addEventListener("click", () => {
      press(thumbs, way);
      outbox.put({ kind: "thumb", id: answer.id, up: way === "up" }, (item) => showState(state, item));
    });
  }
  offerCorrection(part(thumbs, "better"), answer, outbox);
  answer.buttons.replaceChildren(thumbs);
  answer.buttons.hidden = false;
}

function press(thumbs, pressed) {
  for (const way of ["up", "down"]) part(thumbs, way).setAttribute("aria-pressed", String(way === pressed));
}

function offerCorrection(button, answer, outbox) {
  const form = copyOf("correction");
  const text = part(form, "text");
  const show = (open) => {
    form.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    (open ? text : button).focus({ preventScroll: true });
    if (open) form.scrollIntoView({ block: "nearest" });
  };
  text.value = answer.text;
  form.hidden = true;
  answer.below.replaceChildren(form);
  button.addEventListener("click", () => show(form.hidden));
  part(form, "close").addEventListener("click", () => show(false));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    correct(form, answer, outbox);
  });
}

function correct(form, answer, outbox) {
  const text = part(form, "text").value.trim();
  const state = part(form, "state");
  if (!text || text === answer.text.trim()) {
    state.textContent = "Change the text first.";
    return;
  }
  outbox.put({ kind: "correction", id: answer.id, text }, (item) => showState(state, item));
}
