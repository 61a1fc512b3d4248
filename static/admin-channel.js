// One channel: its publications, kept or as they pass, who is here, and a word of one's own.

import { at, brief, clock, count, make, sure, write } from './admin-page.js';
import { Tail } from './admin-tail.js';

const PAGE = 20;
const SHOWN = 200;
const NOT_AVAILABLE = 108;

export class ChannelView {
  #api;
  #channel = '';
  #kept = false;
  #lowest = 0;
  #top = { offset: 0, epoch: '' };
  #tail = null;

  constructor(api) {
    this.#api = api;
    at('older').addEventListener('click', () => this.#older());
    at('newest').addEventListener('click', () => this.#newest());
    at('watch').addEventListener('click', () => (this.#tail ? this.#unwatch() : this.#watch()));
    at('ask').addEventListener('click', () => this.#members());
    at('say').addEventListener('submit', (event) => {
      event.preventDefault();
      this.#publish();
    });
  }

  async open(channel) {
    this.close();
    this.#channel = channel;
    at('channel-title').textContent = channel;
    write('said', '');
    write('pace', '');
    at('publications').replaceChildren();
    at('nothing').hidden = true;
    await Promise.all([this.#newest(), this.#members()]);
  }

  close() {
    this.#unwatch();
    this.#channel = '';
  }

  // --- publications ---------------------------------------------------------
  async #newest() {
    const channel = this.#channel;
    try {
      const page = await this.#api.call('history', { channel, limit: PAGE, reverse: true });
      if (channel !== this.#channel) return;
      this.#kept = true;
      this.#top = { offset: page.offset, epoch: page.epoch };
      at('publications').replaceChildren(...page.publications.map(line));
      this.#note(page);
      write('kind', `kept: ${count(page.offset)} so far${page.epoch ? `, epoch ${page.epoch}` : ''}`);
    } catch (error) {
      if (channel !== this.#channel) return;
      this.#kept = false;
      at('older').hidden = at('newest').hidden = true;
      const passing = error.code === NOT_AVAILABLE;
      write('kind', passing ? 'passing: nothing is kept; watch it to see what comes' : error.message);
    }
  }

  async #older() {
    const channel = this.#channel;
    const since = { offset: this.#lowest, epoch: this.#top.epoch };
    try {
      const page = await this.#api.call('history', { channel, limit: PAGE, reverse: true, since });
      if (channel !== this.#channel) return;
      at('publications').append(...page.publications.map(line));
      this.#note(page);
    } catch (error) {
      write('pace', error.message);
    }
  }

  #note({ publications }) {
    this.#lowest = publications.at(-1)?.offset ?? 0;
    at('older').hidden = publications.length < PAGE || this.#lowest <= 1;
    at('newest').hidden = false;
    at('nothing').hidden = at('publications').childElementCount > 0;
  }

  async #watch() {
    if (this.#kept) await this.#newest();
    at('watch').setAttribute('aria-pressed', 'true');
    write('pace', 'Watching');
    this.#tail = new Tail(
      this.#api,
      this.#channel,
      this.#kept ? this.#top : null,
      (publications, { skipped, sampled }) => this.#show(publications, skipped, sampled),
      (error) => write('pace', error.message),
    );
  }

  #unwatch() {
    this.#tail?.stop();
    this.#tail = null;
    at('watch').setAttribute('aria-pressed', 'false');
    write('pace', '');
  }

  #show(publications, skipped, sampled) {
    const list = at('publications');
    if (skipped) list.prepend(make('li', { className: 'gap' }, `${count(skipped)} more, not shown`));
    for (const publication of publications) {
      if (publication.gap) list.prepend(make('li', { className: 'gap' }, 'maybe more, not heard'));
      list.prepend(line(publication));
    }
    while (list.childElementCount > SHOWN) list.lastElementChild.remove();
    this.#lowest = Number(list.lastElementChild.dataset.offset ?? this.#lowest);
    at('nothing').hidden = true;
    write('pace', sampled ? 'Watching a part of what comes' : 'Watching');
  }

  async #publish() {
    let data;
    try {
      data = JSON.parse(at('data').value);
    } catch (error) {
      write('said', `No JSON: ${error.message}`);
      return;
    }
    const key = at('key').value;
    try {
      const parameters = { channel: this.#channel, data, ...(key && { idempotency_key: key }) };
      const { offset } = await this.#api.call('publish', parameters);
      write('said', offset ? `Published as ${offset}.` : 'Published.');
      if (offset && !this.#tail) await this.#newest();
    } catch (error) {
      write('said', `Not published: ${error.message}`);
    }
  }

  // --- who is here ------------------------------------------------------------
  async #members() {
    const channel = this.#channel;
    try {
      const { presence } = await this.#api.call('presence', { channel });
      if (channel !== this.#channel) return;
      const members = Object.values(presence);
      const users = new Set(members.map(({ user }) => user)).size;
      write('here', `Who is here: ${count(members.length)}, ${count(users)} ${users === 1 ? 'user' : 'users'}`);
      at('members').replaceChildren(...members.slice(0, SHOWN).map((member) => this.#member(member)));
    } catch (error) {
      if (channel !== this.#channel) return;
      write('here', error.code === NOT_AVAILABLE ? 'Who is here is not known' : `Who is here: ${error.message}`);
      at('members').replaceChildren();
    }
  }

  #member({ client, user, conn_info: info }) {
    const who = user ? make('a', { href: `#user/${encodeURIComponent(user)}` }, user) : make('i', {}, 'anonymous');
    const end = make('button', { type: 'button', ariaLabel: `Disconnect ${client}` }, 'Disconnect');
    end.addEventListener('click', async () => {
      if (!(await sure(`Disconnect ${user || 'the anonymous client'} (${client})?`))) return;
      try {
        await this.#api.call('disconnect', { user, client });
        end.disabled = true;
        end.textContent = 'Disconnected';
      } catch (error) {
        end.textContent = error.message;
      }
    });
    return make('li', {}, make('span', {}, who, ' ', make('small', {}, client)),
      ...(info === undefined ? [] : [make('code', {}, brief(info, 200))]), end);
  }
}

function line({ offset, time, data, info, tags }) {
  const head = make('p', { className: 'head' });
  if (offset) head.append(make('b', {}, String(offset)), ' ');
  if (time) head.append(make('time', { dateTime: new Date(time).toISOString() }, clock(time)), ' ');
  if (info?.user) head.append(make('a', { href: `#user/${encodeURIComponent(info.user)}` }, info.user), ' ');
  if (tags) head.append(make('small', {}, brief(tags, 200)));
  const item = make('li', {}, head, make('code', {}, brief(data)));
  if (offset) item.dataset.offset = offset;
  return item;
}
