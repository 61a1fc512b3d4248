// Watching a channel: twenty publications a second at most, however many there are.
//
// A kept channel is read: each second its newest page, so that a flood costs one small read a second and its
// subscribers nothing. A passing channel has nothing to be read, so the server listens for us, and rests when it has
// heard enough of a second.

const EVERY_MS = 1_000;
const PAGE = 20;

export class Tail {
  #api;
  #channel;
  #on;
  #timer = 0;
  #stopped = false;
  #at;

  /**
   * `since` is the position behind which it begins, `null` for a passing channel.  `on(publications, { skipped,
   * sampled })` gets what is new, oldest first; `onFault(error)` what went wrong.
   */
  constructor(api, channel, since, on, onFault) {
    this.#api = api;
    this.#channel = channel;
    this.#on = on;
    this.#at = since ?? 0;
    const next = since ? () => this.#read() : () => this.#hear();
    this.#run(next, onFault);
  }

  stop() {
    this.#stopped = true;
    clearTimeout(this.#timer);
  }

  async #run(next, onFault) {
    const began = performance.now();
    if (!document.hidden) {
      try {
        await next();
      } catch (error) {
        if (!this.#stopped) onFault(error);
      }
    }
    if (!this.#stopped) {
      const rest = Math.max(100, EVERY_MS - (performance.now() - began));
      this.#timer = setTimeout(() => this.#run(next, onFault), rest);
    }
  }

  async #read() {
    const page = await this.#api.call('history', { channel: this.#channel, limit: PAGE, reverse: true });
    if (this.#stopped) return;
    const before = this.#at;
    this.#at = { offset: page.offset, epoch: page.epoch };
    const since = before.epoch === page.epoch ? before.offset : 0;
    const fresh = page.publications.filter(({ offset }) => offset > since).reverse();
    const skipped = fresh.length ? fresh[0].offset - since - 1 : 0;
    if (fresh.length) this.#on(fresh, { skipped, sampled: skipped > 0 });
  }

  async #hear() {
    const { publications, number } = await this.#api.post('sample', { channel: this.#channel, after: this.#at });
    if (this.#stopped) return;
    this.#at = number;
    const fresh = publications.map(({ pub, time, gap }) => ({ ...pub, time, gap }));
    if (fresh.length) this.#on(fresh, { skipped: 0, sampled: fresh.some(({ gap }) => gap) });
  }
}
