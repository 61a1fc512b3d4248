// The first view: what the process does, as numbers, and as lines of the last minutes.

import { at, count, define, make, span } from './admin-page.js';

const KEPT = 150;
const FEWEST = 30;
const WIDTH = 300;
const HEIGHT = 60;
const SVG = 'http://www.w3.org/2000/svg';

const GRAPHS = [
  ['clients', 'clients', (now) => sum(now, 'num_clients')],
  ['subscriptions', 'subscriptions', (now) => sum(now, 'num_subs')],
  ['in', 'publications in /s', (now, before) => rate(now, before, (n) => n.publications.kept + n.publications.passing)],
  ['out', 'deliveries /s', (now, before) => rate(now, before, (n) => n.deliveries)],
  ['commit', 'ms to store', (now, before) => mean(now, before, (n) => n.batch_seconds) * 1000],
  ['lag', 'ms of loop lag', (now) => now.lag * 1000],
];

const sum = (state, name) => state.nodes.reduce((all, node) => all + node[name], 0);

function rate(now, before, of) {
  return Math.max(0, (of(now.numbers) - of(before.numbers)) / ((now.time - before.time) / 1000));
}

function mean(now, before, of) {
  const [values, total] = of(now.numbers);
  const [valuesBefore, totalBefore] = of(before.numbers);
  return values > valuesBefore ? (total - totalBefore) / (values - valuesBefore) : 0;
}

const CODES = { 0: 'client left', 3001: 'shutdown', 3005: 'expired', 3008: 'slow', 3012: 'no pong', 3500: 'invalid token',
  3501: 'bad request', 3502: 'stale', 3503: 'forced', 3504: 'connection limit', 3509: 'too many errors' };

export class Graphs {
  #before = new Map();
  #series = new Map();

  constructor() {
    for (const [id, title] of GRAPHS) {
      const picture = document.createElementNS(SVG, 'svg');
      picture.setAttribute('viewBox', `0 0 ${WIDTH} ${HEIGHT}`);
      picture.setAttribute('preserveAspectRatio', 'none');
      picture.setAttribute('aria-hidden', 'true');
      const line = document.createElementNS(SVG, 'path');
      const below = document.createElementNS(SVG, 'path');
      below.setAttribute('class', 'below');
      picture.append(below, line);
      const value = make('b', { id: `graph-${id}` }, '–');
      const most = make('small', {}, '');
      at('graphs').append(make('li', {}, make('span', {}, title), value, most, picture));
      this.#series.set(id, { points: [], line, below, value, most });
    }
  }

  /** Draw one more state; two of the same process make a rate. */
  show(state) {
    const before = this.#before.get(state.node);
    if (before === undefined || state.time - before.time > 200) this.#before.set(state.node, state);
    if (before !== undefined && state.time - before.time > 200) {
      for (const [id, , read] of GRAPHS) this.#add(this.#series.get(id), read(state, before));
    }
    this.#tell(state);
  }

  #add(series, value) {
    const { points, line, below } = series;
    points.push(value);
    if (points.length > KEPT) points.shift();
    const most = Math.max(...points);
    const top = most || 1;
    const step = WIDTH / (Math.max(points.length, FEWEST) - 1);
    const left = WIDTH - (points.length - 1) * step;
    const steps = points.map((point, index) => {
      return `${(left + index * step).toFixed(1)} ${(HEIGHT - 3 - (point / top) * (HEIGHT - 6)).toFixed(1)}`;
    });
    line.setAttribute('d', `M${steps.join('L')}`);
    below.setAttribute('d', `M${left.toFixed(1)} ${HEIGHT}L${steps.join('L')}L${WIDTH} ${HEIGHT}Z`);
    series.value.textContent = count(value);
    series.most.textContent = `at most ${count(most)}`;
  }

  #tell(state) {
    const troubles = Object.entries(state.troubles);
    at('troubles').hidden = !troubles.length;
    at('troubles').replaceChildren(...troubles.map(([part, why]) => make('li', {}, make('b', {}, part), ` ${why}`)));
    at('nodes').replaceChildren(...state.nodes.map((node) => row(node, node.uid === state.node)));
    const numbers = state.numbers;
    define('disconnects', sorted(numbers.disconnects).map(([code, many]) => [name(code), count(many)]));
    define('refusals', sorted(numbers.refusals).map(([code, many]) => [`error ${code}`, count(many)]));
    define('limits', sorted(numbers.limits).map(([setting, many]) => [setting, count(many)]));
    const { recovered, unrecoverable, lost } = numbers.recoveries;
    define('recoveries', [['recovered', recovered], ['unrecoverable', unrecoverable], ['lost', lost],
      ['holes', numbers.holes], ['repairs', numbers.repairs.done]].map(([what, many]) => [what, count(many)]));
  }
}

const name = (code) => (CODES[code] ? `${code === '0' ? '' : `${code} `}${CODES[code]}` : code);
const sorted = (numbers) => Object.entries(numbers).sort(([, one], [, other]) => other - one);

function row(node, ours) {
  const cells = [node.num_clients, node.num_users, node.num_channels, node.num_subs].map(count);
  const title = make('th', { scope: 'row' }, node.name, ours ? make('small', {}, ' answers') : '');
  return make('tr', {}, title, ...[...cells, span(node.uptime), node.version].map((text) => make('td', {}, text)));
}
