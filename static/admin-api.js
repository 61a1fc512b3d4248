// What the console asks of the server: with a pass, which is kept for this tab and sent with each request by itself.

const KEPT_AS = 'waterspout-pass';
const PATIENCE_MS = 8_000;

/** The server said no; `code` is its error's, or the HTTP status. */
export class Refusal extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

export class Api {
  #base;
  #onOut;

  /** `base` is the path of the console; `onOut` is called when the pass is good no longer. */
  constructor(base, onOut) {
    this.#base = base.replace(/\/+$/, '');
    this.#onOut = onOut;
  }

  get inside() {
    return sessionStorage.getItem(KEPT_AS) !== null;
  }

  /** A link from the server's terminal has a pass behind the #; it is taken out of the address at once. */
  takeFromAddress() {
    const found = /^#pass=(.+)$/.exec(location.hash);
    if (!found) return;
    sessionStorage.setItem(KEPT_AS, found[1]);
    history.replaceState(null, '', location.pathname + location.search);
  }

  async login(password) {
    const { token } = await this.#ask('auth', { password });
    sessionStorage.setItem(KEPT_AS, token);
  }

  logout() {
    sessionStorage.removeItem(KEPT_AS);
  }

  get(path) {
    return this.#ask(path);
  }

  post(path, body) {
    return this.#ask(path, body);
  }

  /** One method of the back-end API; throws a Refusal. */
  async call(method, parameters = {}) {
    const { result, error } = await this.#ask(`api/${method}`, parameters);
    if (error) throw new Refusal(error.code, error.message);
    return result;
  }

  async #ask(path, body) {
    const pass = sessionStorage.getItem(KEPT_AS);
    const headers = pass === null ? {} : { Authorization: `Bearer ${pass}` };
    const options = { headers, cache: 'no-store', credentials: 'omit', signal: AbortSignal.timeout(PATIENCE_MS) };
    if (body !== undefined) {
      headers['Content-Type'] = 'application/json';
      Object.assign(options, { method: 'POST', body: JSON.stringify(body) });
    }
    const answer = await fetch(`${this.#base}/${path}`, options);
    const said = await answer.json().catch(() => ({}));
    if (answer.ok) return said;
    if (answer.status === 401 && path !== 'auth') {
      this.logout();
      this.#onOut();
    }
    throw new Refusal(said.error?.code ?? answer.status, said.error?.message ?? answer.statusText);
  }
}
