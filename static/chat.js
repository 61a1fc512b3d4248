// The chat page, on client.js, its transports, and nothing else.  What others wrote, their names included, is shown by
// `textContent` only, and links are made by DOM calls.  Clauses are those of server/PROTOCOL.md.

import { Guest } from '/static/chat-guest.js';
import { Outbox } from '/static/chat-outbox.js';
import { Room } from '/static/chat-room.js';
import { keep, recall } from '/static/chat-store.js';
import { Client } from '/static/client.js';
import { Polling } from '/static/transport-polling.js';
import { Sse } from '/static/transport-sse.js';

const SHOWN = 1000; // messages on the page while the newest are in view; older ones leave it and can be had again
const ROOMS = 40; // that are followed at once
const GROUP_MS = 300_000; // between two messages of one author that stand together
const PRESENCE_MS = 60_000; // joins and leaves are sent at most once, so presence is asked for again
const POLLED_PRESENCE_MS = 10_000; // and to whoever polls not at all
const NEAR_PX = 40; // from the newest message counts as being there
const OLDER_PX = 300; // from the top is where older messages are asked for
const LINK = /\bhttps?:\/\/[^\s<>"'`\p{Cc}\p{Cf}]+/giu;

const polling = new Polling();
const WAYS = {
  websocket: {
    transport: null,
    name: 'WebSocket',
    what: 'One connection, both ways. Everything comes at once.',
    hears: true,
  },
  sse: {
    transport: new Sse(),
    name: 'SSE',
    what: 'Server-sent events: one response without end, and a request for what you say. Everything comes at once.',
    hears: true,
  },
  polling: {
    transport: polling,
    name: 'polling',
    what:
      'Request after request. This room comes at once, others within 5 s. No typing marks; who is here comes every ' +
      '10 s, and without you.',
    hears: false, // what passes
  },
};

const $ = (id) => document.getElementById(id);
const copyOf = (template) => $(template).content.firstElementChild.cloneNode(true);
const guest = new Guest();
const rooms = new Map(); // name -> Room
const names = new Map(); // client id -> the name it gave in a message, where its info has none
let client;
let outbox;
let room;
let way = recall('sessionStorage', 'way');
if (!Object.keys(WAYS).includes(way)) way = 'websocket';
let readTo = Infinity; // the offset that stood last when somebody began to look
let naming = ''; // the name that is being asked for
let waitsUntil = 0;
let ended = '';
let renewed = false; // a token that was refused has been replaced once
let atEnd = true; // the newest message is in view, and stays so
let scrolledTo = 0;

const due = new Set();

/** Do `work` before the next frame, once, however often it is asked for. */
function soon(work) {
  if (!due.has(work)) requestAnimationFrame(() => due.delete(work) && work());
  due.add(work);
}

// --- names ---------------------------------------------------------------------------------------------------------
const asName = (given) => (typeof given === 'string' ? given.trim().slice(0, 40) : '');

/** Nothing that others send is taken for granted. */
function nameOf(info, given) {
  return asName(info?.connInfo?.name) || asName(given) || names.get(info?.client) || (info ? 'Guest' : 'Server');
}

const isMine = (info) => Boolean(info && (info.user ? info.user === guest.user : info.client === client.id));

async function rename() {
  const name = $('name').value.trim();
  if (name === naming) return; // by Enter, and because the field has changed
  naming = name;
  $('unnamed').hidden = true;
  if (name && name !== guest.name && guest.known) {
    try {
      const token = await guest.token(name);
      client.setToken(token).catch(() => {}); // lost with the connection: the next one carries it
    } catch (error) {
      if (error.temporary === undefined) {
        guest.called(name); // no network: the next token has it
        client.setToken('');
      } else {
        $('unnamed').textContent = error.message;
        $('unnamed').hidden = false;
      }
    }
  } else if (name) guest.called(name);
  naming = '';
  $('name').value = guest.name;
  soon(showPeople);
}

// --- the state of things -------------------------------------------------------------------------------------------
function showState() {
  const inRoom = { joining: ['joining', 'Joining…'], live: ['live', 'Live'] };
  let shown = ['connecting', 'Connecting…'];
  if (client.state === 'connected')
    shown = inRoom[room.state] ?? ['outside', `Not in this room: ${room.why}`, 'Join again'];
  else if (client.state === 'disconnected') shown = ['ended', `Disconnected: ${ended}`, 'Connect again'];
  else if (waitsUntil) shown = ['waiting', 'Reconnecting', 'Try now'];
  const [kind, what, offer = ''] = shown;
  $('state').dataset.kind = kind;
  if ($('what').textContent !== what) $('what').textContent = what;
  $('via').textContent = kind === 'live' ? ` by ${WAYS[way].name}` : '';
  $('again').hidden = !offer;
  $('again').textContent = offer;
  tick();
}

function tick() {
  const leftS = Math.ceil((waitsUntil - Date.now()) / 1000);
  const waiting = $('state').dataset.kind === 'waiting';
  $('countdown').textContent = waiting ? (leftS > 0 ? ` in ${leftS} s` : ' now…') : '';
  const typing = room.typing(Date.now()).map(({ info, name }) => nameOf(info, name));
  const who = typing.length > 2 ? 'Several people are' : typing.length > 1 ? `${typing.join(' and ')} are` : `${typing} is`;
  $('typing').textContent = typing.length ? `${who} typing…` : '';
}

function notify(text) {
  $('notice').firstElementChild.textContent = text;
  $('notice').hidden = !text;
}

function showPeople() {
  const live = client.state === 'connected';
  const people = new Map(); // one user with three tabs is one person
  for (const info of (live && room.here?.values()) || []) people.set(info.user || info.client, info);
  const mine = [...people].filter(([, info]) => isMine(info));
  const others = [...people].filter(([, info]) => !isMine(info));
  const items = [...mine, ...others].slice(0, 100).map(([, info]) => {
    const item = document.createElement('li');
    const name = isMine(info) ? guest.name : nameOf(info, `${names.get(info.client) ?? `Guest ${info.client.slice(0, 4)}`}`);
    item.append(faceOf(name), isMine(info) ? `${name} (you)` : name);
    return item;
  });
  const [what, who] = room.following
    ? [people.size === 1 ? 'follows this room' : 'follow this room', 'Here or in another room of theirs: this server cannot say.']
    : ['here', 'Everybody who has this room open. Who only follows it, or polls, is not counted.'];
  $('count').textContent = live ? (room.here ? `${people.size} ${what}` : 'Who is here is not known') : 'Not connected';
  $('who').textContent = who;
  $('who').hidden = !live || !room.here;
  $('people').replaceChildren(...items);
}

// --- the way to the server -------------------------------------------------------------------------------------------
/** Go another way; what is missed in between is recovered, and what is unsent is sent again by its key. */
function goBy(chosen) {
  way = chosen;
  keep('sessionStorage', 'way', way);
  room.close(); // its floor is not there on every way
  client.setTransport(WAYS[way].transport);
  if (client.state === 'disconnected') client.connect();
  room.open();
  showWay();
  refresh();
}

function showWay() {
  for (const radio of $('ways').elements) radio.checked = radio.value === way;
  $('way').textContent = WAYS[way].what;
}

// --- rooms ---------------------------------------------------------------------------------------------------------
/** Put `items` into `list`; what stands there already stays, with its focus and a click that has only half happened. */
function fill(list, items) {
  const same = items.length === list.childElementCount && items.every((item, at) => item === list.children[at]);
  if (!same) list.replaceChildren(...items);
}

const roomItems = new WeakMap(); // Room -> its list item

function showRooms() {
  let elsewhere = 0;
  const items = [...rooms.values()].map((each) => {
    if (!roomItems.has(each)) roomItems.set(each, itemOf(each));
    const item = roomItems.get(each);
    const [link, leave] = item.children;
    const open = each === room;
    const unread = open && atEnd && !document.hidden ? 0 : each.unread;
    if (!open) elsewhere += unread;
    link.ariaCurrent = open ? 'page' : null;
    count(link.lastElementChild, unread, ' unread');
    leave.hidden = rooms.size < 2;
    return item;
  });
  fill($('rooms'), items);
  count($('elsewhere'), elsewhere, ' unread in other rooms');
  document.title = `${elsewhere ? `(${elsewhere}) ` : ''}${room.name} – Waterspout`;
}

function itemOf(each) {
  const item = copyOf('place');
  const [link, leave] = item.children;
  link.href = `#${encodeURIComponent(each.name)}`;
  link.firstElementChild.textContent = each.name;
  leave.ariaLabel = `Leave ${each.name}`;
  leave.onclick = () => {
    rooms.delete(each.name);
    each.leave();
    keepRooms();
    if (each === room) location.hash = encodeURIComponent(rooms.keys().next().value);
    else showRooms();
  };
  return item;
}

/** A number in a badge, and what it counts for those who do not see where it stands. */
function count(badge, number, what) {
  badge.hidden = !number;
  badge.textContent = number > 99 ? '99+' : number;
  badge.append(unseen(what));
}

function unseen(text) {
  const span = document.createElement('span');
  span.className = 'unseen';
  span.textContent = text;
  return span;
}

function keepRooms() {
  const entered = [...rooms.values()].filter(({ state }) => state !== 'outside').map(({ name }) => name);
  keep('localStorage', 'rooms', entered.slice(-ROOMS));
}

function roomNamed(name) {
  if (!rooms.has(name)) rooms.set(name, new Room(name, client, page));
  return rooms.get(name);
}

function nameInAddress() {
  const hash = location.hash.slice(1) || 'lobby';
  try {
    return decodeURIComponent(hash);
  } catch {
    return hash; // a lone % stands for itself
  }
}

/** Show the room that the address names. */
function enter() {
  room?.mark(false);
  room?.close();
  if (room?.state === 'outside') {
    rooms.delete(room.name);
    room.leave();
  }
  room = roomNamed(nameInAddress());
  readTo = room.unread ? (room.seen?.offset ?? 0) : Infinity;
  $('title').textContent = room.name;
  $('room').value = '';
  $('text').value = recall('sessionStorage', `draft ${room.channel}`) ?? '';
  notify('');
  polling.turnTo(room.channel);
  room.open();
  atEnd = true;
  showAll();
  keepRooms();
  look();
}

/** What is in view counts as seen. */
function look() {
  if (atEnd && !document.hidden) room.see();
  soon(showRooms);
}

/** Half a sentence outlives a reload, and a look into another room. */
function keepDraft() {
  keep('sessionStorage', `draft ${room.channel}`, $('text').value);
}

// --- messages ------------------------------------------------------------------------------------------------------
const shown = new WeakMap(); // list item -> publication

function showAll() {
  $('messages').replaceChildren();
  for (const publication of room.items) place(publication);
  $('log').ariaBusy = String(!room.loaded);
  showBeginning();
  showUnsent();
  showState();
  showPeople();
}

function showBeginning() {
  const [first] = room.items;
  $('older').hidden = !room.loaded || room.beginning || !first;
  $('beginning').hidden = !room.loaded || !room.beginning || !first?.offset;
  $('beginning').textContent = first?.offset === 1 ? 'This is where the room begins.' : 'Older messages are not kept.';
}

function place(publication) {
  const { offset = 0, time, info, data } = publication;
  const list = $('messages');
  let before = list.lastElementChild;
  while (offset && Number(before?.dataset.offset) > offset) before = before.previousElementSibling;
  const given = data ?? {};
  const name = nameOf(info, given.name);
  const text = [given.text, given].find((it) => typeof it === 'string') ?? JSON.stringify(data);
  const item = copyOf('message');
  const at = new Date(time ?? Date.now());
  shown.set(item, { author: info?.user || info?.client || '', name, at });
  if (info && asName(given.name)) names.set(info.client, name);
  item.dataset.offset = offset;
  item.classList.toggle('mine', isMine(info));
  item.querySelector('.face').replaceWith(faceOf(name));
  item.querySelector('.name').textContent = name;
  item.querySelector('time').textContent = at.toLocaleTimeString(undefined, { timeStyle: 'short' });
  item.querySelector('time').dateTime = at.toISOString();
  item.querySelector('.text').append(...linked(text));
  if (before) before.after(item);
  else list.prepend(item);
  group(item);
  if (item.nextElementSibling) group(item.nextElementSibling);
  outbox.came(given.id);
}

/** How a message stands to the one before it: of the same author, of another day, the first that is new. */
function group(item) {
  const before = item.previousElementSibling;
  const [one, other] = [shown.get(item), shown.get(before)];
  const newDay = one.at.toDateString() !== other?.at.toDateString();
  const offset = Number(item.dataset.offset);
  const fresh = offset > readTo && !(Number(before?.dataset.offset) > readTo);
  const together = one.author === other?.author && one.name === other?.name && one.at - other?.at < GROUP_MS;
  item.classList.toggle('same', together && !newDay && !fresh);
  item.querySelector('.day').hidden = !newDay;
  item.querySelector('.day').textContent = one.at.toLocaleDateString(undefined, { dateStyle: 'full' });
  item.querySelector('.fresh').hidden = !fresh;
}

function faceOf(name) {
  const face = document.createElement('span');
  const signs = Array.from(name);
  face.className = 'face';
  face.ariaHidden = 'true';
  face.textContent = signs[0]?.toUpperCase() ?? '?';
  face.dataset.hue = signs.reduce((sum, sign) => sum + sign.codePointAt(0), 0) % 6;
  return face;
}

/** The text in pieces, of which those that are web addresses are links. */
function linked(text) {
  const pieces = [];
  let done = 0;
  for (const { 0: match, index } of text.matchAll(LINK)) {
    const shown = unclosed(match.replace(/[.,;:!?…»”’]+$/u, ''));
    const link = linkTo(shown);
    if (!link) continue;
    pieces.push(text.slice(done, index), link);
    done = index + shown.length;
  }
  return [...pieces, text.slice(done)];
}

/** Without the parenthesis that closes one opened before the address. */
function unclosed(address) {
  const count = (sign) => address.split(sign).length;
  return address.endsWith(')') && count(')') > count('(') ? unclosed(address.slice(0, -1)) : address;
}

/** Null if it is none, or names a user before the host, which serves only to look like another host. */
function linkTo(address) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (!['http:', 'https:'].includes(url.protocol) || url.username || url.password) return null;
  const link = document.createElement('a');
  link.href = url.href;
  link.target = '_blank';
  link.rel = 'noopener noreferrer nofollow';
  link.textContent = address;
  return link;
}

const unsentItems = new WeakMap(); // what is unsent -> its list item

function showUnsent() {
  const waiting = outbox.items.filter(({ channel, shown }) => channel === room.channel && !shown);
  const items = waiting.map((unsent) => {
    if (!unsentItems.has(unsent)) unsentItems.set(unsent, unsentItem(unsent));
    const item = unsentItems.get(unsent);
    const { failed } = unsent;
    const fate = failed ? `Not sent: ${failed}` : client.state === 'connected' ? 'Sending…' : 'Waits for the connection';
    item.querySelector('small').textContent = fate;
    item.querySelector('button').hidden = !failed;
    return item;
  });
  fill($('unsent'), items);
  soon(settle);
}

function unsentItem(unsent) {
  const item = copyOf('waiting');
  item.querySelector('.text').append(...linked(unsent.data.text));
  item.querySelector('button').onclick = () => {
    outbox.discard(unsent);
    $('text').focus();
  };
  return item;
}

function settle() {
  if (atEnd) $('log').scrollTop = $('log').scrollHeight;
  const unread = atEnd ? 0 : room.unread;
  $('down').hidden = atEnd;
  $('down').textContent = unread ? `${unread} new` : 'Newest messages';
}

// --- what rooms tell the page ----------------------------------------------------------------------------------------
const page = {
  changed(changed) {
    if (changed === room) {
      showState();
      soon(showPeople);
    }
    if (changed.state === 'live') keepRooms();
    soon(showRooms);
  },
  added(changed, publication) {
    const trims = changed !== room || atEnd;
    const gone = trims ? changed.trim(SHOWN) : 0;
    if (changed === room) {
      place(publication);
      if (gone) showBeginning();
      for (let left = gone; left; left--) $('messages').firstElementChild.remove();
      if (gone) group($('messages').firstElementChild);
      soon(settle);
      look();
    }
    soon(showRooms);
  },
  loaded(changed, publications) {
    if (changed !== room) return;
    const log = $('log');
    const toEnd = log.scrollHeight - log.scrollTop;
    log.ariaBusy = 'true'; // what is older is not read out
    publications.forEach(place);
    showBeginning();
    if (!atEnd) log.scrollTop = log.scrollHeight - toEnd;
    requestAnimationFrame(() => (log.ariaBusy = 'false'));
    soon(settle);
    look();
  },
  emptied(changed) {
    if (changed === room) showAll();
  },
  notify(changed, text) {
    if (changed === room) notify(text);
  },
  hears: () => WAYS[way].hears,
};

// --- what the visitor does -------------------------------------------------------------------------------------------
function showSide(open) {
  $('menu').ariaExpanded = String(open);
  $('side').classList.toggle('open', open);
  $('shade').hidden = !open;
  document.querySelector('main').inert = open;
  if (open) ($('rooms').querySelector('[aria-current]') ?? $('room')).focus();
  else if ($('side').contains(document.activeElement)) $('menu').focus();
}

function listen() {
  addEventListener('hashchange', () => {
    enter();
    showSide(false);
    if (matchMedia('(pointer: fine)').matches) $('text').focus(); // elsewhere a keyboard would cover the room
  });
  $('menu').onclick = () => showSide(true);
  $('shade').onclick = () => showSide(false);
  $('rooms').addEventListener('click', ({ target }) => target.closest('[aria-current]') && showSide(false));
  addEventListener('keydown', ({ key }) => key === 'Escape' && showSide(false));
  matchMedia('(min-width: 760px)').onchange = () => showSide(false);
  $('go').onsubmit = () => {
    const name = $('room').value.trim();
    if (!name) return;
    if (name === room.name) showSide(false);
    else location.hash = encodeURIComponent(name);
    $('room').value = '';
  };
  $('me').onsubmit = rename;
  $('name').onchange = rename;
  $('again').onclick = () => (client.state === 'connected' ? room.join() : client.connect());
  $('notice').lastElementChild.onclick = () => notify('');
  $('say').onsubmit = () => {
    const text = $('text').value.trim();
    if (!text) return;
    atEnd = true;
    readTo = Infinity;
    outbox.add(room.channel, guest.known ? { text } : { name: guest.name, text });
    room.mark(false);
    $('text').value = '';
    keepDraft();
    $('text').focus();
  };
  $('text').oninput = () => {
    keepDraft();
    room.mark(Boolean($('text').value.trim()), guest.known ? undefined : guest.name);
  };
  $('text').onkeydown = (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $('say').requestSubmit();
  };
  $('log').onscroll = () => {
    const { scrollTop, scrollHeight, clientHeight } = $('log');
    const was = atEnd;
    atEnd = scrollHeight - scrollTop - clientHeight < NEAR_PX || (atEnd && scrollTop >= scrolledTo);
    scrolledTo = scrollTop;
    if (!atEnd && scrollTop < OLDER_PX) room.loadOlder();
    if (was === atEnd) return;
    soon(settle);
    look();
  };
  $('older').onclick = () => {
    atEnd = false;
    room.loadOlder();
  };
  $('down').onclick = () => {
    atEnd = true;
    settle();
    look();
    $('log').focus();
  };
  document.onvisibilitychange = () => {
    if (document.hidden) readTo = room.top.offset;
    look();
  };
  new ResizeObserver(() => soon(settle)).observe($('log'));
  setInterval(tick, 500);
  setInterval(() => WAYS[way].hears && room.refresh(), PRESENCE_MS);
  setInterval(() => WAYS[way].hears || room.refresh(), POLLED_PRESENCE_MS);
  $('ways').onchange = ({ target }) => goBy(target.value);
}

async function begin() {
  for (const form of document.forms) form.addEventListener('submit', (event) => event.preventDefault());
  $('name').value = guest.name;
  keep('localStorage', 'name', guest.name);
  showWay();
  const options = await guest.options();
  client = new Client(undefined, { name: 'chat', transport: WAYS[way].transport, ...options });
  outbox = new Outbox(client, () => soon(showUnsent));
  client.on('connecting', ({ delayMs }) => {
    waitsUntil = delayMs && Date.now() + delayMs;
    refresh();
  });
  client.on('connected', () => {
    renewed = false;
    if (document.activeElement !== $('name')) $('name').value = guest.name; // as the server has cleaned it
    refresh();
  });
  client.on('disconnected', ({ code, reason }) => {
    ended = `${reason} (${code})`;
    refresh();
    if (code !== 3500 || !guest.known || renewed) return;
    renewed = true; // the server has another key than the one that signed our token
    guest.forget();
    client.setToken('');
    client.connect();
  });
  for (const name of recall('localStorage', 'rooms') ?? []) roomNamed(String(name));
  enter();
  listen();
  client.connect();
}

function refresh() {
  if (!room) return;
  showState();
  showUnsent();
  soon(showPeople);
}

begin();
