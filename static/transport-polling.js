// Polling, for client.js where no connection lasts: the client's commands are answered out of requests to /v1 (17.1,
// 17.2), and a channel is followed by asking what is behind its position, so that nothing is missed and nothing comes
// twice.  Types, and what polling cannot, are in transport-polling.d.ts.
//
// Each followed channel has a task of its own, which alone moves its position.  One channel, the first, is waited for;
// the others are asked now and then, since a browser has six connections to a server, for all its tabs.

const WAIT_S = 25; // for the first channel
const EVERY_MS = 5_000; // the others are asked, or a little more often, so that they do not all ask at once
const ANSWER_MS = 10_000; // beyond what a request was told to wait
const MOST = 2 ** 31 - 1;
const [OPEN, CLOSED] = [1, 3];

const BAD_REQUEST = { code: 107, message: 'bad request' };
const NOT_AVAILABLE = { code: 108, message: 'not available by polling' };
const GONE = 112;
const TOKEN_EXPIRED = 109;
const TEMPORARY = [408, 429, 500, 503];
const OF_THE_CHANNEL = [102, 103, 106, 107, 108]; // refusals that say nothing about who asks

const backoff = (attempt) => 200 + Math.random() * Math.min(20_000, 500 * 2 ** attempt);
const cursor = ({ epoch, offset }) => `${epoch}:${offset}`;

/** Resolves after a while, or when `signal` is aborted. */
function pause(ms, signal) {
  return new Promise((resolve) => {
    setTimeout(resolve, ms);
    signal.addEventListener('abort', resolve);
  });
}

export class Polling {
  #first = '';
  #socket = null;

  turnTo(channel) {
    const before = this.#first;
    this.#first = channel;
    if (before !== channel) this.#socket?.turn(before, channel);
  }

  open(url) {
    if (!this.#first) throw new Error('expected turnTo(channel) before connecting');
    this.#socket = new PollingSocket(String(url).replace(/^ws/, 'http'), () => this.#first);
    return this.#socket;
  }
}

class PollingSocket {
  readyState = 0;
  bufferedAmount = Infinity; // what is only said is not worth a request
  onopen = null;
  onmessage = null;
  onclose = null;
  #url;
  #first;
  #token;
  #connected = false;
  #over = new AbortController();
  #followed = new Map(); // channel -> {channel, position, turn}: abort `turn`, and its task looks again what to do

  constructor(url, first) {
    this.#url = url;
    this.#first = first;
    queueMicrotask(() => {
      if (this.readyState) return;
      this.readyState = OPEN;
      this.onopen?.({});
    });
  }

  send(text) {
    const { id, ...command } = JSON.parse(text);
    const [[method, request]] = Object.entries(command);
    this.#answer(id, method, request);
  }

  close() {
    this.readyState = CLOSED;
    this.#over.abort();
    for (const channel of this.#followed.keys()) this.#unfollow(channel);
  }

  /** Another channel is the first. */
  turn(...channels) {
    for (const channel of channels) this.#followed.get(channel)?.turn.abort();
  }

  // --- commands ---
  async #answer(id, method, request) {
    let reply;
    try {
      reply = { [method]: await this.#carryOut(method, request) };
    } catch (error) {
      reply = { error: error instanceof Error ? BAD_REQUEST : error };
    }
    this.#say({ id, ...reply });
  }

  async #carryOut(method, request) {
    switch (method) {
      case 'connect':
        return this.#connect(request);
      case 'refresh':
        this.#token = request.token;
        return {};
      case 'subscribe':
        return this.#subscribe(request);
      case 'unsubscribe':
        this.#unfollow(request.channel);
        return {};
      case 'publish':
        await this.#publish(request);
        return {};
      case 'rpc':
        if (request.method !== 'publish') throw NOT_AVAILABLE;
        return { data: await this.#publish(request.data) };
      case 'history':
        return this.#history(request);
      case 'presence':
        return this.#presence(request);
      case 'presence_stats': {
        const infos = Object.values((await this.#presence(request)).presence);
        return { num_clients: infos.length, num_users: new Set(infos.map(({ user }) => user)).size };
      }
      default:
        throw NOT_AVAILABLE;
    }
  }

  /** Whether the server is there, and knows us; whether it has the channel is told to who subscribes. */
  async #connect({ token }) {
    this.#token = token;
    try {
      await this.#read(this.#first(), { limit: 0 });
    } catch (refusal) {
      if (!OF_THE_CHANNEL.includes(refusal.code)) throw refusal;
    }
    this.#connected = true;
    return { client: '' };
  }

  async #publish({ channel, data, idempotency_key: key }) {
    const headers = { 'Content-Type': 'application/json' };
    if (key && !/^[ -~]{1,256}$/.test(key)) throw BAD_REQUEST;
    if (key) headers['Idempotency-Key'] = `"${key.replace(/["\\]/g, '\\$&')}"`;
    const { epoch, offset } = await this.#ask(channel, 'publications', {
      method: 'POST',
      headers,
      body: JSON.stringify({ data }),
    });
    return { epoch, offset };
  }

  /** Newest first, or the position only: forwards from the oldest that is kept is nothing that /v1 can be asked. */
  async #history({ channel, limit = 0, since, reverse }) {
    if (!limit) return { publications: [], ...(await this.#read(channel, { limit: 0 })) };
    if (!reverse) throw NOT_AVAILABLE;
    const query = { limit: limit < 0 ? MOST : limit, reverse: true };
    if (since) query.since = cursor(since);
    try {
      return await this.#read(channel, query);
    } catch (refusal) {
      if (refusal.code !== GONE || refusal.position.epoch !== since.epoch) throw refusal;
      return { publications: [], ...refusal.position };
    }
  }

  async #presence({ channel }) {
    const { presence } = await this.#ask(channel, 'presence');
    return { presence };
  }

  // --- channels ---
  async #subscribe({ channel, token, recover, offset = 0, epoch = '' }) {
    if (token) throw NOT_AVAILABLE;
    const since = { offset, epoch };
    const followed = { channel, position: since, turn: new AbortController() };
    this.#unfollow(channel);
    this.#followed.set(channel, followed);
    const result = { recoverable: true, positioned: true };
    try {
      if (!recover) {
        followed.position = await this.#read(channel, { limit: 0 });
      } else {
        const { publications, ...position } = await this.#read(channel, { since: cursor(since) });
        followed.position = position;
        Object.assign(result, { was_recovering: true, recovered: true, publications });
      }
    } catch (refusal) {
      if (refusal.code !== GONE || !recover) {
        if (this.#follows(followed)) this.#unfollow(channel);
        throw refusal;
      }
      followed.position = refusal.position;
      result.was_recovering = true;
    }
    this.#follow(followed); // whatever it finds comes from the network, hence behind the reply
    const { position } = followed;
    return { ...result, epoch: position.epoch, offset: result.recovered ? offset : position.offset };
  }

  #follows(followed) {
    return this.#followed.get(followed.channel) === followed;
  }

  #unfollow(channel) {
    const followed = this.#followed.get(channel);
    this.#followed.delete(channel);
    followed?.turn.abort();
  }

  /** The task of a channel: ask what is behind its position, and pass it on, until the channel is given up. */
  async #follow(followed) {
    const { channel } = followed;
    for (let attempt = 0, more = false; this.#follows(followed); ) {
      const { signal } = (followed.turn = new AbortController());
      const isFirst = channel === this.#first();
      try {
        if (!isFirst && !more) await pause(EVERY_MS * (0.6 + 0.4 * Math.random()), signal);
        const patience = { signal, waitS: isFirst ? WAIT_S : 0 };
        const { publications, ...position } = await this.#read(channel, { since: cursor(followed.position) }, patience);
        if (!this.#follows(followed)) return; // also at the end of everything
        followed.position = position;
        for (const pub of publications) if (this.#follows(followed)) this.#say({ push: { channel, pub } });
        more = publications.length > 0;
        attempt = 0;
      } catch (refusal) {
        if (signal.aborted) continue;
        if (refusal.temporary) await pause(backoff(attempt++), signal);
        else this.#lose(followed, refusal);
      }
    }
  }

  #lose(followed, { code, message }) {
    if (!this.#follows(followed)) return;
    const { channel } = followed;
    this.#unfollow(channel);
    const unsubscribe = code === GONE ? { code: 2500, reason: 'insufficient state' } : { code: 2000, reason: message };
    this.#say({ push: { channel, unsubscribe } });
  }

  // --- requests ---
  /** A page: its publications, if any are wanted, and its end, or in reverse the top of the channel. */
  async #read(channel, query, patience) {
    const what = `publications?${new URLSearchParams(query)}`;
    const { publications, epoch, offset, top } = await this.#ask(channel, what, patience);
    if (!Array.isArray(publications)) this.#end(1006, ''); // some portal's JSON
    if (query.limit === 0) return { epoch, offset };
    return query.reverse ? { publications, ...top } : { publications, epoch, offset };
  }

  /**
   * What the server answers.  Throws what it refuses with (17.1.5), as an error of the protocol with the `position`
   * that is told with it; where nobody answers, or it ends more than this request, everything here ends.
   */
  async #ask(channel, what, { waitS = 0, signal, headers, ...request } = {}) {
    const patience = new AbortController();
    const timer = setTimeout(() => patience.abort(), waitS * 1000 + ANSWER_MS);
    const ends = [this.#over.signal, patience.signal, signal].filter(Boolean);
    const asked = new URL(`/v1/channels/${encodeURIComponent(channel)}/${what}`, this.#url);
    let response;
    let answer;
    try {
      response = await fetch(asked, {
        ...request,
        headers: {
          ...headers,
          ...(this.#token && { Authorization: `Bearer ${this.#token}` }),
          ...(waitS && { Prefer: `wait=${waitS}` }),
        },
        cache: 'no-store',
        signal: AbortSignal.any(ends),
      });
      answer = Object(await response.json());
    } catch (error) {
      if (!signal?.aborted) this.#end(1006, '');
      throw error;
    } finally {
      clearTimeout(timer);
    }
    const [, epoch = '', offset = 0] = /"([^":]*):(\d+)"/.exec(response.headers.get('ETag')) ?? [];
    if (response.ok) return { ...answer, top: { epoch, offset: Number(offset) } };
    const { code, title: message } = answer;
    if (!code) this.#end(...(response.status === 404 ? [3508, 'no polling here'] : [1006, '']));
    else if (code === 101) this.#end(3501, message);
    else if (code === TOKEN_EXPIRED && this.#connected) this.#end(3005, 'connection expired');
    else if (code >= 3000) this.#end(code, message);
    const temporary = TEMPORARY.includes(response.status);
    throw { code, message, temporary, position: { epoch: answer.epoch, offset: answer.offset } };
  }

  #say(message) {
    if (this.readyState === OPEN) this.onmessage?.({ data: JSON.stringify(message) });
  }

  #end(code, reason) {
    if (this.readyState === CLOSED) return;
    this.close();
    this.onclose?.({ code, reason });
  }
}
