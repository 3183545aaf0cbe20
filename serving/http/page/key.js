/** The key that opens the service: asked for once it is needed, kept in this tab, forgotten on signing out. */

import { byId } from "./dom.js";
import { forget, recall, remember } from "./session.js";

const NAME = "raylign-key";
const PRINTABLE = /^[\x21-\x7e]+$/;

let asking = null;
let onChange = () => {};

export const currentKey = () => recall(NAME);

/** `tell` is called after the key has come or gone. */
export function watchKey(tell) {
  onChange = tell;
}

export function forgetKey() {
  forget(NAME);
  onChange();
}

/**
 * Waits until there is another key than `refused` (null: there was none); requests that are refused together ask once.
 *
 * @returns {Promise<boolean>} false when the person closed the dialog instead
 */
export async function anotherKey(refused) {
  if (currentKey() !== refused) return true;
  asking ??= askForKey(refused).finally(() => {
    asking = null;
  });
  return asking;
}

function askForKey(refused) {
  if (refused !== null) forgetKey();
  const dialog = byId("key-dialog");
  byId("key").value = "";
  complain(refused === null ? "" : "The service does not accept this key.");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
  });
}

function take(event) {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!PRINTABLE.test(key)) {
    complain(key ? "A key has no spaces and no special letters." : "Please enter a key.");
    return;
  }
  remember(NAME, key);
  byId("key-dialog").close("given");
  byId("key").value = "";
  onChange();
}

function complain(text) {
  byId("key-wrong").textContent = text;
  byId("key").setAttribute("aria-invalid", String(text !== ""));
}

byId("key-form").addEventListener("submit", take);
byId("key-close").addEventListener("click", () => byId("key-dialog").close());
