// The arena without a screen and without a network: how ships and shots move, who is hit, who has how many points, and
// where somebody else's ship is between two updates.  Pure: time and chance come as arguments.

export const WORLD = Object.freeze({ width: 1200, height: 800 });
export const SHIP_R = 17;
export const HIDDEN_S = 1.6; // from a hit to the next life
export const SHIELD_S = 2; // after which one can be hit
export const BEHIND_MS = 100; // how late others are shown, so that there is an update on either side of the moment
export const SILENT_MS = 3_000; // who says nothing for so long is gone

const TURN = 4.4; // radians a second
const THRUST = 460; // units a second, each second
const DRAG = 0.9;
const BOUNCE = 0.5;
const SHOT_SPEED = 640;
const SHOT_S = 1.1;
const RELOAD_S = 0.24;
const STRANGERS = 40; // ships that are shown at most, whoever sends
const SHOTS = 240;

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const turned = (angle) => Math.atan2(Math.sin(angle), Math.cos(angle));

// --- a ship ------------------------------------------------------------------
export function newShip(random) {
  const ship = { x: 0, y: 0, vx: 0, vy: 0, a: 0, on: false, hidden: 0, shield: 0, reload: 0 };
  place(ship, random);
  return ship;
}

/** Begin a life somewhere, looking at the middle. */
export function place(ship, random) {
  ship.x = WORLD.width * (0.1 + 0.8 * random());
  ship.y = WORLD.height * (0.1 + 0.8 * random());
  ship.a = Math.atan2(WORLD.height / 2 - ship.y, WORLD.width / 2 - ship.x);
  ship.vx = ship.vy = ship.hidden = 0;
  ship.shield = SHIELD_S;
}

/** Move on by `dt` seconds.  `turn` is -1 to 1; `toward`, if there is one, is the angle to turn to instead. */
export function moveShip(ship, { turn = 0, toward = null, thrust = false }, dt) {
  ship.reload = Math.max(0, ship.reload - dt);
  if (ship.hidden > 0) {
    ship.hidden = Math.max(0, ship.hidden - dt);
    ship.on = false;
    return;
  }
  ship.shield = Math.max(0, ship.shield - dt);
  const wanted = toward === null ? clamp(turn, -1, 1) * TURN * dt : clamp(turned(toward - ship.a), -TURN * dt, TURN * dt);
  ship.a = turned(ship.a + wanted);
  ship.on = thrust;
  if (thrust) {
    ship.vx += Math.cos(ship.a) * THRUST * dt;
    ship.vy += Math.sin(ship.a) * THRUST * dt;
  }
  const left = Math.exp(-DRAG * dt);
  ship.vx *= left;
  ship.vy *= left;
  ship.x += ship.vx * dt;
  ship.y += ship.vy * dt;
  const [x, y] = [clamp(ship.x, SHIP_R, WORLD.width - SHIP_R), clamp(ship.y, SHIP_R, WORLD.height - SHIP_R)];
  if (x !== ship.x) ship.vx *= -BOUNCE;
  if (y !== ship.y) ship.vy *= -BOUNCE;
  ship.x = x;
  ship.y = y;
}

/** A shot, or null if the gun is not ready; shooting ends the shield. */
export function shoot(ship) {
  if (ship.reload > 0 || ship.hidden > 0) return null;
  ship.reload = RELOAD_S;
  ship.shield = 0;
  const [cos, sin] = [Math.cos(ship.a), Math.sin(ship.a)];
  return {
    x: ship.x + cos * SHIP_R,
    y: ship.y + sin * SHIP_R,
    vx: cos * SHOT_SPEED + ship.vx,
    vy: sin * SHOT_SPEED + ship.vy,
  };
}

// --- shots ---------------------------------------------------------------------
/** Everything that flies; `hit(shot)` says whether it ends here, and is asked with its way of this step. */
export class Shots {
  #shots = [];

  add(shot) {
    if (this.#shots.length < SHOTS) this.#shots.push({ left: SHOT_S, fromX: shot.x, fromY: shot.y, ...shot });
  }

  move(dt, hit) {
    for (const shot of this.#shots) {
      shot.fromX = shot.x;
      shot.fromY = shot.y;
      shot.x += shot.vx * dt;
      shot.y += shot.vy * dt;
      shot.left -= dt;
    }
    this.#shots = this.#shots.filter((shot) => {
      const outside = shot.x < 0 || shot.y < 0 || shot.x > WORLD.width || shot.y > WORLD.height;
      return shot.left > 0 && !outside && !hit(shot);
    });
  }

  clear(keep = () => false) {
    this.#shots = this.#shots.filter(keep);
  }

  [Symbol.iterator]() {
    return this.#shots[Symbol.iterator]();
  }
}

/** Whether a shot's way of this step meets the ship: between two steps it flies further than a ship is wide. */
export function meets(shot, ship) {
  if (ship.hidden > 0 || ship.shield > 0) return false;
  const [dx, dy] = [shot.x - shot.fromX, shot.y - shot.fromY];
  const length = dx * dx + dy * dy;
  const along = length ? clamp(((ship.x - shot.fromX) * dx + (ship.y - shot.fromY) * dy) / length, 0, 1) : 0;
  return Math.hypot(shot.fromX + dx * along - ship.x, shot.fromY + dy * along - ship.y) < SHIP_R;
}

// --- what goes over the wire ------------------------------------------------------
const short = (value, digits = 1) => Number(value.toFixed(digits));

/** A ship and its new shots as they are sent; `t` is the sender's time in ms. */
export const write = (ship, shots, t, name) => ({
  t: Math.round(t),
  x: short(ship.x),
  y: short(ship.y),
  vx: short(ship.vx),
  vy: short(ship.vy),
  a: short(ship.a, 3),
  on: ship.on,
  up: ship.hidden <= 0,
  safe: ship.shield > 0,
  name,
  shots: shots.map(({ id, x, y, vx, vy }) => ({ id, x: short(x), y: short(y), vx: short(vx), vy: short(vy) })),
});

const isNumber = (value, size) => typeof value === 'number' && Math.abs(value) <= size; // NaN is not
const isPlace = ({ x, y, vx, vy }) =>
  isNumber(x, 4_000) && isNumber(y, 4_000) && isNumber(vx, 4_000) && isNumber(vy, 4_000);

/** What somebody sent, as far as it can be believed; null for nonsense. */
export function read(data) {
  if (!data || typeof data !== 'object' || !isPlace(data)) return null;
  if (!isNumber(data.a, 7) || !isNumber(data.t, 1e15)) return null;
  const { t, x, y, vx, vy, a } = data;
  const shots = (Array.isArray(data.shots) ? data.shots : [])
    .slice(0, 4)
    .filter((shot) => shot && typeof shot === 'object' && isPlace(shot) && typeof shot.id === 'string')
    .map((shot) => ({ id: shot.id.slice(0, 80), x: shot.x, y: shot.y, vx: shot.vx, vy: shot.vy }));
  return { t, x, y, vx, vy, a, on: data.on === true, up: data.up === true, safe: data.safe === true, shots };
}

/** A name for people to read; it goes into text nodes and onto the canvas, never into markup. */
export const asName = (name) => [...String(typeof name === 'string' && name ? name : 'Pilot')].slice(0, 32).join('');

// --- others ------------------------------------------------------------------------
/** Somebody else's ship: updates as they came, and where it is in between. */
export class Stranger {
  name = 'Pilot';
  key = '';
  heardAt = -Infinity;
  #updates = [];
  #lag = Infinity; // our time less theirs, for the update that came quickest

  /** `now` is ours in ms.  Late, doubled and older updates are passed over. */
  hear(update, now) {
    const last = this.#updates.at(-1);
    if (last && update.t <= last.t && last.t - update.t < SILENT_MS) return false;
    if (last && update.t < last.t) {
      this.#updates = []; // their clock was set back
      this.#lag = Infinity;
    }
    this.heardAt = now;
    this.#lag = Math.min(now - update.t, this.#lag + 1); // gives way by 1 ms an update, should their clock run slower
    this.#updates.push(update);
    if (this.#updates.length > 30) this.#updates.shift();
    return true;
  }

  /** When something of their time `t` is to be seen here. */
  shownAt(t) {
    return t + this.#lag + BEHIND_MS;
  }

  /** The ship as it is to be seen `now`; null before anything was heard. */
  at(now) {
    const t = now - this.#lag - BEHIND_MS;
    const updates = this.#updates;
    let after = updates.findIndex((update) => update.t > t);
    if (after === 0) return updates[0];
    if (after < 0) {
      const last = updates.at(-1);
      if (!last) return null;
      const s = Math.min(t - last.t, BEHIND_MS) / 1000; // no update: straight on, but not for long
      return { ...last, x: last.x + last.vx * s, y: last.y + last.vy * s };
    }
    const [one, two] = [updates[after - 1], updates[after]];
    if (!one.up || !two.up) return one; // a new life begins elsewhere: nobody flies there
    const part = (t - one.t) / (two.t - one.t);
    return {
      ...one,
      x: one.x + (two.x - one.x) * part,
      y: one.y + (two.y - one.y) * part,
      a: one.a + turned(two.a - one.a) * part,
    };
  }
}

/** All others, by client id. */
export class Strangers extends Map {
  /** The one with this id, made if need be; null if there are too many. */
  meet(id) {
    if (!this.has(id) && this.size < STRANGERS) this.set(id, new Stranger());
    return this.get(id) ?? null;
  }

  forget(now) {
    for (const [id, stranger] of this) if (now - stranger.heardAt > SILENT_MS) this.delete(id);
  }
}

// --- the table -----------------------------------------------------------------------
export const TABLE_HITS = 300;
export const TABLE_MS = 24 * 3_600_000;

/** Who hit whom, from the kept channel: the last 300 hits of a day, so that everybody counts the same ones. */
export class Table {
  #hits = new Map(); // offset -> hit
  #top = 0;

  clear() {
    this.#hits.clear();
    this.#top = 0;
  }

  /** Take a publication of the kept channel; null if it is no hit or was taken before. */
  take({ data, offset, time, info }) {
    const victim = info?.user || info?.client;
    const by = data?.by;
    if (!victim || !offset || this.#hits.has(offset)) return null;
    if (typeof by?.key !== 'string' || !by.key || by.key === victim) return null;
    const ofName = asName(info.connInfo?.name ?? data.name);
    const hit = { offset, time, by: by.key.slice(0, 80), byName: asName(by.name), of: victim, ofName };
    this.#hits.set(offset, hit);
    this.#top = Math.max(this.#top, offset);
    for (const old of this.#hits.keys()) if (old <= this.#top - TABLE_HITS) this.#hits.delete(old);
    return hit;
  }

  /** `{key, name, points, lost}` of each, the best first; `now` is Unix ms. */
  rows(now) {
    const rows = new Map();
    const row = (key, name) => {
      if (!rows.has(key)) rows.set(key, { key, name, points: 0, lost: 0 });
      const found = rows.get(key);
      found.name = name;
      return found;
    };
    for (const hit of [...this.#hits.values()].sort((one, other) => one.offset - other.offset)) {
      if (now - hit.time > TABLE_MS) continue;
      row(hit.by, hit.byName).points++;
      row(hit.of, hit.ofName).lost++;
    }
    return [...rows.values()].sort((one, other) => other.points - one.points || one.lost - other.lost);
  }
}

// --- the bot ---------------------------------------------------------------------------
/** What a bot of middling skill does: `now` in seconds makes it waver, so that it can be beaten. */
export function decide(bot, target, now) {
  const [dx, dy] = [target.x - bot.x, target.y - bot.y];
  const distance = Math.hypot(dx, dy);
  const s = distance / SHOT_SPEED;
  const aim = Math.atan2(dy + (target.vy - bot.vy) * s, dx + (target.vx - bot.vx) * s);
  const tooClose = distance < 140;
  const toward = aim + 0.2 * Math.sin(now * 1.7) + (tooClose ? 2.2 : 0);
  const aligned = Math.abs(turned(aim - bot.a)) < 0.12;
  const inMood = Math.sin(now * 2.3) > 0.1;
  return {
    toward,
    thrust: (tooClose || distance > 260) && Math.hypot(bot.vx, bot.vy) < 190,
    fire: aligned && inMood && distance < 600 && target.hidden <= 0 && target.shield <= 0,
  };
}
