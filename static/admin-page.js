// Small things that all parts of the console need: elements, numbers and times as people read them, a question.

export const at = (id) => document.getElementById(id);

/** An element with text or children; what comes from outside is only ever text. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** Only what differs is written: a status region is read aloud whenever its text is set. */
export function write(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}

export function count(number) {
  return number.toLocaleString(undefined, { maximumFractionDigits: number < 10 ? 1 : 0 });
}

export function span(seconds) {
  const [size, unit] = [[86_400, 'd'], [3_600, 'h'], [60, 'min'], [1, 's']].find(([s]) => seconds >= s) ?? [1, 's'];
  return `${Math.floor(seconds / size)} ${unit}`;
}

export function clock(ms) {
  return new Date(ms).toLocaleTimeString(undefined, { hour12: false });
}

/** A day and a time, as short as people write them. */
export function moment(ms) {
  return new Date(ms).toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' });
}

/** What somebody published, in one piece: JSON as it is, or "…" behind its first part. */
export function brief(data, most = 2_000) {
  const text = typeof data === 'string' ? data : JSON.stringify(data);
  return text.length > most ? `${text.slice(0, most)}…` : text;
}

/** Ask before what cannot be undone. */
export function sure(question) {
  const dialog = at('sure');
  at('question').textContent = question;
  dialog.returnValue = 'no';
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener('close', () => resolve(dialog.returnValue === 'yes'), { once: true });
  });
}

/** What a definition list says; it says so if that is nothing. */
export function define(id, entries) {
  const rows = entries.length ? entries : [['none', '']];
  at(id).replaceChildren(
    ...rows.map(([name, value]) => make('div', {}, make('dt', {}, name), make('dd', {}, value))),
  );
}
