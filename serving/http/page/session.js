/**
 * What the page keeps for as long as its tab is open: the key, and judgements that are not saved yet.
 *
 * Browsers may forbid storage; then it lasts until the page is loaded again.
 */

const memory = new Map();

export function recall(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return memory.get(name) ?? null;
  }
}

export function remember(name, text) {
  try {
    sessionStorage.setItem(name, text);
  } catch {
    memory.set(name, text);
  }
}

export function forget(name) {
  memory.delete(name);
  try {
    sessionStorage.removeItem(name);
  } catch {
    // nothing was stored there
  }
}
