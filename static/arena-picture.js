// Draws the arena on a canvas, and knows where on it the world is.

import { SHIP_R, WORLD } from '/static/arena-world.js';

const GRID = 100;
const BLAST_MS = 700;
const WORD_MS = 1_100;
const TRAIL_MS = 420;
const COLOURS = 6;
const NAMES = ['outside', 'sky', 'horizon', 'grid', 'edge', 'star', 'shot', 'flame', 'ink', ...Array.from({ length: COLOURS }, (_, i) => `ship-${i}`)];
const STARS = Array.from({ length: 90 }, (_, i) => [(i * 733.3) % WORLD.width, (i * i * 97.7) % WORLD.height, 1 + (i % 3)]);

const SHADE = new Path2D(`M${SHIP_R * 1.15} 0L${-SHIP_R * 0.9} ${SHIP_R * 0.8}L${-SHIP_R * 0.55} 0Z`);

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** The number of a colour that stays with its bearer. */
export function hue(key) {
  let sum = 0;
  for (const character of key) sum = (sum * 31 + character.codePointAt(0)) >>> 0;
  return sum % COLOURS;
}

export class Picture {
  #canvas;
  #pen;
  #width = 1;
  #height = 1;
  #scale = 1;
  #left = 0; // of the world, in pixels of the page
  #top = 0;
  #colours = {};
  #blasts = [];
  #words = [];
  #trails = new WeakMap(); // whose ship it is -> places where it thrust
  #calm = matchMedia('(prefers-reduced-motion: reduce)');

  constructor(canvas) {
    this.#canvas = canvas;
    this.#pen = canvas.getContext('2d');
    this.#dress();
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.#dress());
    new ResizeObserver(() => this.#fit()).observe(canvas);
    this.#fit();
  }

  #dress() {
    const style = getComputedStyle(document.documentElement);
    for (const name of NAMES) this.#colours[name] = style.getPropertyValue(`--${name}`).trim();
  }

  #fit() {
    const fine = Math.min(devicePixelRatio || 1, 2);
    this.#width = this.#canvas.clientWidth || 1;
    this.#height = this.#canvas.clientHeight || 1;
    this.#canvas.width = Math.round(this.#width * fine);
    this.#canvas.height = Math.round(this.#height * fine);
  }

  /** Where on the canvas a place of the world is. */
  toPage({ x, y }) {
    return { x: this.#left + x * this.#scale, y: this.#top + y * this.#scale };
  }

  blast({ x, y }, now, key) {
    this.#blasts.push({ x, y, now, key });
  }

  /** A word that rises from a place of the world and fades. */
  word({ x, y }, text, now) {
    this.#words.push({ x, y, text, now });
  }

  /** `me` and `others` are `{of, ship, name, key}`, `of` the same object each time; `centre` is what is looked at. */
  draw({ centre, me, others, shots, now }) {
    const pen = this.#pen;
    const fine = this.#canvas.width / this.#width;
    // The sky is full of it: what does not fit is beyond the edge, with arrows to whoever is there.
    this.#scale = Math.max(this.#width / WORLD.width, this.#height / WORLD.height);
    const shift = (room, size, at) =>
      size <= room ? (room - size) / 2 : clamp(room / 2 - at * this.#scale, room - size, 0);
    this.#left = shift(this.#width, WORLD.width * this.#scale, centre.x);
    this.#top = shift(this.#height, WORLD.height * this.#scale, centre.y);

    pen.setTransform(fine, 0, 0, fine, 0, 0);
    pen.fillStyle = this.#colours.outside;
    pen.fillRect(0, 0, this.#width, this.#height);
    pen.setTransform(fine * this.#scale, 0, 0, fine * this.#scale, fine * this.#left, fine * this.#top);
    this.#drawWorld();
    const ships = me ? [...others, me] : others;
    if (!this.#calm.matches) for (const one of ships) this.#drawTrail(one, now);
    for (const shot of shots) this.#drawShot(shot);
    for (const one of ships) this.#drawShip(one, now, one === me);
    this.#drawBlasts(now);
    this.#drawWords(now);
    pen.setTransform(fine, 0, 0, fine, 0, 0);
    for (const one of others) this.#pointAt(one);
  }

  #drawWorld() {
    const pen = this.#pen;
    const [x, y] = [WORLD.width / 2, WORLD.height / 2];
    const sky = pen.createRadialGradient(x, y, 0, x, y, WORLD.width * 0.62);
    sky.addColorStop(0, this.#colours.sky);
    sky.addColorStop(1, this.#colours.horizon);
    pen.fillStyle = sky;
    pen.fillRect(0, 0, WORLD.width, WORLD.height);
    pen.strokeStyle = this.#colours.grid;
    pen.lineWidth = 1;
    pen.beginPath();
    for (let x = GRID; x < WORLD.width; x += GRID) {
      pen.moveTo(x, 0);
      pen.lineTo(x, WORLD.height);
    }
    for (let y = GRID; y < WORLD.height; y += GRID) {
      pen.moveTo(0, y);
      pen.lineTo(WORLD.width, y);
    }
    pen.stroke();
    pen.fillStyle = this.#colours.star;
    for (const [x, y, size] of STARS) {
      pen.globalAlpha = 0.35 + size * 0.2;
      pen.fillRect(x, y, size, size);
    }
    pen.globalAlpha = 1;
    pen.strokeStyle = this.#colours.edge;
    pen.lineWidth = 3;
    pen.strokeRect(1.5, 1.5, WORLD.width - 3, WORLD.height - 3);
  }

  #drawShot({ x, y, vx, vy }) {
    const pen = this.#pen;
    const speed = Math.hypot(vx, vy) || 1;
    pen.strokeStyle = this.#colours.shot;
    pen.lineWidth = 3.5;
    pen.lineCap = 'round';
    pen.beginPath();
    pen.moveTo(x, y);
    pen.lineTo(x - (vx / speed) * 12, y - (vy / speed) * 12);
    pen.stroke();
    pen.globalAlpha = 0.25;
    pen.lineWidth = 9;
    pen.stroke();
    pen.globalAlpha = 1;
  }

  /** Where it has thrust, fading. */
  #drawTrail({ of, ship, key }, now) {
    const pen = this.#pen;
    const trail = (this.#trails.get(of) ?? []).filter((place) => now - place.now < TRAIL_MS);
    this.#trails.set(of, trail);
    if (ship.on) trail.push({ x: ship.x - Math.cos(ship.a) * SHIP_R, y: ship.y - Math.sin(ship.a) * SHIP_R, now });
    pen.fillStyle = this.#colours[`ship-${hue(key)}`];
    for (const { x, y, now: begun } of trail) {
      const left = 1 - (now - begun) / TRAIL_MS;
      pen.globalAlpha = 0.3 * left;
      pen.beginPath();
      pen.arc(x, y, 2 + 5 * left, 0, 7);
      pen.fill();
    }
    pen.globalAlpha = 1;
  }

  #drawShip({ ship, name, key }, now, mine) {
    const pen = this.#pen;
    const colour = this.#colours[`ship-${hue(key)}`];
    pen.save();
    pen.translate(ship.x, ship.y);
    const glow = pen.createRadialGradient(0, 0, SHIP_R * 0.5, 0, 0, SHIP_R * 2.6);
    glow.addColorStop(0, colour);
    glow.addColorStop(1, `${colour}00`); // not "transparent", which is black
    pen.globalAlpha = mine ? 0.4 : 0.28;
    pen.fillStyle = glow;
    pen.fillRect(-SHIP_R * 2.6, -SHIP_R * 2.6, SHIP_R * 5.2, SHIP_R * 5.2);
    pen.globalAlpha = 1;
    pen.rotate(ship.a);
    if (ship.on) {
      const length = this.#calm.matches ? 16 : 12 + 9 * Math.abs(Math.sin(now / 35));
      pen.fillStyle = this.#colours.flame;
      pen.beginPath();
      pen.moveTo(-SHIP_R * 0.6, -6);
      pen.lineTo(-SHIP_R * 0.75 - length, 0);
      pen.lineTo(-SHIP_R * 0.6, 6);
      pen.fill();
    }
    pen.beginPath();
    pen.moveTo(SHIP_R * 1.15, 0);
    pen.lineTo(-SHIP_R * 0.9, SHIP_R * 0.8);
    pen.lineTo(-SHIP_R * 0.55, 0);
    pen.lineTo(-SHIP_R * 0.9, -SHIP_R * 0.8);
    pen.closePath();
    pen.fillStyle = colour;
    pen.fill();
    pen.globalAlpha = 0.28; // one side lies in the shade
    pen.fillStyle = '#000';
    pen.fill(SHADE);
    pen.globalAlpha = 1;
    if (mine) {
      pen.strokeStyle = this.#colours.ink;
      pen.lineWidth = 2;
      pen.stroke();
    }
    pen.restore();
    if (ship.safe) {
      pen.strokeStyle = colour;
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(ship.x, ship.y, SHIP_R * 1.7, 0, 7);
      pen.stroke();
    }
    pen.fillStyle = this.#colours.ink;
    pen.font = `${Math.round(13 / Math.min(1, this.#scale))}px system-ui, sans-serif`;
    pen.textAlign = 'center';
    pen.fillText(name, ship.x, ship.y + SHIP_R * 2.5, 220);
  }

  #drawBlasts(now) {
    const pen = this.#pen;
    this.#blasts = this.#blasts.filter((blast) => now - blast.now < BLAST_MS);
    for (const { x, y, now: begun, key } of this.#blasts) {
      const part = (now - begun) / BLAST_MS;
      pen.globalAlpha = 1 - part;
      pen.strokeStyle = this.#colours[`ship-${hue(key)}`];
      pen.lineWidth = 4;
      pen.beginPath();
      if (this.#calm.matches) pen.arc(x, y, SHIP_R * 1.5, 0, 7);
      else {
        for (let ray = 0; ray < 9; ray++) {
          const [cos, sin] = [Math.cos(ray * 0.698), Math.sin(ray * 0.698)];
          pen.moveTo(x + cos * (8 + part * 30), y + sin * (8 + part * 30));
          pen.lineTo(x + cos * (8 + part * 55), y + sin * (8 + part * 55));
        }
      }
      pen.stroke();
      pen.globalAlpha = 1;
    }
  }

  #drawWords(now) {
    const pen = this.#pen;
    this.#words = this.#words.filter((word) => now - word.now < WORD_MS);
    pen.font = `bold ${Math.round(20 / Math.min(1, this.#scale))}px system-ui, sans-serif`;
    pen.textAlign = 'center';
    pen.fillStyle = this.#colours.ink;
    for (const { x, y, text, now: begun } of this.#words) {
      const part = (now - begun) / WORD_MS;
      pen.globalAlpha = 1 - part * part;
      pen.fillText(text, x, y - SHIP_R * 2 - (this.#calm.matches ? 0 : part * 26));
    }
    pen.globalAlpha = 1;
  }

  /** Whoever is out of sight has an arrow at the edge. */
  #pointAt({ ship, key }) {
    const { x, y } = this.toPage(ship);
    if (x >= 0 && y >= 0 && x <= this.#width && y <= this.#height) return;
    const pen = this.#pen;
    const [atX, atY] = [clamp(x, 16, this.#width - 16), clamp(y, 16, this.#height - 16)];
    pen.save();
    pen.translate(atX, atY);
    pen.rotate(Math.atan2(y - atY, x - atX));
    pen.fillStyle = this.#colours[`ship-${hue(key)}`];
    pen.beginPath();
    pen.moveTo(10, 0);
    pen.lineTo(-7, 7);
    pen.lineTo(-7, -7);
    pen.fill();
    pen.restore();
  }
}
