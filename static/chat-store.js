// What the browser keeps for the chat page, if it may: `localStorage` for all tabs, `sessionStorage` for this one.

/** What was kept under this name, or null. */
export function recall(area, name) {
  try {
    return JSON.parse(window[area].getItem(`waterspout ${name}`));
  } catch {
    return null;
  }
}

/** Keep it; where the browser does not let us, it lasts as long as the page. */
export function keep(area, name, value) {
  try {
    window[area].setItem(`waterspout ${name}`, JSON.stringify(value));
  } catch {}
}

/** Milliseconds before attempt number `attempt`. */
export const backoff = (attempt) => 200 + Math.random() * Math.min(20_000, 500 * 2 ** attempt);
export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
