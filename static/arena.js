// A game for whoever is here.  Each tab flies its own ship and says 30 times a second where it is, in a passing channel;
// shots go along, since one that is lost is only a miss.  Who is hit says so in a kept channel, once, by the shot's id as
// idempotency key: so nobody gives points to himself, no outage loses a hit, and the table is there for whoever comes later.

import { Client } from '/static/client.js';
import * as World from '/static/arena-world.js';
import { hue, Picture } from '/static/arena-picture.js';

const LIVE = 'live:arena';
const GAME = 'game:arena';
const STEP_S = 1 / 60;
const SEND_MS = 1_000 / 30;
const ALONE_MS = 1_500; // before the bot comes
const RETRY_MS = 1_000;
const BOT = { key: 'bot', name: 'Bot' };
const KEYS = {
  ArrowLeft: 'left', KeyA: 'left', ArrowRight: 'right', KeyD: 'right', ArrowUp: 'thrust', KeyW: 'thrust', Space: 'fire',
};

const at = (id) => document.getElementById(id);
const ourTime = () => performance.timeOrigin + performance.now();

/** What a tab remembers over a reload; it is another pilot than the tab beside it.  Storage may be forbidden. */
const memory = {
  get(name) {
    try {
      return JSON.parse(sessionStorage.getItem(`arena.${name}`));
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      sessionStorage.setItem(`arena.${name}`, JSON.stringify(value));
    } catch {
      // then a reload makes a new pilot
    }
  },
};

// --- who I am --------------------------------------------------------------------
/** A guest's token under this name, for the same user as before; null where the server has no guests. */
async function askForSession(name) {
  const former = memory.get('session');
  const answer = await fetch('/v1/session', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ name, token: former?.token ?? '' }),
  });
  if (answer.status === 404) return null;
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error?.message ?? answer.statusText);
  memory.set('session', body);
  return body;
}

// --- the game ----------------------------------------------------------------------
class Game {
  me = World.newShip(Math.random);
  name = '';
  user = '';
  flying = false;
  bot = null;
  practice = { mine: 0, bots: 0 };
  strangers = new World.Strangers();
  shots = new World.Shots();
  table = new World.Table();
  controls = { left: false, right: false, thrust: false, fire: false, toward: null, far: false };
  client = null;
  #picture = new Picture(at('sky'));
  #live = null;
  #coming = []; // shots of others, until the moment in which their ships are shown
  #leaving = []; // shots of mine, until the next update
  #unsaid = new Map(Object.entries(memory.get('hits') ?? {})); // shot id -> hit of me that is not yet in the kept channel
  #shotId = 0;
  #last = 0;
  #rest = 0;
  #nextSend = 0;
  #aloneSince = Infinity;
  #missing = '';

  get key() {
    return this.user || this.client?.id || 'me';
  }

  start(session, name) {
    this.name = session?.name ?? World.asName(name);
    this.user = session?.user ?? '';
    const getToken = async () => (await askForSession(this.name))?.token;
    this.client = new Client(undefined, session ? { token: session.token, getToken } : {});
    this.client.on('connected', () => {
      this.#aloneSince = performance.now();
      this.#sayHits();
    });
    this.client.on('connecting', () => showState('connecting', 'Connection lost, coming back…'));
    this.client.on('disconnected', ({ reason }) => showState('ended', `Not connected: ${reason}`));
    this.#live = this.client.subscribe(LIVE, { joinLeave: true });
    this.#live.on('publication', ({ data, info }) => this.#hear(data, info));
    this.#live.on('leave', ({ info }) => this.strangers.delete(info?.client));
    this.#live.on('unsubscribed', ({ reason }) => this.#lack(`No updates from others: ${reason}`));
    const game = this.client.subscribe(GAME);
    game.on('subscribed', ({ recovered }) => recovered || this.#readTable(game));
    game.on('publication', (publication) => this.#take(publication));
    game.on('unsubscribed', ({ reason }) => this.#lack(`No table is kept: ${reason}`));
    showState('connecting', 'Connecting…');
    this.client.connect();
    this.flying = true;
    World.place(this.me, Math.random);
  }

  /** Without a channel one may still fly, and is told what is missing. */
  #lack(what) {
    this.#missing = what;
    showState('ended', what);
  }

  // --- others ---
  #hear(data, info) {
    if (!info?.client || info.client === this.client.id) return;
    const update = World.read(data);
    const stranger = update && this.strangers.meet(info.client);
    if (!stranger) return;
    const wasUp = stranger.at(ourTime())?.up;
    if (!stranger.hear(update, ourTime())) return;
    stranger.name = World.asName(info.connInfo?.name ?? data.name);
    stranger.key = info.user || info.client;
    if (wasUp && !update.up) this.#picture.blast(update, performance.now(), stranger.key);
    for (const shot of update.shots) {
      this.#coming.push({ ...shot, from: info.client, at: stranger.shownAt(update.t) });
    }
    if (this.#coming.length > 400) this.#coming.splice(0, this.#coming.length - 400);
  }

  // --- hits ---
  #hit(shot) {
    const shooter = this.strangers.get(shot.from);
    this.me.hidden = World.HIDDEN_S;
    this.#picture.blast(this.me, performance.now(), this.key);
    if (shot.from === BOT.key) {
      this.practice.bots++;
      showPractice(this.practice);
    } else if (shooter) {
      this.#unsaid.set(shot.id, { by: { key: shooter.key, name: shooter.name }, name: this.name });
      this.#sayHits();
    }
  }

  /** Say every hit that is not known to be kept; the key makes it count once, however often it is said. */
  async #sayHits() {
    memory.set('hits', Object.fromEntries(this.#unsaid));
    await Promise.all([...this.#unsaid].map(async ([id, hit]) => {
      try {
        await this.client.publishOnce(GAME, hit, id);
      } catch (error) {
        if (error.temporary) {
          if (this.client.state === 'connected') setTimeout(() => this.#sayHits(), RETRY_MS);
          return; // otherwise it is said when the connection is back
        }
      }
      this.#unsaid.delete(id);
    }));
    memory.set('hits', Object.fromEntries(this.#unsaid));
  }

  async #readTable(game) {
    try {
      const page = await game.history({ limit: World.TABLE_HITS, reverse: true });
      this.table.clear();
      for (const publication of page.publications) this.table.take(publication);
    } catch {
      // without the leave to read, the table begins now; a connection that was lost asks again when it is back
    }
    this.showTable();
  }

  #take(publication) {
    const hit = this.table.take(publication);
    if (!hit) return;
    this.showTable();
    showNews(`${hit.byName} hit ${hit.ofName}`);
    if (hit.by === this.key) this.#picture.word(this.me, '+1', performance.now());
  }

  showTable() {
    showRows(this.table.rows(Date.now()), this.key);
  }

  // --- time ---
  run = (now) => {
    requestAnimationFrame(this.run);
    this.#rest = Math.min(this.#rest + (now - this.#last) / 1_000, 0.25);
    this.#last = now;
    for (; this.#rest >= STEP_S; this.#rest -= STEP_S) this.#step();
    if (this.flying) this.#send(now);
    this.#draw(now);
  };

  #step() {
    const { me, controls, shots } = this;
    this.strangers.forget(ourTime());
    this.#mindTheBot();
    if (this.flying) {
      if (controls.toward) this.#steer();
      const wasHidden = me.hidden > 0;
      World.moveShip(me, {
        turn: Number(controls.right) - Number(controls.left),
        toward: controls.toward && controls.far ? controls.angle : null,
        thrust: controls.thrust || (controls.toward !== null && controls.far),
      }, STEP_S);
      if (wasHidden && me.hidden === 0) World.place(me, Math.random);
      if (controls.fire) this.shoot();
    }
    if (this.bot) this.#moveBot();
    const now = ourTime();
    this.#coming = this.#coming.filter((shot) => shot.at > now || void shots.add(shot));
    shots.move(STEP_S, (shot) => this.#ends(shot, now));
  }

  #ends(shot, now) {
    if (shot.from !== 'me') {
      const hit = this.flying && World.meets(shot, this.me);
      if (hit) this.#hit(shot);
      return hit;
    }
    if (this.bot && World.meets(shot, this.bot)) {
      this.bot.hidden = World.HIDDEN_S;
      this.#picture.blast(this.bot, performance.now(), BOT.key);
      this.#picture.word(this.bot, 'hit', performance.now());
      this.practice.mine++;
      showPractice(this.practice);
      return true;
    }
    // On others it is only seen to end: whether it hit is theirs to say.
    return [...this.strangers.values()].some((stranger) => {
      const ship = stranger.at(now);
      return ship?.up && !ship.safe && World.meets(shot, { ...ship, hidden: 0, shield: 0 });
    });
  }

  shoot() {
    const shot = World.shoot(this.me);
    if (!shot) return;
    this.shots.add({ ...shot, from: 'me' });
    this.#leaving.push({ ...shot, id: `${this.client.id || 'offline'}:${++this.#shotId}` });
  }

  #steer() {
    const { controls } = this;
    const from = this.#picture.toPage(this.me);
    const [dx, dy] = [controls.toward.x - from.x, controls.toward.y - from.y];
    controls.far = Math.hypot(dx, dy) > 22;
    controls.angle = Math.atan2(dy, dx);
  }

  #send(now) {
    if (now < this.#nextSend) return;
    this.#nextSend = Math.max(this.#nextSend + SEND_MS, now - SEND_MS);
    const shots = this.#leaving.splice(0, 4);
    this.client.say(LIVE, World.write(this.me, shots, ourTime(), this.name));
  }

  // --- the bot: only for who is alone ---
  #mindTheBot() {
    const now = performance.now();
    if (this.strangers.size) {
      this.#aloneSince = now;
      if (this.bot) {
        this.bot = null;
        this.shots.clear((shot) => shot.from !== BOT.key);
        showNews('Somebody came: the bot leaves.');
      }
    } else if (!this.bot && this.flying && this.client.state === 'connected' && now - this.#aloneSince > ALONE_MS) {
      this.bot = World.newShip(Math.random);
      showNews('Nobody else is here: a bot plays along.');
    }
    if (this.flying && this.client.state === 'connected') {
      const others = this.strangers.size;
      if (this.#missing) showState('ended', this.#missing);
      else showState('live', others ? `Live · ${others + 1} ships` : this.bot ? 'Live · you and a bot' : 'Live');
    }
  }

  #moveBot() {
    const { bot, me } = this;
    const wish = World.decide(bot, me, performance.now() / 1_000);
    const wasHidden = bot.hidden > 0;
    World.moveShip(bot, wish, STEP_S);
    if (wasHidden && bot.hidden === 0) World.place(bot, Math.random);
    if (!wish.fire) return;
    const shot = World.shoot(bot);
    if (shot) this.shots.add({ ...shot, from: BOT.key });
    bot.reload *= 2.5;
  }

  // --- the picture ---
  #draw(now) {
    const seen = (ship) => ({ ...ship, safe: ship.shield > 0 });
    const others = [...this.strangers.values()]
      .map((stranger) => ({ of: stranger, ship: stranger.at(ourTime()), name: stranger.name, key: stranger.key }))
      .filter(({ ship }) => ship?.up);
    if (this.bot && this.bot.hidden <= 0) others.push({ of: this.bot, ship: seen(this.bot), ...BOT });
    const mine = this.flying && this.me.hidden <= 0;
    const me = mine ? { of: this.me, ship: seen(this.me), name: this.name, key: this.key } : null;
    this.#picture.draw({ centre: this.me, me, others, shots: this.shots, now });
  }
}

// --- the page -----------------------------------------------------------------------
function showState(kind, text) {
  const state = at('state');
  state.dataset.kind = kind;
  if (state.textContent !== text) state.textContent = text; // it is read aloud when it is set
}

function cell(text) {
  const td = document.createElement('td');
  td.textContent = text;
  return td;
}

function showRows(rows, mine) {
  at('rows').replaceChildren(...rows.slice(0, 20).map(({ key, name, points, lost }) => {
    const tr = document.createElement('tr');
    tr.className = key === mine ? 'me' : '';
    tr.append(cell(name), cell(points), cell(lost));
    tr.firstElementChild.dataset.hue = hue(key); // the colour of the ship
    return tr;
  }));
  at('none').hidden = rows.length > 0;
}

function showPractice({ mine, bots }) {
  at('practice').hidden = false;
  at('practice').textContent = `Practice: you ${mine}, bot ${bots}`;
}

function showNews(text) {
  const line = document.createElement('p');
  line.textContent = text;
  at('news').append(line);
  while (at('news').children.length > 6) at('news').firstChild.remove();
}

const game = new Game();
globalThis.arena = game; // for the console

at('name').value = memory.get('session')?.name ?? '';
at('start').addEventListener('submit', async (event) => {
  event.preventDefault();
  const fly = event.submitter ?? at('start').querySelector('button');
  const name = at('name').value;
  fly.disabled = true;
  at('fault').hidden = true;
  try {
    game.start(await askForSession(name), name);
  } catch (error) {
    at('fault').textContent = error instanceof TypeError ? 'The server does not answer. Try again.' : error.message;
    at('fault').hidden = false;
    return;
  } finally {
    fly.disabled = false;
  }
  at('start').hidden = true;
  at('fire').hidden = !matchMedia('(any-pointer: coarse)').matches;
  at('sky').focus();
});

const { controls } = game;
const isForGame = (event) => game.flying && !event.target.closest?.('input, button, a, [role="region"]');
addEventListener('keydown', (event) => {
  const control = KEYS[event.code];
  if (!control || !isForGame(event) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  controls[control] = true;
  if (control === 'fire' && !event.repeat) game.shoot(); // a tap may be over before the next step looks
});
addEventListener('keyup', (event) => {
  const control = KEYS[event.code];
  if (control) controls[control] = false;
});
const letGo = () => Object.assign(controls, { left: false, right: false, thrust: false, fire: false, toward: null });
addEventListener('blur', letGo);
document.addEventListener('visibilitychange', letGo);

let finger = null; // the one that steers
const sky = at('sky');
sky.addEventListener('pointerdown', (event) => {
  if (finger !== null || !game.flying) return;
  finger = event.pointerId;
  sky.setPointerCapture(finger);
  controls.toward = { x: event.offsetX, y: event.offsetY };
});
sky.addEventListener('pointermove', (event) => {
  if (event.pointerId === finger) controls.toward = { x: event.offsetX, y: event.offsetY };
});
for (const end of ['pointerup', 'pointercancel', 'lostpointercapture']) {
  sky.addEventListener(end, (event) => {
    if (event.pointerId !== finger) return;
    finger = null;
    controls.toward = null;
  });
}
at('fire').addEventListener('pointerdown', () => (controls.fire = true));
for (const end of ['pointerup', 'pointercancel', 'pointerleave']) {
  at('fire').addEventListener(end, () => (controls.fire = false));
}
at('fire').addEventListener('click', () => game.shoot()); // by keyboard, and by a tap shorter than a step
at('fire').addEventListener('contextmenu', (event) => event.preventDefault());

requestAnimationFrame(game.run);
setInterval(() => game.flying && game.showTable(), 60_000);
