// Who we are: a name, and a guest's token that carries it where the server gives such tokens (8.6).  Without them the name
// travels in each message.

import { backoff, keep, pause, recall } from '/static/chat-store.js';

export class Guest {
  name = recall('localStorage', 'name') ?? `Guest ${100 + Math.floor(Math.random() * 900)}`;
  user = '';
  known = null; // whether the server has guests, once it said so
  #token = recall('localStorage', 'token') ?? '';

  /** Ask until the server says whether it has guests (17); returns the options of a client. */
  async options() {
    for (let attempt = 0; this.known === null; attempt++) {
      try {
        const response = await fetch('/v1/status');
        if (response.status < 500) this.known = response.ok && (await response.json()).guests === true;
      } catch {} // no network, or half an answer
      if (this.known === null) await pause(backoff(attempt));
    }
    return this.known ? { getToken: () => this.token() } : {};
  }

  /** Another token under our name; throws what says whether to ask again. */
  async token(name = this.name) {
    const response = await fetch('/v1/session', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ name, token: this.#token }),
    });
    const answer = await response.json();
    if (!response.ok) {
      const temporary = response.status === 429 || response.status >= 500;
      throw Object.assign(new Error(answer.error.message), { temporary });
    }
    this.#token = answer.token;
    this.user = answer.user;
    this.called(answer.name);
    keep('localStorage', 'token', answer.token);
    return answer.token;
  }

  called(name) {
    this.name = name;
    keep('localStorage', 'name', name);
  }

  /** The server takes this token no more: be somebody new. */
  forget() {
    this.#token = '';
  }
}
