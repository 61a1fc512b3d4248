// The browser's client: one module, no dependencies, JSON over one WebSocket after another.  Types are in client.d.ts,
// clauses are those of server/PROTOCOL.md.  Where no WebSocket can be had, a transport gives what behaves like one:
// transport-sse.js, transport-polling.js.  For Protobuf and other languages there are the SDKs.
//
// Two state machines: a client is disconnected, connecting or connected, and each of its subscriptions unsubscribed,
// subscribing or subscribed.  State changes first and is told afterwards; whatever waited (for a token, a reply, a timer)
// looks whether it is still its turn.  Members that begin with _ are for this module alone.

const REPLY_MS = 5_000; // for a command to be answered
const OPEN_MS = 10_000; // for a token to come, and a connection to open and connect
const PING_GRACE_MS = 10_000; // beyond the ping interval without a sign of life (2.4)
const STEADY_MS = 5_000; // a connection that lasted so long was a good one: the next attempt comes soon
const TIMER_MS = 2 ** 31 - 1; // what setTimeout can count
const SAY_BYTES = 65_536; // waiting in the socket: what is said beyond them is dropped

/** Our own codes, of errors and of events, stay below 100, where the server has none (7.1 to 7.3). */
export const CODES = Object.freeze({
  CALLED: 0, // the application asked for it
  TIMED_OUT: 1, // no reply: the outcome is unknown
  LOST: 2, // the connection ended, or did not open; for a command: before the reply, so the outcome is unknown
  NOT_CONNECTED: 3, // nothing was sent
  NO_TOKEN: 4, // getToken failed, or gave nothing
  SILENT: 5, // no ping came
  UNUSABLE: 6, // the browser opens no WebSocket to this address, or what comes through it is not our protocol
});
const EXPIRED = 109;
const WEBSOCKET = { open: (url) => new WebSocket(url) }; // throws where the browser forbids it

/** 7.2.1, and 1009: what was too large once will be so again. */
const forGood = (code) => (code >= 3500 && code < 4000) || (code >= 4500 && code < 5000) || code === 1009;

/** Milliseconds before attempt number `attempt`, from 0: random, so that a thousand clients do not come back at once. */
const backoff = (attempt) => 200 + Math.random() * Math.min(20_000, 500 * 2 ** attempt);

/** What became of a command; `temporary` says that trying again may help (7.1). */
export class ClientError extends Error {
  name = 'ClientError';

  constructor(code, message, temporary = code < 100 || code === EXPIRED) {
    super(message);
    this.code = code;
    this.temporary = Boolean(temporary);
  }
}

const asInfo = (info) =>
  info && { user: info.user, client: info.client, connInfo: info.conn_info, chanInfo: info.chan_info };
const asPublication = ({ data, offset, info, tags, time }) => ({ data, offset, info: asInfo(info), tags, time });
const asPosition = ({ positioned, offset = 0, epoch = '' }) => (positioned ? { offset, epoch } : null);
const behind = (position, { offset, epoch }) =>
  position && offset ? { offset, epoch: epoch || position.epoch } : position;

class Speaker {
  #hearers = new Map();
  _end = new ClientError(CODES.NOT_CONNECTED, 'not connected'); // why it is where it does not come back from by itself

  on(event, callback) {
    if (!this.#hearers.has(event)) this.#hearers.set(event, new Set());
    const hearers = this.#hearers.get(event);
    const hearer = (context) => callback(context); // one of its own, so that a callback may be registered twice
    hearers.add(hearer);
    return () => void hearers.delete(hearer);
  }

  /** Resolves when the state is `wanted`, rejects with `_end` when it is `ended`. */
  _reach(wanted, ended) {
    return new Promise((resolve, reject) => {
      const offs = [];
      const look = () => {
        if (this.state !== wanted && this.state !== ended) return;
        for (const off of offs) off();
        if (this.state === wanted) resolve();
        else reject(this._end);
      };
      offs.push(this.on(wanted, look), this.on(ended, look));
      look();
    });
  }

  /** Call all who listen.  One that throws is reported as any uncaught error is, and costs nobody else anything. */
  _tell(event, context) {
    for (const hearer of [...(this.#hearers.get(event) ?? [])]) {
      try {
        hearer(context);
      } catch (error) {
        reportError(error);
      }
    }
  }
}

// --- a token: where it comes from, and when it is renewed (8.3, 8.4) -------------------------------------------------
class Token {
  #getToken;
  #about;
  #timer = 0;

  constructor({ token, getToken } = {}, about = {}) {
    this.value = token || undefined;
    this.#getToken = getToken;
    this.#about = about;
  }

  /** Whether one must be fetched before anything else can be done. */
  get missing() {
    return !this.value && Boolean(this.#getToken);
  }

  /** Throws `NO_TOKEN`, for good if `getToken` gives nothing or throws what says `temporary: false`. */
  async fetch() {
    let value;
    try {
      value = await this.#getToken(this.#about);
    } catch (error) {
      throw new ClientError(CODES.NO_TOKEN, error?.message || 'no token', error?.temporary !== false);
    }
    if (!value) throw new ClientError(CODES.NO_TOKEN, 'unauthorized', false);
    this.value = value;
  }

  /** The server takes this one no more; returns whether there may be another. */
  expired() {
    if (this.#getToken) this.value = undefined;
    return this.missing;
  }

  /** In good time before it expires get another and `use` it, which gives the next expiry; `fail` hears what is final. */
  renew({ expires, ttl = 0 }, use, fail) {
    this.rest();
    if (expires && this.#getToken) this.#renewIn(ttl * 800, 0, use, fail);
  }

  rest() {
    clearTimeout(this.#timer);
    this.#timer = 0;
  }

  #renewIn(ms, attempt, use, fail) {
    const timer = setTimeout(async () => {
      const over = () => timer !== this.#timer;
      try {
        await this.fetch();
        const expiry = over() || (await use(this.value));
        if (!over()) this.renew(expiry, use, fail);
      } catch (error) {
        if (over()) return;
        if (error.temporary) this.#renewIn(backoff(attempt), attempt + 1, use, fail);
        else fail(error);
      }
    }, Math.min(ms, TIMER_MS));
    this.#timer = timer;
  }
}

// --- one subscription of ours (4.2, 4.3, 7.3, 11) --------------------------------------------------------------------
export class Subscription extends Speaker {
  channel;
  state = 'unsubscribed';
  position = null;
  #link; // {client, ask(command, atOnce), drop(code, reason)}
  #options = {};
  #token = new Token();
  #from = null; // the position to recover from
  #counting = false; // the application counts on a recovery, so it is told if there was none
  #turn = 0;
  #attempt = 0;
  #timer = 0;

  constructor(channel, link) {
    super();
    this.channel = channel;
    this.#link = link;
  }

  ready() {
    return this._reach('subscribed', 'unsubscribed');
  }

  unsubscribe() {
    this.#leave(CODES.CALLED, 'unsubscribe called');
  }

  publish(data) {
    return this.#link.client.publish(this.channel, data);
  }

  history(options) {
    return this.#link.client.history(this.channel, options);
  }

  presence() {
    return this.#link.client.presence(this.channel);
  }

  presenceStats() {
    return this.#link.client.presenceStats(this.channel);
  }

  _start(options) {
    if (this.state !== 'unsubscribed') return;
    if (options) {
      this.#options = options;
      this.#token = new Token(options, { channel: this.channel });
    }
    this.state = 'subscribing';
    this.position = this.#from = options?.since ?? null;
    this.#counting = Boolean(this.#from);
    this.#attempt = 0;
    this._tell('subscribing', { code: CODES.CALLED, reason: 'subscribe called' });
    this._join();
  }

  /** Ask the server, again and again while its answer is a temporary no; to be called on every connection. */
  async _join() {
    if (this.state !== 'subscribing' || this.#link.client.state !== 'connected') return;
    const turn = ++this.#turn;
    clearTimeout(this.#timer);
    try {
      if (this.#token.missing) await this.#token.fetch();
      if (turn !== this.#turn) return;
      const { joinLeave: join_leave, recoverable } = this.#options;
      const { channel } = this;
      const since = this.#from && { recover: true, ...this.#from };
      const subscribe = { channel, token: this.#token.value, join_leave, recoverable, ...since };
      await this.#link.ask({ subscribe }, (result) => turn === this.#turn && this.#joined(result));
    } catch (error) {
      if (turn !== this.#turn) return;
      if (error.code === CODES.TIMED_OUT) return this.#link.drop(error.code, 'subscribe was not answered');
      if (!error.temporary || (error.code === EXPIRED && !this.#token.expired())) this.#end(error.code, error.message);
      else this.#timer = setTimeout(() => this._join(), backoff(this.#attempt++));
    }
  }

  /** It holds no more, but is to come back: from where it stood, unless positions are void. */
  _lose(code, reason, invalidated = false) {
    this.#stop();
    if (invalidated) this.#from = null;
    if (this.state !== 'subscribed') return;
    this.#from = this.#counting && !invalidated ? this.position : null;
    this.state = 'subscribing';
    this._tell('subscribing', { code, reason });
  }

  _take({ pub, join, leave, unsubscribe }) {
    if (this.state !== 'subscribed') return; // of the life before, while the next is asked for
    if (pub) this.#show(pub);
    if (join) this._tell('join', { info: asInfo(join.info) });
    if (leave) this._tell('leave', { info: asInfo(leave.info) });
    if (!unsubscribe) return;
    const { code, reason } = unsubscribe;
    if (code < 2500) return this.#end(code, reason);
    if (code === 2501) this.#token.expired();
    this._lose(code, reason, code === 2502);
    this._join();
  }

  #joined(result) {
    const turn = this.#turn;
    const wasRecovering = this.#counting;
    this.state = 'subscribed';
    this.position = asPosition(result);
    this.#from = null;
    this.#counting = Boolean(result.recoverable);
    this.#attempt = 0;
    this.#token.renew(
      result,
      (token) => this.#link.ask({ sub_refresh: { channel: this.channel, token } }),
      ({ code, message }) => this.#leave(code, message),
    );
    const { position } = this;
    this._tell('subscribed', { recovered: Boolean(result.recovered), wasRecovering, position, data: result.data });
    for (const publication of result.publications ?? []) if (turn === this.#turn) this.#show(publication);
  }

  #show(publication) {
    this.position = behind(this.position, publication);
    this._tell('publication', asPublication(publication));
  }

  /** End it and let the server know. */
  #leave(code, reason) {
    if (this.state === 'unsubscribed') return;
    this.#end(code, reason);
    this.#link.ask({ unsubscribe: { channel: this.channel } }).catch((error) => {
      if (error.code === CODES.TIMED_OUT) this.#link.drop(error.code, 'unsubscribe was not answered');
    });
  }

  #end(code, reason) {
    this.#stop();
    this._end = new ClientError(code, reason, false);
    this.state = 'unsubscribed';
    this._tell('unsubscribed', { code, reason });
  }

  #stop() {
    this.#turn++;
    clearTimeout(this.#timer);
    this.#token.rest();
  }
}

// --- the client (2.3, 2.4, 3, 4, 5, 7.2) -----------------------------------------------------------------------------
export class Client extends Speaker {
  state = 'disconnected';
  id = '';
  #url;
  #options;
  #token;
  #socket = null;
  #turn = 0; // of attempts to connect
  #attempt = 0; // in a row that failed
  #waiting = false; // for the next attempt
  #timer = 0; // of that, of the attempt, or of the next sign of life
  #lastId = 0;
  #asked = new Map(); // command id -> {method, finish}
  #subscriptions = new Map(); // channel -> Subscription
  #serverSide = new Map(); // channel -> position, or null
  #since = 0; // when it connected
  #silenceMs = 0;
  #pongs = false;

  constructor(url = '/connection/websocket', options = {}) {
    super();
    this.#url = new URL(url, globalThis.location?.href);
    this.#url.protocol = this.#url.protocol.replace('http', 'ws');
    this.#options = options;
    this.#token = new Token(options);
  }

  connect() {
    if (this.state === 'disconnected') {
      globalThis.addEventListener?.('online', this.#online);
      globalThis.addEventListener?.('offline', this.#offline);
    } else if (!this.#waiting) return;
    const turn = ++this.#turn;
    this.state = 'connecting';
    this.#attempt = 0;
    this.#waiting = false;
    clearTimeout(this.#timer);
    this._tell('connecting', { code: CODES.CALLED, reason: 'connect called', delayMs: 0 });
    if (turn === this.#turn) this.#open();
  }

  ready() {
    return this._reach('connected', 'disconnected');
  }

  disconnect() {
    this.#drop(CODES.CALLED, 'disconnect called', true);
  }

  /** Another token of the same user, or none: then it is fetched when the next is needed. */
  async setToken(token) {
    this.#token.value = token || undefined;
    if (token && this.state === 'connected') this.#renew(await this.#ask({ refresh: { token } }));
  }

  /** Another way to the server, without a gap: what was missed meanwhile is recovered as after any other cut. */
  setTransport(transport) {
    this.#options = { ...this.#options, transport };
    if (this.state === 'disconnected') return;
    this.#drop(CODES.CALLED, 'another transport', false);
    if (this.#waiting) this.connect();
  }

  subscribe(channel, options) {
    let subscription = this.#subscriptions.get(channel);
    if (!subscription) {
      const link = { client: this, ask: this.#ask.bind(this), drop: this.#drop.bind(this) };
      subscription = new Subscription(channel, link);
      this.#subscriptions.set(channel, subscription);
    }
    subscription._start(options);
    return subscription;
  }

  async publish(channel, data) {
    await this.#command({ publish: { channel, data } });
  }

  async publishOnce(channel, data, key) {
    return this.rpc('publish', { channel, data, idempotency_key: key });
  }

  /** Publish without a word of what becomes of it. */
  say(channel, data) {
    if (this.state !== 'connected' || this.#socket.bufferedAmount > SAY_BYTES) return false;
    this.#send({ id: ++this.#lastId, publish: { channel, data } });
    return true;
  }

  async rpc(method, data) {
    return (await this.#command({ rpc: { method, data } })).data;
  }

  async history(channel, { limit = 0, since, reverse } = {}) {
    const result = await this.#command({ history: { channel, limit, since: since ?? undefined, reverse } });
    const { publications = [], offset = 0, epoch = '' } = result;
    return { publications: publications.map(asPublication), offset, epoch };
  }

  async presence(channel) {
    const { presence = {} } = await this.#command({ presence: { channel } });
    return Object.fromEntries(Object.entries(presence).map(([client, info]) => [client, asInfo(info)]));
  }

  async presenceStats(channel) {
    const { num_clients: numClients = 0, num_users: numUsers = 0 } = await this.#command({ presence_stats: { channel } });
    return { numClients, numUsers };
  }

  // --- commands and replies ---
  #command(command) {
    if (this.state === 'connected') return this.#ask(command);
    return Promise.reject(new ClientError(CODES.NOT_CONNECTED, 'not connected'));
  }

  /** Send a command; `atOnce` gets the result before anything that came behind it is looked at. */
  #ask(command, atOnce = () => {}) {
    return new Promise((resolve, reject) => {
      if (this.#socket?.readyState !== 1) throw new ClientError(CODES.NOT_CONNECTED, 'not connected');
      const id = ++this.#lastId;
      const timer = setTimeout(() => finish(new ClientError(CODES.TIMED_OUT, 'no answer')), REPLY_MS);
      const finish = (error, result) => {
        clearTimeout(timer);
        this.#asked.delete(id);
        if (error) return reject(error);
        atOnce(result);
        resolve(result);
      };
      this.#asked.set(id, { method: Object.keys(command)[0], finish });
      this.#send({ id, ...command });
    });
  }

  #send(command) {
    this.#socket.send(JSON.stringify(command));
  }

  #take({ id, error, push, ...results }) {
    if (push) return this.#hear(push);
    if (!id) return this.#pongs && this.#socket.send('{}');
    const asked = this.#asked.get(id); // missing if it timed out, or was only said
    if (error) asked?.finish(new ClientError(error.code, error.message, error.temporary || error.code === EXPIRED));
    else asked?.finish(null, results[asked.method] ?? {});
  }

  #hear({ channel, ...push }) {
    if (push.refresh) this.#renew(push.refresh);
    else if (push.subscribe) this.#subscribed(channel, push.subscribe);
    else if (this.#serverSide.has(channel)) this.#hearServerSide(channel, push);
    else this.#subscriptions.get(channel)?._take(push);
  }

  // --- subscriptions that the server made (11.7) ---
  #hearServerSide(channel, { pub, join, leave, unsubscribe }) {
    if (pub) this.#show(channel, pub);
    if (join) this._tell('join', { channel, info: asInfo(join.info) });
    if (leave) this._tell('leave', { channel, info: asInfo(leave.info) });
    if (!unsubscribe) return;
    this.#serverSide.delete(channel);
    this._tell('unsubscribed', { channel, ...unsubscribe });
  }

  #subscribed(channel, result) {
    const turn = this.#turn;
    const wasRecovering = Boolean(this.#serverSide.get(channel));
    const position = asPosition(result);
    this.#serverSide.set(channel, position);
    const recovered = Boolean(result.recovered);
    this._tell('subscribed', { channel, recovered, wasRecovering, position, data: result.data });
    for (const publication of result.publications ?? []) if (turn === this.#turn) this.#show(channel, publication);
  }

  #show(channel, publication) {
    this.#serverSide.set(channel, behind(this.#serverSide.get(channel), publication));
    this._tell('publication', { channel, ...asPublication(publication) });
  }

  // --- the connection ---
  #online = () => this.#waiting && this.connect();
  #offline = () => this.#waiting || this.#drop(CODES.LOST, 'offline');

  async #open() {
    const turn = ++this.#turn;
    this.#waiting = false;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#drop(CODES.LOST, 'no connection in time'), OPEN_MS);
    try {
      if (this.#token.missing) await this.#token.fetch();
      if (turn === this.#turn) this.#socket = this.#dial();
    } catch (error) {
      const { code = CODES.UNUSABLE, message, temporary = false } = error instanceof ClientError ? error : {};
      if (turn === this.#turn) this.#drop(code, message ?? error.message, !temporary);
    }
  }

  #dial() {
    const socket = (this.#options.transport ?? WEBSOCKET).open(this.#url);
    const ours = () => socket === this.#socket;
    socket.onopen = () => ours() && this.#greet(socket);
    socket.onclose = ({ code, reason }) =>
      ours() && this.#drop(code < 1007 ? CODES.LOST : code, reason || 'connection lost');
    socket.onmessage = ({ data }) => {
      if (!ours()) return;
      this.#heard();
      let replies;
      try {
        replies = data.split('\n').map((line) => JSON.parse(line));
      } catch {
        return this.#drop(CODES.UNUSABLE, 'what came is not JSON');
      }
      for (const reply of replies) if (ours()) this.#take(reply);
    };
    return socket;
  }

  async #greet(socket) {
    const { name, data } = this.#options;
    const recoverable = [...this.#serverSide].filter(([, position]) => position);
    const subs = Object.fromEntries(
      recoverable.map(([channel, position]) => [channel, { recover: true, ...position }]),
    );
    const token = this.#token.value;
    try {
      await this.#ask({ connect: { token, name, data, subs } }, (hello) => this.#welcome(hello));
      if (token !== this.#token.value) this.setToken(this.#token.value).catch(() => {}); // it was changed meanwhile
    } catch ({ code, message, temporary }) {
      if (socket !== this.#socket) return;
      const helpless = code === EXPIRED && !this.#token.expired();
      this.#drop(code, message, helpless || !temporary);
    }
  }

  #welcome(hello) {
    const turn = this.#turn;
    this.state = 'connected';
    this.id = hello.client;
    this.#since = performance.now();
    this.#silenceMs = hello.ping ? hello.ping * 1000 + PING_GRACE_MS : 0;
    this.#pongs = Boolean(hello.pong);
    this.#heard();
    this.#renew(hello);
    for (const subscription of this.#subscriptions.values()) subscription._join();
    const { client, data, time, subs = {} } = hello;
    this._tell('connected', { client, data, time });
    const gone = [...this.#serverSide.keys()].filter((channel) => !(channel in subs));
    for (const channel of gone) {
      if (turn !== this.#turn) return;
      this.#hearServerSide(channel, { unsubscribe: { code: 2000, reason: 'server unsubscribe' } });
    }
    for (const [channel, result] of Object.entries(subs)) if (turn === this.#turn) this.#subscribed(channel, result);
  }

  /** A sign of life; the next is due before the silence is too long. */
  #heard() {
    if (this.state !== 'connected') return;
    clearTimeout(this.#timer);
    if (this.#silenceMs) this.#timer = setTimeout(() => this.#drop(CODES.SILENT, 'no ping'), this.#silenceMs);
  }

  #renew(expiry) {
    this.#token.renew(
      expiry,
      (token) => this.#ask({ refresh: { token } }),
      ({ code, message }) => this.#drop(code, message, true),
    );
  }

  /** End what is left of the connection; then come back after a while, or not. */
  #drop(code, reason, ended = forGood(code)) {
    if (this.state === 'disconnected') return;
    const socket = this.#socket;
    const steady = this.state === 'connected' && performance.now() - this.#since > STEADY_MS;
    const turn = ++this.#turn;
    this.#socket = null; // whatever the old one still says is passed over
    if (ended) this._end = new ClientError(code, reason, false);
    this.state = ended ? 'disconnected' : 'connecting';
    this.id = '';
    this.#waiting = !ended;
    clearTimeout(this.#timer);
    this.#token.rest();
    if (code === 3005) this.#token.expired();
    if (steady) this.#attempt = 0;
    const delayMs = ended ? 0 : backoff(this.#attempt++);
    if (ended) {
      globalThis.removeEventListener?.('online', this.#online);
      globalThis.removeEventListener?.('offline', this.#offline);
    } else this.#timer = setTimeout(() => this.#open(), delayMs);
    socket?.close();
    for (const { finish } of [...this.#asked.values()]) finish(new ClientError(CODES.LOST, 'connection lost'));
    if (code === 3014) for (const channel of this.#serverSide.keys()) this.#serverSide.set(channel, null);
    for (const subscription of this.#subscriptions.values()) subscription._lose(code, reason, code === 3014);
    if (turn === this.#turn) {
      if (ended) this._tell('disconnected', { code, reason });
      else this._tell('connecting', { code, reason, delayMs });
    }
  }
}
