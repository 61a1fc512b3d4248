// The protocol over server-sent events (2.5), for client.js where a WebSocket cannot be had: what the server says comes
// through one EventSource, what the client says goes in requests, one after another, so that none overtakes another.
// Types are in transport-sse.d.ts.
//
// A browser comes back by itself when an EventSource breaks, with the URL of the first time: an old token, an old
// position.  So it is closed at the first sign of trouble, and the client comes back with what is true then.

const POST_MS = 10_000; // for a request to be answered
const POST_UNITS = 20_000; // of text in one, unless a single command is longer: below 64 KB in whatever letters
const [OPEN, CLOSED] = [1, 3];

export class Sse {
  #stream;
  #emulation;

  constructor({ stream = '/connection/sse', emulation = '/emulation' } = {}) {
    this.#stream = stream;
    this.#emulation = emulation;
  }

  open(url) {
    const base = String(url).replace(/^ws/, 'http');
    return new SseSocket(new URL(this.#stream, base), new URL(this.#emulation, base));
  }
}

class SseSocket {
  readyState = 0;
  onopen = null;
  onmessage = null;
  onclose = null;
  #stream;
  #emulation;
  #events = null;
  #address = null; // {session, node}, from the connect reply
  #lines = []; // that wait
  #posting = null; // what is under way

  constructor(stream, emulation) {
    this.#stream = stream;
    this.#emulation = emulation;
    queueMicrotask(() => {
      if (this.readyState) return;
      this.readyState = OPEN;
      this.onopen?.({});
    });
  }

  get bufferedAmount() {
    return this.#lines.reduce((sum, { length }) => sum + length, this.#posting?.length ?? 0);
  }

  send(text) {
    if (!this.#events) return this.#listen(text); // the connect command
    this.#lines.push(text);
    this.#post();
  }

  close() {
    this.readyState = CLOSED;
    this.#events?.close();
  }

  #listen(connect) {
    const url = new URL(this.#stream);
    url.searchParams.set('cf_connect', connect);
    this.#events = new EventSource(url);
    this.#events.onmessage = ({ data }) => this.#hear(data);
    this.#events.onerror = () => (this.#address ? this.#end(1006, '') : this.#fail());
  }

  #hear(data) {
    this.onmessage?.({ data }); // which closes this if it is not JSON, or another than it hoped for
    if (this.readyState !== OPEN) return;
    if (this.#address && !data.includes('"disconnect"')) return; // parsed once, by the client
    const { connect, push } = JSON.parse(data);
    if (connect) {
      this.#address = { session: connect.session, node: connect.node };
      this.#post();
    } else if (push?.disconnect) this.#end(push.disconnect.code, push.disconnect.reason);
  }

  /** It never began, and an EventSource does not say why: whether there is such a path can be asked. */
  async #fail() {
    this.#events.close();
    let status = 0;
    try {
      ({ status } = await fetch(this.#stream, { signal: AbortSignal.timeout(POST_MS) }));
    } catch {} // nobody is there
    if (status === 404) this.#end(3508, 'no server-sent events here');
    else this.#end(1006, '');
  }

  /** What is said in one turn goes in one request, and so does what gathers behind that. */
  async #post() {
    if (!this.#address || this.#posting !== null) return;
    this.#posting = '';
    await null;
    while (this.#lines.length && this.readyState === OPEN) {
      let count = 1;
      for (let units = this.#lines[0].length; (units += this.#lines[count]?.length) <= POST_UNITS; ) count++;
      this.#posting = this.#lines.splice(0, count).join('\n');
      const status = await this.#carry(this.#posting);
      if (status === 413) this.#end(1009, 'message too big');
      else if (status !== 204) this.#end(1006, '');
    }
    this.#posting = null;
  }

  /** The status of the answer, 0 if there is none. */
  async #carry(data) {
    const headers = { 'Content-Type': 'application/json' };
    const body = JSON.stringify({ ...this.#address, data });
    const signal = AbortSignal.timeout(POST_MS);
    try {
      return (await fetch(this.#emulation, { method: 'POST', headers, body, signal })).status;
    } catch {
      return 0;
    }
  }

  #end(code, reason) {
    if (this.readyState === CLOSED) return;
    this.close();
    this.onclose?.({ code, reason });
  }
}
