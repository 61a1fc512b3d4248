// One user: their connections, and an end to them. What the API does not offer is not shown.

import { at, brief, make, sure, write } from './admin-page.js';

export class UsersView {
  #api;
  #user = '';
  #methods = new Set();

  constructor(api) {
    this.#api = api;
    at('look').addEventListener('submit', (event) => {
      event.preventDefault();
      location.hash = `#user/${encodeURIComponent(at('user').value)}`;
    });
  }

  offer(methods) {
    this.#methods = new Set(methods);
  }

  async open(user) {
    this.#user = user;
    at('one').hidden = !user;
    if (!user) return;
    at('user').value = user;
    at('user-title').textContent = user;
    write('done', '');
    at('deeds').replaceChildren(...this.#deeds());
    await this.#connections();
  }

  #deeds() {
    return [
      ['disconnect', 'Disconnect', 'Disconnect all connections of', {}],
      ['unsubscribe', 'Unsubscribe from all', 'End all subscriptions of', { channel: '' }],
      ['block_user', 'Block', 'Disconnect, and keep out,', {}],
      ['unblock_user', 'Unblock', 'Let in again', {}],
    ].filter(([method]) => this.#methods.has(method)).map(([method, title, question, parameters]) => {
      const button = make('button', { type: 'button' }, title);
      button.addEventListener('click', () => this.#do(method, `${question} ${this.#user}?`, parameters));
      return button;
    });
  }

  async #do(method, question, parameters) {
    const user = this.#user;
    if (!(await sure(question))) return;
    try {
      await this.#api.call(method, { user, ...parameters });
      write('done', `Done: ${method} ${user}.`);
      await this.#connections();
    } catch (error) {
      write('done', `Not done: ${error.message}`);
    }
  }

  async #connections() {
    const user = this.#user;
    at('connections-title').hidden = !this.#methods.has('connections');
    at('connections').replaceChildren();
    if (!this.#methods.has('connections')) return;
    try {
      const { connections = {} } = await this.#api.call('connections', { user });
      if (user !== this.#user) return;
      const items = Object.entries(connections).map(([client, about]) => this.#connection(client, about));
      at('connections').replaceChildren(...(items.length ? items : [make('li', { className: 'faint' }, 'None.')]));
    } catch (error) {
      if (user === this.#user) write('done', error.message);
    }
  }

  #connection(client, about) {
    const end = make('button', { type: 'button', ariaLabel: `Disconnect ${client}` }, 'Disconnect');
    end.addEventListener('click', () => this.#do('disconnect', `Disconnect ${client} of ${this.#user}?`, { client }));
    return make('li', {}, make('small', {}, client), make('code', {}, brief(about, 500)), end);
  }
}
