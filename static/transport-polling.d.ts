/** Types of transport-polling.js: requests to /v1 (PROTOCOL 17.1, 17.2), for `ClientOptions.transport`. */

import type { Socket, Transport } from './client.js';

/**
 * Follows kept channels by asking again and again; the cursor is the same as on every transport.
 *
 * What it cannot: channels that keep nothing and subscription tokens (`subscribe` is refused with 108); joins and
 * leaves; what the server subscribes (`connected` brings none, so its positions are forgotten); `say`, which drops
 * everything; `rpc` but for `publishOnce`, and `history` forwards (108). `client.id` is empty, `name` and `data` go
 * nowhere. To follow a channel one has to have leave to read its history. Who polls is in no presence. Commands are under way at the same time: await one where order matters.
 */
export class Polling implements Transport {
  constructor();
  /**
   * This channel is waited for, so that its publications come at once; all others are asked every 5 s. To be called
   * before connecting, and whenever somebody looks at another channel.
   */
  turnTo(channel: string): void;
  open(url: URL): Socket;
}
