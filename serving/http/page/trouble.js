/** What can go wrong with a request, in words for the person in front of the page. */

export const UNREACHABLE = 0;
/** In place of an HTTP status, where no answer came. */

const MENDS_BY_WAITING = new Set([UNREACHABLE, 429, 502, 503, 504]);
const LONGEST_MESSAGE = 400;

const WORDS = {
  [UNREACHABLE]: "The service cannot be reached. Check the connection.",
  401: "The service asks for a key.",
  403: "This key is not allowed to do that.",
  413: "This is longer than the service accepts.",
  429: "Too many requests just now. The service asks to wait a moment.",
  500: "Something went wrong inside the service.",
  502: "The service cannot be reached. It may be starting.",
  503: "The service is not ready: its model is loading, or too many requests are waiting.",
  504: "The service took too long.",
  507: "The service's disk is full, so nothing was saved. Please tell the people who run it.",
};

const WORDS_OF_ROUTE = {
  "v1/comparisons": {
    403: "Comparing answers needs a labeller's key. This one may chat.",
    409: "The model is changing to another version just now. Please try again.",
  },
  "v1/feedback": {
    403: "Judging answers needs a labeller's key. This one may chat.",
    404: "The service does not know this answer. It may have been deleted.",
    409: "The service holds another judgement under the same mark, so it did not take this one.",
    503: "The service's database is away.",
  },
  "v1/feedback/statistics": {
    403: "The figures need a labeller's key. This one may chat.",
    503: "The service's database is away.",
  },
};

/** What the service calls a trouble itself says more than its status. */
const WORDS_OF_CODE = {
  not_recorded:
    "This service does not record feedback, so a verdict would be lost. " +
    "The people who run it can switch it on with feedback.record.",
  not_stored_yet: "The answer is still on its way into the service's database.",
};

/** A request that did not get what it asked for; `message` can be shown as it is. */
export class Trouble extends Error {
  /**
   * @param {string} route path of the request, for example `v1/feedback`
   * @param {number} status HTTP status, or UNREACHABLE
   * @param {string} said what the service said about it, if anything
   * @param {number|null} waitS seconds to wait before another attempt, where the service named a time
   * @param {string|null} code the service's own name for it, if it has one
   */
  constructor(route, status, said = "", waitS = null, code = null) {
    super(inWords(route, status, said, code));
    this.status = status;
    this.waitS = waitS;
  }

  /** The same request may succeed later, unchanged. */
  get mendsByWaiting() {
    return MENDS_BY_WAITING.has(this.status);
  }
}

function inWords(route, status, said, code) {
  const known = WORDS_OF_CODE[code] ?? WORDS_OF_ROUTE[route]?.[status] ?? WORDS[status];
  return known ?? (said.slice(0, LONGEST_MESSAGE) || `The service answered with status ${status}.`);
}
