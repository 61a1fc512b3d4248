// Asks the server every two seconds how it is, and shows what it says; at rest while nobody looks.

const EVERY_MS = 2_000;
const PATIENCE_MS = 5_000;

const at = (id) => document.getElementById(id);
let timer = 0;

function span(seconds) {
  const parts = [[86_400, 'd'], [3_600, 'h'], [60, 'min'], [1, 's']];
  const first = parts.findIndex(([size]) => seconds >= size);
  if (first < 0) return '0 s';
  const [size, unit] = parts[first];
  const [next, smaller] = parts[first + 1] ?? [];
  const rest = next && first < 2 ? Math.floor((seconds % size) / next) : 0;
  return `${Math.floor(seconds / size)} ${unit}${rest ? ` ${rest} ${smaller}` : ''}`;
}

/** Only what differs is written: a status region is read aloud whenever its text is set. */
function write(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}

function show(status) {
  at('state').dataset.kind = 'live';
  write('state', 'It works');
  const mode = status.configured
    ? 'configured: what you may do here is in its settings.'
    : 'open for trying out: everybody on this machine may do everything, and nobody else comes in.';
  write('mode', `Version ${status.version}, ${mode}`);
  write('connections', status.connections.toLocaleString());
  write('channels-title', status.channels === 1 ? 'channel' : 'channels');
  write('channels', status.channels.toLocaleString());
  write('uptime', span(status.uptime));
}

function showAbsence() {
  at('state').dataset.kind = 'ended';
  write('state', 'The server does not answer');
  write('mode', 'Asking again every two seconds.');
  for (const id of ['connections', 'channels', 'uptime']) write(id, '–');
}

async function ask() {
  clearTimeout(timer);
  try {
    const answer = await fetch('/v1/status', { cache: 'no-store', signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(answer.statusText);
    show(await answer.json());
  } catch {
    showAbsence();
  }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(ask, EVERY_MS);
}

document.addEventListener('visibilitychange', () => (document.hidden ? clearTimeout(timer) : ask()));
at('copy').addEventListener('click', async () => {
  try {
    await navigator.clipboard.writeText(at('example').textContent);
    at('copy').textContent = 'Copied';
  } catch {
    getSelection().selectAllChildren(at('example'));
    at('copy').textContent = 'Selected';
  }
});
ask();
