// The console: who may come in, which view is open, and what is asked again every two seconds while somebody looks.

import { Api } from './admin-api.js';
import { ChannelView } from './admin-channel.js';
import { Graphs } from './admin-graphs.js';
import { at, count, define, make, write } from './admin-page.js';
import { UsersView } from './admin-users.js';

const EVERY_MS = 2_000;
const LISTED = 300;
const VIEWS = ['login', 'overview', 'channels', 'channel', 'users', 'settings'];

const api = new Api(location.pathname, () => route());
const graphs = new Graphs();
const channelView = new ChannelView(api);
const usersView = new UsersView(api);
let timer = 0;

// --- coming and going -----------------------------------------------------------
at('enter').addEventListener('submit', async (event) => {
  event.preventDefault();
  at('nay').hidden = true;
  try {
    await api.login(at('password').value);
    at('password').value = '';
    await refresh();
    route();
  } catch (error) {
    at('nay').textContent = error.message;
    at('nay').hidden = false;
    at('password').select();
  }
});

at('leave').addEventListener('click', () => {
  api.logout();
  route();
});

// --- views ------------------------------------------------------------------------
function route() {
  const [view, ...rest] = location.hash.slice(1).split('/');
  const name = decodeURIComponent(rest.join('/'));
  const wanted = { user: 'users', '': 'overview' }[view] ?? view;
  const shown = !api.inside ? 'login' : VIEWS.includes(wanted) && wanted !== 'login' ? wanted : 'overview';
  for (const id of VIEWS) at(id).hidden = id !== shown;
  at('nav').hidden = at('leave').hidden = !api.inside;
  for (const link of at('nav').children) {
    const here = link.hash === `#${shown === 'channel' ? 'channels' : shown}`;
    here ? link.setAttribute('aria-current', 'page') : link.removeAttribute('aria-current');
  }
  if (shown !== 'channel') channelView.close();
  if (shown === 'login') showLogin();
  if (shown === 'channel') channelView.open(name);
  if (shown === 'channels') list();
  if (shown === 'users') usersView.open(name);
  if (shown === 'settings') showSettings();
}

function showLogin() {
  clearTimeout(timer);
  at('state').dataset.kind = '';
  write('state', 'Not logged in');
  write('who', '');
  at('password').focus();
}

// --- what is asked again and again ----------------------------------------------------
async function refresh() {
  clearTimeout(timer);
  if (!api.inside) return;
  try {
    const state = await api.get('state');
    graphs.show(state);
    const ready = !Object.keys(state.troubles).length;
    at('state').dataset.kind = ready ? 'live' : 'ended';
    write('state', ready ? 'All is well' : 'Not ready');
    write('who', `${state.name}, version ${state.version}`);
  } catch (error) {
    if (!api.inside) return;
    at('state').dataset.kind = 'ended';
    write('state', error.code ? error.message : 'The server does not answer');
  }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, EVERY_MS);
}

// --- channels ---------------------------------------------------------------------------
async function list() {
  const pattern = at('pattern').value.trim();
  try {
    const { channels } = await api.call('channels', { pattern });
    const all = Object.entries(channels).sort(([one, here], [other, there]) => {
      return there.num_clients - here.num_clients || one.localeCompare(other);
    });
    const rest = all.length > LISTED ? `, the ${LISTED} largest are shown` : '';
    write('found', `${count(all.length)} ${all.length === 1 ? 'channel' : 'channels'} somebody is subscribed to${rest}.`);
    at('list').replaceChildren(...all.slice(0, LISTED).map(([name, { num_clients: clients }]) => {
      const link = make('a', { href: `#channel/${encodeURIComponent(name)}` }, name);
      return make('li', {}, link, make('b', { ariaLabel: `${clients} subscribed` }, count(clients)));
    }));
  } catch (error) {
    write('found', error.message);
  }
}

at('find').addEventListener('submit', (event) => {
  event.preventDefault();
  list();
});
at('open').addEventListener('click', () => {
  const name = at('pattern').value.trim();
  if (name) location.hash = `#channel/${encodeURIComponent(name)}`;
});

// --- settings -----------------------------------------------------------------------------
let settings = [];

function* flat(value, path) {
  const lists = Array.isArray(value);
  const inner = value !== null && typeof value === 'object' && (!lists || typeof value[0] === 'object');
  const entries = inner ? Object.entries(value) : [];
  if (!entries.length) yield [path, JSON.stringify(value), value === '' || value === 0 || value === false || lists];
  for (const [name, below] of entries) {
    const step = lists && below.name ? `[${below.name}]` : lists ? `[${name}]` : path && `.${name}`;
    yield* flat(below, path + (step || name));
  }
}

function sieve() {
  const word = at('word').value.trim().toLowerCase();
  const rows = settings.filter(([name, , off]) => name.toLowerCase().includes(word) && !(at('changed').checked && off));
  define('values', rows);
}

async function showSettings() {
  try {
    settings = [...flat(await api.get('settings'), '')];
    sieve();
  } catch (error) {
    define('values', [['not known', error.message]]);
  }
}

at('sieve').addEventListener('submit', (event) => event.preventDefault());
at('word').addEventListener('input', sieve);
at('changed').addEventListener('change', sieve);

document.addEventListener('visibilitychange', () => (document.hidden ? clearTimeout(timer) : refresh()));
addEventListener('hashchange', route);
api.takeFromAddress();
await refresh();
route();
