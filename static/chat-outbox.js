// What is written and not acknowledged yet (4.7, 11.8): it outlives a reload, and is published once, whatever happens.

import { backoff, keep, pause, recall } from '/static/chat-store.js';

export class Outbox {
  items = recall('sessionStorage', 'unsent') ?? []; // {channel, data, failed: why not, shown: it is in the room}
  #client;
  #changed;
  #busy = false;

  constructor(client, changed) {
    this.#client = client;
    this.#changed = changed;
    client.on('connected', () => this.flush());
  }

  add(channel, data) {
    // Not randomUUID, which there is in secure contexts only: this page may be looked at over plain HTTP.
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
    this.items.push({ channel, data: { id, ...data } });
    this.#keep();
    this.flush();
  }

  discard(item) {
    this.items.splice(this.items.indexOf(item), 1);
    this.#keep();
  }

  /** Send one after the other.  An unknown outcome (100, no answer, connection lost) is asked again by the same key. */
  async flush() {
    if (this.#busy) return;
    this.#busy = true;
    const live = () => this.#client.state === 'connected';
    for (let attempt = 0, item; live() && (item = this.items.find(({ failed }) => !failed)); ) {
      try {
        await this.#client.publishOnce(item.channel, item.data, item.data.id);
        this.discard(item);
        attempt = 0;
      } catch ({ code, message, temporary }) {
        if (!temporary) item.failed = `${message} (${code})`;
        this.#keep();
        if (temporary && live()) await pause(backoff(attempt++));
      }
    }
    this.#busy = false;
  }

  /** A publication came that carries this id; if it is ours, the room shows it now. */
  came(id) {
    for (const item of this.items) item.shown ||= item.data.id === id;
    this.#changed();
  }

  #keep() {
    keep('sessionStorage', 'unsent', this.items);
    this.#changed();
  }
}
