/** Starts the page: its three views by the address (#chat, #compare, #progress), the models, the key, the unsaved. */

import { askJson, PATIENCE_MS } from "./api.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { byId, showTrouble } from "./dom.js";
import { anotherKey, currentKey, forgetKey, watchKey } from "./key.js";
import { Outbox } from "./outbox.js";
import { Progress } from "./progress.js";

const TITLES = { chat: "Chat", compare: "Compare", progress: "Progress" };

/** What names the model in a request: nothing while the service has not told its models. */
const model = () => (byId("model").value ? { model: byId("model").value } : {});
let hasSeveralModels = false;
/** Where there are several models, figures are about the one that is chosen. */
const query = () => (hasSeveralModels ? `?model=${encodeURIComponent(byId("model").value)}` : "");
let wantsKey = false;
const outbox = new Outbox(showUnsaved);
const compare = new Compare(model, outbox);
const views = { chat: new Chat(model, outbox), compare, progress: new Progress(query) };

function showView() {
  const asked = location.hash.slice(1);
  const name = Object.hasOwn(views, asked) ? asked : "chat";
  for (const other of Object.keys(views)) {
    byId(`view-${other}`).hidden = other !== name;
    if (other !== name) views[other].close?.();
  }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${TITLES[name]} · raylign`;
  views[name].open();
}

async function loadModels() {
  byId("models-trouble").replaceChildren();
  try {
    const { data } = await askJson("v1/models", { timeoutMs: PATIENCE_MS });
    byId("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
    byId("model").disabled = false;
    wantsKey = false;
    const bases = new Set(data.map(({ parent }) => parent));
    hasSeveralModels = data.filter(({ id }) => !bases.has(id)).length > 1;
    views.progress.modelChanged();
  } catch (trouble) {
    wantsKey = trouble.status === 401;
    showTrouble(byId("models-trouble"), trouble, loadModels);
  }
  showSign();
}

/** Signing in is offered where it is needed, signing out where there is a key. */
function showSign() {
  byId("sign").textContent = currentKey() === null ? "Sign in" : "Sign out";
  byId("sign").hidden = currentKey() === null && !wantsKey;
}

async function sign() {
  if (currentKey() === null) {
    if (await anotherKey(null)) await loadModels();
    return;
  }
  const lost = `${judgements(outbox.items.length)} not saved yet and will be lost. Sign out?`;
  if (outbox.items.length && !confirm(lost)) return;
  outbox.clear();
  forgetKey();
  location.reload(); // leaves nothing on the screen for the next person
}

const judgements = (number) => (number === 1 ? "1 judgement is" : `${number} judgements are`);

/** The strip under the header: what is not saved, why, and what happens next. */
function showUnsaved(items, secondsLeft) {
  const failed = items.filter((item) => item.state === "late" || item.state === "refused");
  byId("unsaved").hidden = !failed.length;
  if (!failed.length) return;
  setText(byId("unsaved-text"), `${judgements(items.length)} not saved. ${failed.at(-1).trouble?.message ?? ""}`);
  if (secondsLeft !== null) byId("unsaved-wait").textContent = `Next attempt in ${secondsLeft} s.`;
  if (failed.every((item) => item.state === "refused")) byId("unsaved-wait").textContent = "";
  byId("unsaved-drop").hidden = !failed.some((item) => item.state === "refused");
}

/** Only a change is written, so that it is not read out every second. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

addEventListener("hashchange", showView);
byId("model").addEventListener("change", () => {
  compare.modelChanged();
  views.progress.modelChanged();
});
byId("sign").addEventListener("click", sign);
byId("unsaved-retry").addEventListener("click", () => outbox.retry());
byId("unsaved-drop").addEventListener("click", () => outbox.drop());
watchKey(showSign);
showView();
await loadModels();
outbox.send();
