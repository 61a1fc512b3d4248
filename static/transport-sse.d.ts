/** Types of transport-sse.js: the protocol over server-sent events (PROTOCOL 2.5), for `ClientOptions.transport`. */

import type { Socket, Transport } from './client.js';

/**
 * Everything that a WebSocket has, through an `EventSource` and POST requests. The server has to have it switched on
 * (`sse.enabled`); otherwise the client ends with 3508. The connection token goes in the URL, which a proxy may log. Over
 * HTTP/1.1 a browser holds six connections to a server, all tabs together, of which each stream is one.
 */
export class Sse implements Transport {
  /** The paths are resolved against the client's URL; they default to those of PROTOCOL 2.1.2. */
  constructor(paths?: { stream?: string; emulation?: string });
  open(url: URL): Socket;
}
