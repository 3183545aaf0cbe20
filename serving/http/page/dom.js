/**
 * Short ways to the elements of index.html. Markup is made there only; scripts clone its templates and fill them with
 * `textContent`, so that no text of a model or a person is ever read as markup.
 */

export const byId = (id) => document.getElementById(id);

/** A new copy of a template's one element. */
export const copyOf = (id) => byId(id).content.firstElementChild.cloneNode(true);

/** The element within `root` that index.html calls `name`. */
export const part = (root, name) => root.querySelector(`[data-part="${name}"]`);

/** Says something to people who listen to the page instead of looking at it. */
export function announce(text) {
  byId("announcer").replaceChildren(text);
}

/** Shows what went wrong, with a button that tries again; after `Retry-After`, if the service named a time. */
export function showTrouble(place, trouble, retry) {
  const notice = copyOf("notice");
  const again = part(notice, "again");
  part(notice, "text").textContent = trouble.message;
  again.addEventListener("click", () => {
    place.replaceChildren();
    retry();
  });
  place.replaceChildren(notice);
  if (trouble.waitS) countDown(again, trouble.waitS);
}

function countDown(button, seconds) {
  const word = button.textContent;
  button.disabled = true;
  untilThen(Date.now() + seconds * 1000, (left) => {
    button.disabled = left > 0;
    button.textContent = left > 0 ? `${word} in ${left} s` : word;
  });
}

/** Calls `show` with the whole seconds left until `then`, every second and at last with 0; returns how to stop it. */
export function untilThen(then, show) {
  let timer = 0;
  const step = () => {
    const left = Math.max(0, Math.ceil((then - Date.now()) / 1000));
    show(left);
    if (left > 0) timer = setTimeout(step, 250);
  };
  step();
  return () => clearTimeout(timer);
}

/** Enter in a text field sends its form; with Shift it is a new line, and while composing (IME) it is a letter's. */
export function sendOnEnter(field) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    field.form.requestSubmit();
  });
}
