// One user: their connections and an end to them, and what they are kept from; or all who are kept from something.

import { BlocksView } from './admin-blocks.js';
import { at, count, make, moment, span, sure, write } from './admin-page.js';

const CHANNELS = 12;

export class UsersView {
  #api;
  #user = '';
  #blocks;

  constructor(api) {
    this.#api = api;
    this.#blocks = new BlocksView(api, () => this.#connections());
    at('look').addEventListener('submit', (event) => {
      event.preventDefault();
      location.hash = `#user/${encodeURIComponent(at('user').value)}`;
    });
    at('again').addEventListener('click', () => this.open(this.#user));
    at('end-all').addEventListener('click', () => {
      this.#end('disconnect', {}, `Disconnect all connections of ${this.#user}?`, 'Disconnected.');
    });
    at('end-subscriptions').addEventListener('click', () => {
      this.#end('unsubscribe', { channel: '' }, `End all subscriptions of ${this.#user}?`, 'Unsubscribed.');
    });
  }

  async open(user) {
    if (user !== this.#user) at('connections').replaceChildren();
    this.#user = user;
    at('one').hidden = !user;
    at('everybody').hidden = Boolean(user);
    at('user').value = user;
    at('user-title').textContent = user;
    write('done', '');
    await (user ? Promise.all([this.#connections(), this.#blocks.open(user)]) : this.#blocks.openAll());
  }

  async #end(method, parameters, question, done) {
    const user = this.#user;
    if (!(await sure(question))) return;
    try {
      await this.#api.call(method, { user, ...parameters });
      write('done', done);
    } catch (error) {
      write('done', `Not done: ${error.message}`);
    }
    await this.#connections();
  }

  async #connections() {
    const user = this.#user;
    try {
      const { connections, num_connections: number } = await this.#api.call('connections', { user });
      if (user !== this.#user) return;
      const all = Object.entries(connections).sort(([, one], [, other]) => other.connected_at - one.connected_at);
      const rest = number > all.length ? `, ${count(all.length)} are shown` : '';
      write('connections-title', `Connections: ${count(number)}${rest}`);
      at('connections').replaceChildren(...all.map(([client, about]) => this.#connection(client, about)));
      at('end-all').disabled = at('end-subscriptions').disabled = !number;
    } catch (error) {
      if (user !== this.#user) return;
      write('connections-title', 'Connections');
      at('connections').replaceChildren(make('li', {}, `Not known: ${error.message}`));
    }
  }

  #connection(client, about) {
    const end = make('button', { type: 'button', ariaLabel: `Disconnect ${client}` }, 'Disconnect');
    end.addEventListener('click', () => {
      this.#end('disconnect', { client }, `Disconnect ${this.#user} (${client})?`, 'Disconnected.');
    });
    const app = [about.app_name, about.app_version].filter(Boolean).join(' ');
    const came = about.connected_at * 1000;
    const since = make('time', { dateTime: new Date(came).toISOString() }, moment(came));
    return make('li', {},
      make('p', {}, make('b', {}, about.transport), ` ${about.protocol}`, app ? ` · ${app}` : ''),
      make('p', { className: 'head' }, 'since ', since, ` (${span(Math.max(0, Date.now() / 1000 - about.connected_at))})`,
        ` · from ${about.address || 'an unknown address'} · at ${about.node}`),
      channels(about),
      make('small', {}, client),
      end);
  }
}

function channels({ state, num_channels: number }) {
  const names = Object.keys(state.channels).slice(0, CHANNELS);
  const line = make('p', { className: 'head' }, number ? 'in ' : 'in no channel');
  names.forEach((name, index) => {
    line.append(index ? ', ' : '', make('a', { href: `#channel/${encodeURIComponent(name)}` }, name));
  });
  if (number > names.length) line.append(`${names.length ? ' and ' : ''}${count(number - names.length)} more`);
  return line;
}
