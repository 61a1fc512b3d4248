// Who is kept from what: the blocks of one user, and all who have any.

import { at, make, moment, sure, write } from './admin-page.js';

const USERS = 100;
const MOST_BLOCKS = 10_000;

export class BlocksView {
  #api;
  #changed;
  #user = '';
  #after = '';

  /** `changed` is called when a user was blocked or let in again. */
  constructor(api, changed) {
    this.#api = api;
    this.#changed = changed;
    at('block').addEventListener('submit', (event) => {
      event.preventDefault();
      this.#block();
    });
    at('more-blocked').addEventListener('click', () => this.#next());
  }

  // --- one user ---------------------------------------------------------------
  async open(user) {
    if (user !== this.#user) at('block').reset();
    this.#user = user;
    try {
      const { blocks } = await this.#api.call('blocked_users', { user });
      if (user !== this.#user) return;
      const items = blocks.map((block) => make('li', { className: 'held' }, tell(block), this.#lift(block)));
      at('blocks').replaceChildren(...(items.length ? items : [make('li', { className: 'faint' }, 'None.')]));
    } catch (error) {
      if (user === this.#user) at('blocks').replaceChildren(make('li', {}, `Not known: ${error.message}`));
    }
  }

  #lift({ channel, mute }) {
    const button = make('button', { type: 'button', ariaLabel: `Unblock ${where(channel, mute)}` }, 'Unblock');
    const question = `Let ${this.#user} ${mute ? 'publish' : 'in'} again${channel ? ` in ${channel}` : ''}?`;
    button.addEventListener('click', () => this.#do('unblock_user', { channel, mute }, question, 'Unblocked.'));
    return button;
  }

  async #block() {
    const channel = at('where').value.trim();
    const mute = at('mute').checked;
    const term = at('term');
    const expiry = Number(term.value) && Math.floor(Date.now() / 1000) + Number(term.value);
    const what = mute ? 'from publishing' : 'out';
    const place = channel && `${mute ? ' in' : ' of'} ${channel}`;
    const ending = mute || channel ? '' : ' All their connections end now.';
    const question = `Keep ${this.#user} ${what}${place}, for ${term.selectedOptions[0].text}?${ending}`;
    const parameters = { channel, mute, expire_at: expiry, reason: at('reason').value };
    if (await this.#do('block_user', parameters, question, 'Blocked.')) at('block').reset();
  }

  async #do(method, parameters, question, done) {
    const user = this.#user;
    if (!(await sure(question))) return false;
    let problem = null;
    try {
      await this.#api.call(method, { user, ...parameters });
    } catch (error) {
      problem = error;
    }
    write('done', problem === null ? done : `Not done: ${problem.message}`);
    await Promise.all([this.open(user), this.#changed()]);
    return problem === null;
  }

  // --- all users ---------------------------------------------------------------
  async openAll() {
    this.#user = this.#after = '';
    at('blocked').replaceChildren();
    await this.#next();
  }

  async #next() {
    const after = this.#after;
    try {
      const { blocks } = await this.#api.call('blocked_users', { after, limit: USERS });
      if (after !== this.#after || this.#user) return;
      const users = [...new Set(blocks.map(({ user }) => user))];
      at('blocked').append(...users.map((user) => {
        const link = make('a', { href: `#user/${encodeURIComponent(user)}` }, user);
        return make('li', {}, link, ...blocks.filter((block) => block.user === user).map(tell));
      }));
      this.#after = users.at(-1) ?? after;
      at('more-blocked').hidden = users.length < USERS && blocks.length < MOST_BLOCKS;
      write('blocked-nay', at('blocked').childElementCount ? '' : 'Nobody.');
    } catch (error) {
      write('blocked-nay', error.message);
    }
  }
}

const where = (channel, mute) => `${mute ? 'from publishing ' : ''}${channel ? `in ${channel}` : 'everywhere'}`;

function tell({ channel, mute, expire_at: until, reason }) {
  const line = make('p', {}, make('b', {}, mute ? 'Muted' : 'Blocked'), ` ${channel ? `in ${channel}` : 'everywhere'}`);
  line.append(until ? ` until ${moment(until * 1000)}` : '');
  if (reason) line.append(make('small', {}, ` ${reason}`));
  return line;
}
