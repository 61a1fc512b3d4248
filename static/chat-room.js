// One room: what was said in it, how much of that was not seen, who is in it and who is typing.
//
// What is said goes through `chat:<room>`, which every room of the list stays subscribed to, so that unread counts are live.
// Whoever has a room open is subscribed to its floor, `live:typing:<room>`, too: typing marks pass through it, and its
// presence says who is here, which that of the room, with all who merely follow it, would not.  Whoever cannot follow what
// passes only asks the floor who is on it.

import { backoff, keep, pause, recall } from '/static/chat-store.js';

const PAGE = 50; // messages asked for at once
const TYPING_MS = 4_000; // how long a typing mark holds
const MARK_MS = 2_000; // between two of ours
const LACKING = [102, 103, 107, 108]; // refusals that mean "not here"

export class Room {
  items = []; // publications, oldest first
  loaded = false; // the last page of history is among them
  beginning = false; // nothing older can be had
  state = 'joining'; // or 'live', or 'outside'
  why = ''; // we are outside
  here = null; // client id -> info, once known
  following = false; // it is those who follow the room, whether they have it open or not
  top = { offset: 0, epoch: '' };
  seen; // the position up to which somebody looked, over reloads and tabs
  #client;
  // Is told: changed(room), added(room, publication), loaded(room, publications), emptied(room), notify(room, text); and
  // says whether we hear what passes: hears().
  #page;
  #talk;
  #ears = [];
  #visit = null; // one object for as long as it is open; it `waits` when who is here is to be asked again
  #floorChannel;
  #floor = null;
  #floorEars = [];
  #asking = new Set(); // for each time that presence is being asked: client id -> info, or null, of joins and leaves since
  #turn = 0; // what was asked for before the room was emptied is not wanted
  #loading = false;
  #typing = new Map(); // client id -> {info, name, until}
  #markedAt = 0;

  constructor(name, client, page) {
    this.name = name;
    this.channel = `chat:${encodeURIComponent(name)}`;
    this.#floorChannel = `live:typing:${encodeURIComponent(name)}`;
    this.seen = recall('localStorage', `seen ${this.channel}`);
    this.#client = client;
    this.#page = page;
    this.join();
    this.#ears = [
      this.#talk.on('subscribing', () => this.#is('joining')),
      this.#talk.on('subscribed', (context) => this.#joined(context)),
      this.#talk.on('unsubscribed', ({ code, reason }) => this.#is('outside', `${reason} (${code})`)),
      this.#talk.on('publication', (publication) => this.#take(publication)),
    ];
  }

  /** Publications behind what was seen. */
  get unread() {
    if (!this.seen) return 0;
    return this.seen.epoch === this.top.epoch ? Math.max(0, this.top.offset - this.seen.offset) : this.top.offset;
  }

  /** Follow it, from where it was left if it was. */
  join() {
    this.#talk = this.#client.subscribe(this.channel, { since: this.loaded ? this.#talk.position : null });
  }

  open() {
    this.#visit = {};
    if (this.state === 'live') this.#stepIn();
  }

  close() {
    this.#visit = null;
    const floor = this.#floor;
    for (const off of this.#floorEars) off();
    this.#floor = this.here = null;
    floor?.unsubscribe();
    this.#typing.clear();
  }

  /** Follow it no more. */
  leave() {
    this.close();
    for (const off of this.#ears) off();
    this.#talk.unsubscribe();
    this.#turn++;
  }

  /** Somebody looks at all there is. */
  see() {
    if (this.state === 'live' && this.unread) this.#saw();
  }

  /** The page before the first message; `loaded` tells when it is there. */
  loadOlder() {
    const offset = this.items.find((item) => item.offset)?.offset;
    if (this.loaded && !this.beginning && offset) this.#load({ offset, epoch: this.top.epoch });
  }

  /** Forget the oldest beyond `count`, which can be loaded again; returns how many went. */
  trim(count) {
    const gone = this.items.splice(0, Math.max(0, this.items.length - count));
    if (gone.length) this.beginning = false;
    return gone.length;
  }

  /** We are writing, or have stopped to. */
  mark(typing, name) {
    const now = Date.now();
    if (!this.#floor || (typing ? now - this.#markedAt < MARK_MS : !this.#markedAt)) return;
    this.#markedAt = typing ? now : 0;
    this.#client.say(this.#floor.channel, { typing, name });
  }

  /** {info, name} of those who are writing. */
  typing(now) {
    for (const [client, { until }] of this.#typing) if (until < now) this.#typing.delete(client);
    return [...this.#typing.values()];
  }

  /**
   * Ask who is here; where the floor cannot say, the room's own presence is the second best, and called what it is.  Asked
   * again while the answer is a temporary no, by one at a time, and after the connection by `#stepIn`.
   */
  async refresh() {
    const visit = this.#visit;
    if (!visit) return;
    const since = new Map();
    this.#asking.add(since);
    const channels = [this.#floorChannel, this.channel];
    for (let attempt = 0; channels.length && visit === this.#visit; ) {
      since.clear();
      try {
        const here = await this.#client.presence(channels[0]);
        if (visit !== this.#visit) break;
        this.here = new Map(Object.entries(here));
        for (const [client, info] of since) this.#note(client, info); // which may have overtaken the answer
        this.following = channels[0] === this.channel;
        break;
      } catch ({ code, temporary }) {
        if (LACKING.includes(code)) {
          channels.shift();
        } else if (temporary && !visit.waits && this.#client.state === 'connected') {
          visit.waits = true;
          await pause(backoff(attempt++));
          visit.waits = false;
        } else {
          break; // it is asked again in a while
        }
      }
    }
    this.#asking.delete(since);
    if (visit === this.#visit) this.#page.changed(this);
  }

  #is(state, why = '') {
    Object.assign(this, { state, why, here: state === 'live' ? this.here : null });
    this.#page.changed(this);
  }

  #joined({ recovered, wasRecovering, position }) {
    if (position) this.top = position;
    if (wasRecovering && !recovered && this.loaded) {
      this.#empty();
      this.#page.notify(this, 'The server no longer has all that came while you were away. What it has is shown anew.');
    } else if (position && this.seen?.epoch && this.seen.epoch !== position.epoch) {
      this.#page.notify(this, 'The server has started this room anew since you were here.');
    }
    if (!this.seen) this.#saw(); // of a room never entered nothing was missed
    this.#is('live');
    if (this.#visit) this.#stepIn();
  }

  #saw() {
    this.seen = this.top;
    keep('localStorage', `seen ${this.channel}`, this.seen);
  }

  #take(publication) {
    if (publication.offset) this.top = this.#talk.position ?? this.top;
    this.#typing.delete(publication.info?.client);
    if (this.#insert(publication)) this.#page.added(this, publication);
  }

  /** Put it in its place by offset; false if it is there already. */
  #insert(publication) {
    const { offset } = publication;
    let at = this.items.length;
    while (offset && at && this.items[at - 1].offset > offset) at--;
    if (offset && this.items[at - 1]?.offset === offset) return false;
    this.items.splice(at, 0, publication);
    return true;
  }

  #empty() {
    Object.assign(this, { items: [], loaded: false, beginning: false, seen: null });
    this.#loading = false;
    this.#turn++;
    this.#page.emptied(this);
  }

  /** A page of history; asked for again while the answer is a temporary no, and after the connection by `#stepIn`. */
  async #load(since) {
    if (this.#loading || this.state !== 'live') return;
    const turn = this.#turn;
    this.#loading = true;
    let publications;
    for (let attempt = 0; !publications; ) {
      try {
        ({ publications } = await this.#client.history(this.channel, { limit: PAGE, reverse: true, since }));
      } catch ({ temporary }) {
        if (!temporary) publications = [];
        else if (this.#client.state !== 'connected') break;
        else await pause(backoff(attempt++));
      }
      if (turn !== this.#turn) return;
    }
    this.#loading = false;
    if (!publications) return;
    this.loaded = true;
    this.beginning = !publications.length || publications.at(-1).offset === 1;
    this.#page.loaded(this, publications.filter((publication) => this.#insert(publication)));
  }

  // --- the floor ---
  #stepIn() {
    if (!this.loaded) this.#load();
    const hears = this.#page.hears();
    if (!hears || this.#floor?.state === 'subscribed') this.refresh();
    if (!hears || this.#floor) return;
    const floor = this.#client.subscribe(this.#floorChannel, { joinLeave: true });
    const cameOrWent = (change) => {
      change();
      this.#page.changed(this);
    };
    this.#floor = floor;
    this.#floorEars = [
      floor.on('subscribing', () => this.#typing.clear()),
      floor.on('subscribed', () => this.refresh()),
      floor.on('unsubscribed', () => this.refresh()),
      floor.on('join', ({ info }) => cameOrWent(() => this.#note(info.client, info))),
      floor.on('leave', ({ info }) => cameOrWent(() => this.#note(info.client, null))),
      floor.on('publication', ({ info, data }) => cameOrWent(() => this.#hearMark(info, data))),
    ];
  }

  /** Somebody has come, or gone if there is no info. */
  #note(client, info) {
    for (const since of this.#asking) since.set(client, info);
    if (info) this.here?.set(client, info);
    else this.here?.delete(client);
  }

  #hearMark(info, data) {
    if (!info || info.client === this.#client.id) return;
    if (data?.typing !== true) this.#typing.delete(info.client);
    else this.#typing.set(info.client, { info, name: data.name, until: Date.now() + TYPING_MS });
  }
}
