/** Types of client.js.  Times are in milliseconds, `time` in Unix milliseconds; "PROTOCOL" is server/PROTOCOL.md. */

/** A JSON value, given or taken. */
export type Json = any;

/** A place in a kept channel (PROTOCOL 6.4). */
export interface Position {
  offset: number;
  epoch: string;
}

/** Who did something (PROTOCOL 6.2): the ids are the server's word, the infos come from tokens. */
export interface ClientInfo {
  user: string;
  client: string;
  connInfo?: Json;
  chanInfo?: Json;
}

/** One message of a channel (PROTOCOL 6.3). `offset` and `time` only in a kept channel, `info` if a client wrote it. */
export interface Publication {
  data: Json;
  offset?: number;
  info?: ClientInfo;
  tags?: Record<string, string>;
  time?: number;
}

/** What codes of this side mean, in errors and in events; all others are the server's (PROTOCOL 7). */
export const CODES: Readonly<{
  /** The application asked for it. */
  CALLED: 0;
  /** No reply within 5 s: the outcome is unknown. */
  TIMED_OUT: 1;
  /** The connection ended or did not open. Of a command: before the reply, so its outcome is unknown. */
  LOST: 2;
  /** Nothing was sent. */
  NOT_CONNECTED: 3;
  /** `getToken` failed, or gave nothing. */
  NO_TOKEN: 4;
  /** No ping came in time. */
  SILENT: 5;
  /** The transport opens nothing to this address, or what comes through it is not the protocol. */
  UNUSABLE: 6;
}>;

/** How a command fails. `temporary`: trying again may help; for a publish only `publishOnce` can be tried again safely. */
export class ClientError extends Error {
  constructor(code: number, message: string, temporary?: boolean);
  readonly code: number;
  readonly temporary: boolean;
}

/** What a client needs of a WebSocket, each member as there; `close` calls nothing back. */
export interface Socket {
  /** 1 once `onopen` is called, until `close` is, or `onclose`. */
  readonly readyState: number;
  /** Bytes, more or less, that wait to leave; beyond 65,536 `say` drops. */
  readonly bufferedAmount: number;
  onopen: ((event: any) => void) | null;
  /** `data` is one reply or push, or several, each on a line of its own. */
  onmessage: ((event: any) => void) | null;
  /** Called with `code` and `reason` (PROTOCOL 7.2), 1006 where nobody said why. */
  onclose: ((event: any) => void) | null;
  /** One command. */
  send(text: string): void;
  close(): void;
}

/** A way to the server: `Sse` of transport-sse.js, `Polling` of transport-polling.js, or your own. */
export interface Transport {
  /** `url` is the client's, with ws or wss. May throw, which ends the client with `UNUSABLE`. */
  open(url: URL): Socket;
}

/** Takes the callback off again. */
export type Off = () => void;

export interface ClientOptions {
  /** A connection token (PROTOCOL 8.1), if one is at hand. */
  token?: string;
  /**
   * Called where there is no token, and in good time before one expires. Throw to be asked again after a while; throw
   * an error with `temporary: false`, or give nothing, to end the connection for good.
   */
  getToken?: () => string | null | undefined | Promise<string | null | undefined>;
  /** Name of the application, and data for the server's hooks. */
  name?: string;
  data?: Json;
  /** WebSocket if left out. */
  transport?: Transport | null;
}

export interface SubscribeOptions {
  /** A subscription token (PROTOCOL 8.2), if one is at hand. */
  token?: string;
  /** As `ClientOptions.getToken`. */
  getToken?: (about: { channel: string }) => string | null | undefined | Promise<string | null | undefined>;
  /** Ask for joins and leaves, where the namespace gives them on request. */
  joinLeave?: boolean;
  /** Ask for recovery, where the namespace gives it on request. */
  recoverable?: boolean;
  /** Where to go on from: everything behind it comes as publications, or `recovered` is false. Counts for one start. */
  since?: Position | null;
}

export interface ClientEvents {
  /** On the way: at once (0), or `delayMs` from now. */
  connecting: { code: number; reason: string; delayMs: number };
  connected: { client: string; data?: Json; time?: number };
  /** For good, until `connect()`. */
  disconnected: { code: number; reason: string };
  /** These are of subscriptions that the server made (PROTOCOL 11.7). */
  subscribed: Subscribed & { channel: string };
  publication: Publication & { channel: string };
  join: { channel: string; info: ClientInfo };
  leave: { channel: string; info: ClientInfo };
  unsubscribed: { channel: string; code: number; reason: string };
}

export interface Subscribed {
  /** All that was missed follows as publications. */
  recovered: boolean;
  /** There was a position to recover from. With `recovered` false, something is missing: load anew what is needed. */
  wasRecovering: boolean;
  position: Position | null;
  data?: Json;
}

export interface SubscriptionEvents {
  subscribed: Subscribed;
  publication: Publication;
  join: { info: ClientInfo };
  leave: { info: ClientInfo };
  /** Asked for, or lost and asked for again by itself. */
  subscribing: { code: number; reason: string };
  /** For good, until `client.subscribe()`. */
  unsubscribed: { code: number; reason: string };
}

export interface HistoryOptions {
  /** How many at most: 0 asks for the position only, -1 for as many as the server gives at once. 0 if left out. */
  limit?: number;
  /** Exclusive. */
  since?: Position | null;
  /** Newest first. */
  reverse?: boolean;
}

/** `offset` and `epoch` are the top of the channel, not of the page. */
export interface History {
  publications: Publication[];
  offset: number;
  epoch: string;
}

/** Made by `client.subscribe`. Its methods are the client's with the channel filled in. */
export class Subscription {
  private constructor();
  readonly channel: string;
  readonly state: 'unsubscribed' | 'subscribing' | 'subscribed';
  /** Everything up to here was given to callbacks; null in a passing channel. It stays when the subscription ends. */
  readonly position: Position | null;
  on<E extends keyof SubscriptionEvents>(event: E, callback: (context: SubscriptionEvents[E]) => void): Off;
  /**
   * Resolves when it is subscribed, at once if it is. Rejects with code and reason when it has ended: refused, taken
   * away, or left. While the client is disconnected it waits.
   */
  ready(): Promise<void>;
  unsubscribe(): void;
  publish(data: Json): Promise<void>;
  history(options?: HistoryOptions): Promise<History>;
  /** Client ids and who they are. */
  presence(): Promise<Record<string, ClientInfo>>;
  presenceStats(): Promise<{ numClients: number; numUsers: number }>;
}

/**
 * One connection at a time, and what belongs to it. It comes back by itself until a code says to stay away. Commands
 * reject with a `ClientError`, at once where there is no connection: nothing waits here.
 */
export class Client {
  /** `url` may be relative to the page, with http or ws; it defaults to this page's own server. */
  constructor(url?: string | URL, options?: ClientOptions);
  readonly state: 'disconnected' | 'connecting' | 'connected';
  /** Our id on this connection, new for each; '' without one, and where we poll. */
  readonly id: string;
  on<E extends keyof ClientEvents>(event: E, callback: (context: ClientEvents[E]) => void): Off;
  /** Begin; while it waits for the next attempt: try now. */
  connect(): void;
  /**
   * Resolves when it is connected, at once if it is. Rejects with code and reason when it is disconnected for good,
   * at once with `NOT_CONNECTED` before the first `connect()`.
   */
  ready(): Promise<void>;
  disconnect(): void;
  /**
   * Use another token of the same user from now on; a connection takes it over at once, and the promise rejects if the
   * server refuses it. '' forgets the one there is, so that `getToken` is asked when the next is needed.
   */
  setToken(token: string): Promise<void>;
  /**
   * Go another way from now on; null is the WebSocket. A connection is given up and made anew at once: subscriptions
   * recover, and commands that were not answered reject with `LOST`, as after any other cut.
   */
  setTransport(transport: Transport | null): void;
  /** The same object for the same channel; options count where it is not subscribing or subscribed already. */
  subscribe(channel: string, options?: SubscribeOptions): Subscription;
  /** Resolves when it is published; in a kept channel that means durable. */
  publish(channel: string, data: Json): Promise<void>;
  /**
   * Publishes once for each key, however often it is called (PROTOCOL 11.8); so what failed with `temporary` may be
   * repeated. Gives its position, or an empty object in a passing channel.
   */
  publishOnce(channel: string, data: Json, key: string): Promise<Position>;
  /**
   * Publishes without an answer, for what is outdated a moment later. False if it was dropped: not connected, or more
   * than 64 KB wait in the socket.
   */
  say(channel: string, data: Json): boolean;
  /** Calls a method of the server and gives what it returned. */
  rpc(method: string, data?: Json): Promise<Json>;
  history(channel: string, options?: HistoryOptions): Promise<History>;
  presence(channel: string): Promise<Record<string, ClientInfo>>;
  presenceStats(channel: string): Promise<{ numClients: number; numUsers: number }>;
}
