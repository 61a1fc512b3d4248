// A connection that speaks the client protocol, JSON over one WebSocket after another.  It knows neither rooms nor pages.
// Clauses are those of server/PROTOCOL.md, here 2.3, 2.4, 3.1 and 7.2.

const REPLY_MS = 5_000; // for a command to be answered
const OPEN_MS = 10_000; // for a connection to open and connect
const PING_GRACE_MS = 10_000; // beyond the ping interval without a sign of life
export const [LOST, TIMED_OUT] = [1, 2]; // our own codes are below 100 and mean "try again", as in the SDKs

export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
export const backoff = (attempt) => 200 + Math.random() * Math.min(20_000, 500 * 2 ** attempt);
const terminal = (code) => (code >= 3500 && code < 4000) || (code >= 4500 && code < 5000) || code === 1009;

/** A command was answered with "no" or not at all; a `temporary` one may be asked again (7.1). */
class Refused extends Error {
  constructor(code, message, temporary = code < 100 || code === 109) {
    super(`${message} (${code})`);
    Object.assign(this, { code, temporary });
  }
}

/** Connects, answers pings, and comes back by itself until a code says to stay away.
 *
 * `hears` is told what happens: `state(kind, why, untilMs)` with kind "connecting", "waiting" or "ended"; `live()` once
 * connect was answered; `push(push)`; and `invalidated()`, when all positions are void.
 */
export class Connection {
  url = new URL('/connection/websocket', location.href.replace(/^http/, 'ws'));
  socket = null;
  live = false; // connect was answered
  client = ''; // our id on this connection
  #id = 0;
  #attempt = 0;
  #asked = new Map();
  #timer = 0;

  constructor(hears) {
    this.hears = hears;
  }

  open() {
    clearTimeout(this.#timer);
    this.hears.state('connecting');
    const socket = (this.socket = new WebSocket(this.url));
    this.#timer = setTimeout(() => this.drop(), OPEN_MS);
    socket.onopen = () =>
      this.ask({ connect: { name: 'chat' } }, (hello) => this.#welcome(hello)).catch((error) => {
        if (socket === this.socket) this.drop(error.temporary ? 0 : 3500, error.message);
      });
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      this.#heard();
      for (const line of data.split('\n')) this.#take(JSON.parse(line));
    };
    socket.onclose = ({ code, reason }) => socket === this.socket && this.drop(code, `${reason} (${code})`);
  }

  /** Send a command; `atOnce` gets the result before anything else that came in the same frame is looked at. */
  ask(command, atOnce = () => {}) {
    return new Promise((resolve, reject) => {
      if (this.socket?.readyState !== WebSocket.OPEN) return reject(new Refused(LOST, 'not connected'));
      const id = ++this.#id;
      const timer = setTimeout(() => this.#asked.get(id).finish(new Refused(TIMED_OUT, 'no answer')), REPLY_MS);
      const finish = (error, result) => {
        clearTimeout(timer);
        this.#asked.delete(id);
        if (error) return reject(error);
        atOnce(result);
        resolve(result);
      };
      this.#asked.set(id, { method: Object.keys(command)[0], finish });
      this.socket.send(JSON.stringify({ id, ...command }));
    });
  }

  /** End what is left of the connection; then come back after a while, or stay away if the code says so. */
  drop(code = 0, why = '') {
    const { socket } = this;
    this.socket = null; // whatever the old one still says is ignored
    this.live = false;
    clearTimeout(this.#timer);
    socket?.close();
    for (const { finish } of [...this.#asked.values()]) finish(new Refused(LOST, 'connection lost'));
    if (code === 3014) this.hears.invalidated();
    if (terminal(code)) return this.hears.state('ended', why);
    const waitMs = backoff(this.#attempt++);
    this.hears.state('waiting', why, Date.now() + waitMs);
    this.#timer = setTimeout(() => this.open(), waitMs);
  }

  #welcome({ client, ping = 0, pong = false }) {
    Object.assign(this, { client, pong, live: true, silenceMs: ping && ping * 1000 + PING_GRACE_MS });
    this.#attempt = 0;
    clearTimeout(this.#timer);
    this.#heard();
    this.hears.live();
  }

  #heard() {
    if (!this.live || !this.silenceMs) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.drop(), this.silenceMs);
  }

  #take({ id, push, error, ...results }) {
    const asked = this.#asked.get(id); // missing if it timed out
    if (push) this.hears.push(push);
    else if (error) asked?.finish(new Refused(error.code, error.message, error.temporary));
    else if (id) asked?.finish(null, results[asked.method]);
    else if (this.pong) this.socket?.send('{}');
  }
}
