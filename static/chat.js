// The chat page.  It goes down to the commands of the protocol, so that all of it can be seen by eye; clauses are those of
// server/PROTOCOL.md.  What others wrote, their names included, is shown by `textContent` only.

import { backoff, Connection, LOST, pause, TIMED_OUT } from '/static/connection.js';

const SHOWN = 1000; // messages on the page; older ones leave it
const PRESENCE_MS = 60_000; // joins and leaves are sent at most once, so presence is asked for again

const $ = (id) => document.getElementById(id);

// --- one room: its subscription, its position, who is here (4.2, 4.5, 4.6, 5, 11) ------------------------------------
class Room {
  position = null; // {offset, epoch} up to which the page has everything, once subscribed
  here = null; // a set of client ids, once known
  outside = ''; // why we are not to join by ourselves
  #loaded = false;
  #turn = 0; // of `join`: a later one ends the earlier

  constructor(name) {
    this.name = name;
    this.channel = `chat:${encodeURIComponent(name)}`;
    this.before = recall('sessionStorage', `position ${this.channel}`); // where it was before a reload
  }

  /** Subscribe, from the position if there is one, and load what is missing; to be called on every connection. */
  async join() {
    const turn = ++this.#turn;
    const { socket } = connection;
    const over = () => room !== this || turn !== this.#turn || socket !== connection.socket;
    this.outside = '';
    this.here = null;
    showState('joining', 'Joining…');
    for (let attempt = 0, joined = false; !over() && !(joined && this.#loaded); ) {
      try {
        const subscribe = { channel: this.channel, ...(this.position && { recover: true, ...this.position }) };
        joined ||= await connection.ask({ subscribe }, (result) => over() || this.#joined(result));
        this.refresh();
        if (!this.#loaded) await this.#load(over);
      } catch (error) {
        if (over()) return;
        if (!error.temporary) return this.stayOutside(error.message);
        if (error.code === TIMED_OUT) return connection.drop();
        await pause(backoff(attempt++));
      }
    }
  }

  stayOutside(why) {
    this.outside = why;
    this.here = null;
    showState('outside', `Not in this room: ${why}`, 'Join again');
  }

  #joined({ recovered, recoverable, offset = 0, epoch = '', publications = [] }) {
    if (this.position && !recovered) {
      this.forget();
      notify('The server no longer has all that came while you were away. What it has is shown anew.');
    } else if (!this.position && this.before?.epoch && this.before.epoch !== epoch) {
      notify('The server has started this room anew since you were here.');
    }
    this.#stand(recoverable ? { offset, epoch } : null);
    for (const publication of publications) this.#show(publication);
    showState('live', 'Live');
  }

  /** The last messages of history; pushes may overlap them, `showMessage` tells them apart by offset. */
  async #load(over) {
    const history = { channel: this.channel, limit: 50, reverse: true };
    const { publications } = await connection.ask({ history }).catch((error) => {
      if (![103, 108].includes(error.code)) throw error;
      return { publications: [] }; // rooms without history are rooms, too
    });
    if (over()) return;
    this.#loaded = true;
    publications.forEach(showMessage);
    $('log').ariaBusy = 'false';
  }

  #show(publication) {
    const { offset, epoch } = publication;
    if (this.position && offset) this.#stand({ offset, epoch: epoch || this.position.epoch });
    showMessage(publication);
  }

  #stand(position) {
    this.position = position;
    keep('sessionStorage', `position ${this.channel}`, position);
  }

  /** What the page shows is not what the server has any more. */
  forget() {
    this.position = this.before = null;
    this.#loaded = false;
    clear();
  }

  take({ channel, pub, join, leave, unsubscribe }) {
    if (channel !== this.channel) return; // of a room just left
    if (pub) this.#show(pub);
    if (join) this.here?.add(join.info.client);
    if (leave) this.here?.delete(leave.info.client);
    soon(showPeople);
    if (unsubscribe?.code === 2502) this.forget();
    if (unsubscribe?.code >= 2500) this.join();
    else if (unsubscribe) this.stayOutside(`${unsubscribe.reason} (${unsubscribe.code})`);
  }

  /** Ask who is here; a refusal changes nothing, and it is asked again in a minute. */
  refresh() {
    const took = ({ presence }) => {
      if (!this.outside) this.here = new Set(Object.keys(presence));
      soon(showPeople);
    };
    connection.ask({ presence: { channel: this.channel } }, took).catch(() => {});
  }
}

// --- what is written and not acknowledged yet (4.7, 11.8) ------------------------------------------------------------
class Outbox {
  items = recall('sessionStorage', 'unsent') ?? []; // {channel, data, failed: why not, shown: it is in the room}
  #busy = false;

  add(channel, name, text) {
    // Not randomUUID, which there is in secure contexts only: this page may be looked at over plain HTTP.
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
    this.items.push({ channel, data: { id, name, text } });
    this.#changed();
    this.flush();
  }

  /** Send one after the other.  An unknown outcome (100, no answer, connection lost) is asked again by the same key. */
  async flush() {
    if (this.#busy) return;
    this.#busy = true;
    for (let attempt = 0, item; connection.live && (item = this.items.find(({ failed }) => !failed)); ) {
      const { channel, data } = item;
      try {
        await connection.ask({ rpc: { method: 'publish', data: { channel, data, idempotency_key: data.id } } });
        this.items.splice(this.items.indexOf(item), 1);
        attempt = 0;
      } catch (error) {
        if (!error.temporary) item.failed = error.message;
        else if (connection.live) await pause(backoff(attempt++));
      }
      this.#changed();
    }
    this.#busy = false;
  }

  /** A publication came that carries this id; if it is ours, the room shows it now. */
  came(id) {
    for (const item of this.items) item.shown ||= item.data.id === id;
    soon(showUnsent);
  }

  #changed() {
    keep('sessionStorage', 'unsent', this.items);
    showUnsent();
  }
}

// --- what the browser keeps, if it may -------------------------------------------------------------------------------
function recall(area, name) {
  try {
    return JSON.parse(window[area].getItem(`waterspout ${name}`));
  } catch {
    return null;
  }
}

function keep(area, name, value) {
  try {
    window[area].setItem(`waterspout ${name}`, JSON.stringify(value));
  } catch {} // then it lasts as long as the page
}

// --- the page --------------------------------------------------------------------------------------------------------
const due = new Set();
let state = {};
let atEnd = true; // the newest message is in view, and stays so
let scrolledTo = 0;

/** Do `work` before the next frame, once, however often it is asked for. */
function soon(work) {
  if (!due.has(work)) requestAnimationFrame(() => due.delete(work) && work());
  due.add(work);
}

function showState(kind, what, offer = '', untilMs = 0) {
  state = { kind, untilMs };
  $('state').dataset.kind = kind;
  $('what').textContent = what;
  $('again').hidden = !offer;
  $('again').textContent = offer;
  countDown();
  showUnsent();
  showPeople();
}

function countDown() {
  const leftS = Math.max(1, Math.ceil((state.untilMs - Date.now()) / 1000));
  $('countdown').textContent = state.kind === 'waiting' ? ` in ${leftS} s` : '';
}

function notify(text) {
  $('notice').firstElementChild.textContent = text;
  $('notice').hidden = !text;
}

function clear() {
  $('messages').replaceChildren();
  $('log').ariaBusy = 'true';
}

function showMessage({ offset = 0, time = Date.now(), info, data }) {
  const list = $('messages');
  let before = list.lastElementChild;
  while (offset && Number(before?.dataset.offset) > offset) before = before.previousElementSibling;
  if (offset && Number(before?.dataset.offset) === offset) return;
  // Anybody may publish any JSON here, so nothing is taken for granted.
  const given = data ?? {};
  const name = (typeof given.name === 'string' && given.name.trim().slice(0, 40)) || (info ? 'Guest' : 'Server');
  const text = [given.text, given].find((it) => typeof it === 'string') ?? JSON.stringify(data);
  const item = $('message').content.firstElementChild.cloneNode(true);
  const [face, by, body] = item.children;
  const at = new Date(time);
  const dateStyle = at.toDateString() === new Date().toDateString() ? undefined : 'medium';
  Object.assign(item.dataset, { offset, client: info?.client ?? '' });
  face.textContent = Array.from(name)[0].toUpperCase();
  face.dataset.hue = Array.from(name).reduce((sum, sign) => sum + sign.codePointAt(0), 0) % 6;
  by.firstElementChild.textContent = name;
  by.lastElementChild.textContent = at.toLocaleString(undefined, { dateStyle, timeStyle: 'short' });
  by.lastElementChild.dateTime = at.toISOString();
  body.textContent = text;
  if (before) before.after(item);
  else list.prepend(item);
  if (list.childElementCount > SHOWN) list.firstElementChild.remove();
  outbox.came(given.id);
  soon(showPeople);
}

function showUnsent() {
  const waiting = outbox.items.filter(({ channel, shown }) => channel === room.channel && !shown);
  const items = waiting.map(({ failed, data }) => {
    const [item, text, note] = ['li', 'p', 'small'].map((tag) => document.createElement(tag));
    text.textContent = data.text;
    note.textContent = failed ? `Not sent: ${failed}` : connection.live ? 'Sending…' : 'Waits for the connection';
    item.append(text, note);
    return item;
  });
  $('unsent').replaceChildren(...items);
  soon(settle);
}

function showPeople() {
  const speakers = Array.from($('messages').children, ({ dataset, children: [, by] }) => [
    dataset.client,
    by.firstElementChild.textContent,
  ]);
  const names = new Map([...speakers, [connection.client, `${$('name').value || 'Guest'} (you)`]]);
  const here = connection.live ? [...(room.here ?? [])] : [];
  const items = here.slice(0, 100).map((client) => {
    const item = document.createElement('li');
    item.textContent = names.get(client) ?? `Guest ${client.slice(0, 4)}`;
    return item;
  });
  const count = room.here ? `${here.length} here` : 'Who is here is not known';
  $('count').textContent = connection.live ? count : 'Not connected';
  $('people').replaceChildren(...items);
}

function settle() {
  if (atEnd) $('log').scrollTop = $('log').scrollHeight;
  $('down').hidden = atEnd;
}

function roomOfHash() {
  const hash = location.hash.slice(1) || 'lobby';
  let name = hash;
  try {
    name = decodeURIComponent(hash);
  } catch {} // a lone % stands for itself
  document.title = `${name} – Waterspout`;
  $('room').value = name;
  return new Room(name);
}

addEventListener('hashchange', () => {
  const left = { channel: room.channel };
  room = roomOfHash();
  clear();
  notify('');
  if (!connection.live) return;
  connection.ask({ unsubscribe: left }).catch(({ code }) => code === LOST || connection.drop());
  room.join();
});
addEventListener('online', () => state.kind === 'waiting' && connection.open());
$('again').onclick = () => (state.kind === 'outside' ? room.join() : connection.open());
$('notice').lastElementChild.onclick = () => notify('');
$('go').onsubmit = (event) => {
  event.preventDefault();
  location.hash = encodeURIComponent($('room').value.trim() || 'lobby');
  $('text').focus();
};
$('name').oninput = () => {
  keep('localStorage', 'name', $('name').value);
  soon(showPeople);
};
$('say').onsubmit = (event) => {
  event.preventDefault();
  const text = $('text').value.trim();
  if (!text) return;
  atEnd = true;
  outbox.add(room.channel, $('name').value.trim() || 'Guest', text);
  $('text').value = '';
  $('text').focus();
};
$('text').onkeydown = (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $('say').requestSubmit();
};
$('log').onscroll = () => {
  const { scrollTop, scrollHeight, clientHeight } = $('log');
  atEnd = scrollHeight - scrollTop - clientHeight < 40 || (atEnd && scrollTop >= scrolledTo);
  scrolledTo = scrollTop;
  $('down').hidden = atEnd;
};
$('down').onclick = () => settle((atEnd = true));
new ResizeObserver(() => soon(settle)).observe($('log'));
setInterval(countDown, 500);
setInterval(() => state.kind === 'live' && room.refresh(), PRESENCE_MS);

$('name').value = recall('localStorage', 'name') ?? `Guest ${100 + Math.floor(Math.random() * 900)}`;
keep('localStorage', 'name', $('name').value);
const connection = new Connection({
  state: (kind, why, untilMs) =>
    ({
      connecting: () => showState('connecting', 'Connecting…'),
      waiting: () => showState('waiting', 'Reconnecting', 'Try now', untilMs),
      ended: () => showState('ended', `Disconnected: ${why}`, 'Connect again'),
    })[kind](),
  live() {
    if (room.outside) room.stayOutside(room.outside);
    else room.join();
    outbox.flush();
  },
  push: (push) => room.take(push),
  invalidated: () => room.forget(),
});
const outbox = new Outbox();
let room = roomOfHash();
connection.open();
