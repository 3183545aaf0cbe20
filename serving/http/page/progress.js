/** The view with figures about everything that people have judged. */

import { askJson, PATIENCE_MS } from "./api.js";
import { byId, copyOf, part, showTrouble } from "./dom.js";

const ROUTE = "v1/feedback/statistics";
const KINDS = { choice: "Comparisons", thumb: "Thumbs", ranking: "Rankings", correction: "Better answers" };
const OUTCOMES = ["wins", "ties", "losses"];

const count = (number) => number.toLocaleString("en");

export class Progress {
  #query;

  /** `query()` is the part of the address that names one of several models; empty if there is one. */
  constructor(query) {
    this.#query = query;
    byId("refresh").addEventListener("click", () => this.#load());
  }

  open() {
    scrollTo(0, 0);
    this.#load();
  }

  /** Of several models, another one is chosen, or they have only now become known. */
  modelChanged() {
    if (!byId("view-progress").hidden && this.#query()) this.#load();
  }

  async #load() {
    byId("refreshed").textContent = "Loading…";
    byId("progress-trouble").replaceChildren();
    try {
      show(await askJson(ROUTE + this.#query(), { timeoutMs: PATIENCE_MS }));
      byId("refreshed").textContent = `As of ${new Date().toLocaleTimeString()}`;
    } catch (trouble) {
      byId("refreshed").textContent = "";
      showTrouble(byId("progress-trouble"), trouble, () => this.#load());
    }
  }
}

function show(statistics) {
  byId("figures").replaceChildren(...figures(statistics));
  showWins(statistics.wins_by_version);
  const kinds = Object.entries(statistics.by_kind).map(([kind, number]) => [KINDS[kind] ?? kind, number]);
  showCounts("kinds", kinds);
  showCounts("labellers", Object.entries(statistics.by_labeller));
  byId("statistics").hidden = false;
}

function figures({ answers, comparisons, judged, agreement }) {
  const { pairs, agreed, rate } = agreement;
  return [
    figure("Answers given", count(answers), ""),
    figure("Comparisons judged", count(judged), `of ${count(comparisons)} shown`),
    figure(
      "Agreement",
      rate === null ? "–" : `${Math.round(100 * rate)} %`,
      pairs ? `in ${count(agreed)} of ${count(pairs)} pairs of verdicts` : "nothing was judged by two people yet",
    ),
  ];
}

function figure(name, value, more) {
  const element = copyOf("figure");
  part(element, "name").textContent = name;
  part(element, "value").textContent = value;
  part(element, "more").textContent = more;
  return element;
}

function showWins(winsByVersion) {
  const versions = Object.entries(winsByVersion).sort(([one], [other]) => Number(other) - Number(one));
  byId("wins").tBodies[0].replaceChildren(...versions.map(([version, outcomes]) => winsRow(version, outcomes)));
  byId("wins").hidden = !versions.length;
  byId("wins-none").hidden = versions.length > 0;
}

function winsRow(version, outcomes) {
  const row = copyOf("wins-row");
  part(row, "name").textContent = version;
  for (const outcome of OUTCOMES) {
    part(row, outcome).textContent = count(outcomes[outcome]);
    part(row, `${outcome}-bar`).style.flexGrow = outcomes[outcome];
  }
  return row;
}

/** A table of names and numbers, the largest first. */
function showCounts(id, counts) {
  const sorted = counts.toSorted(([, one], [, other]) => other - one);
  const rows = sorted.map(([name, number]) => countRow(name, count(number)));
  byId(id).tBodies[0].replaceChildren(...(rows.length ? rows : [countRow("None yet", "")]));
}

function countRow(name, text) {
  const row = copyOf("count-row");
  part(row, "name").textContent = name;
  part(row, "count").textContent = text;
  return row;
}
