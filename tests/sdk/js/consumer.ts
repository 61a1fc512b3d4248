// Uses everything that static/client.d.ts declares, as its documentation says; only compiled, never run.  A line below a
// remark that an error is expected has to be refused.

import { Client, ClientError, CODES, Subscription } from '../../../static/client.js';
import type {
  ClientEvents, ClientInfo, ClientOptions, History, HistoryOptions, Json, Off, Position, Publication, Subscribed,
  Socket, SubscribeOptions, SubscriptionEvents, Transport,
} from '../../../static/client.js';
import { Polling } from '../../../static/transport-polling.js';
import { Sse } from '../../../static/transport-sse.js';

const options: ClientOptions = { token: '', getToken: async () => null, name: 'app', data: { any: ['JSON', 1, null] } };
const client = new Client(new URL('wss://example.com/connection/websocket'), options);
new Client();
new Client('/connection/websocket', { getToken: () => 'token' });
const polling = new Polling();
polling.turnTo('chat:a');
const own: Transport = { open: (url) => new WebSocket(url) };
const socket: Socket = new Sse().open(new URL('wss://example.com'));
new Client('', { transport: new Sse({ stream: '/connection/sse', emulation: '/emulation' }) });
client.setTransport(polling);
client.setTransport(own);
client.setTransport(null);
console.log(socket.readyState, socket.bufferedAmount > 0, polling.open(new URL('ws://example.com')).close());
// @ts-expect-error: a name is no transport
client.setTransport('sse');
// @ts-expect-error: what is opened has to behave like a WebSocket
client.setTransport({ open: () => ({ send() {} }) });
// @ts-expect-error: a number is no address
new Client(1);
// @ts-expect-error: there is no such option
new Client('', { tokens: '' });

const state: 'disconnected' | 'connecting' | 'connected' = client.state;
const id: string = client.id;
// @ts-expect-error: it is the client's to write
client.state = 'connected';

const offs: Off[] = [
  client.on('connecting', ({ code, reason, delayMs }) => code === CODES.CALLED && reason.length < delayMs),
  client.on('connected', ({ client, data, time }) => [client.length, data, time?.toFixed()]),
  client.on('disconnected', ({ code, reason }) => code - reason.length),
  client.on('subscribed', ({ channel, recovered, wasRecovering, position, data }) =>
    [channel.length, recovered === wasRecovering, position?.offset, data]),
  client.on('publication', ({ channel, data, offset, info, tags, time }) =>
    [channel.length, data, offset?.toFixed(), info?.user, tags?.['key'], time?.toFixed()]),
  client.on('join', ({ channel, info }) => channel + info.client),
  client.on('leave', ({ channel, info }) => channel + info.client),
  client.on('unsubscribed', ({ channel, code, reason }) => channel + code + reason),
];
for (const off of offs) off();
// @ts-expect-error: there is no such event
client.on('message', () => {});
// @ts-expect-error: delayMs may not be read of this one
client.on('connected', ({ delayMs }) => delayMs);

const names: (keyof ClientEvents)[] = [
  'connecting', 'connected', 'disconnected', 'subscribed', 'publication', 'join', 'leave', 'unsubscribed',
];
const subscriptionNames: (keyof SubscriptionEvents)[] = [
  'subscribed', 'publication', 'join', 'leave', 'subscribing', 'unsubscribed',
];

async function use(): Promise<void> {
  client.connect();
  await client.ready();
  await client.setToken('');
  const nothing: void = await client.publish('chat:a', { text: 'hello' });
  const once: Position = await client.publishOnce('chat:a', 'hello', 'key');
  const said: boolean = client.say('live:a', null);
  const answer: Json = await client.rpc('method');
  await client.rpc('method', { with: 'data' });
  const asked: HistoryOptions = { limit: 1, since: once, reverse: true };
  const page: History = await client.history('chat:a', asked);
  const [first]: Publication[] = page.publications;
  const top: Position = page;
  const here: Record<string, ClientInfo> = await client.presence('chat:a');
  const connInfo: Json = Object.values(here)[0]?.connInfo;
  const chanInfo: Json = first?.info?.chanInfo;
  const { numClients, numUsers } = await client.presenceStats('chat:a');
  console.log(nothing, said, answer, top, connInfo, chanInfo, numClients - numUsers, state, id, names, subscriptionNames);
  // @ts-expect-error: a key is needed
  await client.publishOnce('chat:a', 'hello');

  const wanted: SubscribeOptions = {
    token: '', getToken: ({ channel }) => channel, joinLeave: true, recoverable: true, since: null,
  };
  const chat: Subscription = client.subscribe('chat:a', wanted);
  client.subscribe('chat:a');
  // @ts-expect-error: the client makes them
  new Subscription('chat:a');
  chat.on('subscribed', (context: Subscribed) => context.recovered);
  chat.on('subscribing', ({ code, reason }) => code + reason);
  chat.on('unsubscribed', ({ code, reason }) => code + reason);
  chat.on('publication', ({ data, offset }: Publication) => [data, offset]);
  chat.on('join', ({ info }) => info.user);
  chat.on('leave', ({ info }) => info.user)();
  await chat.ready();
  await chat.publish(1);
  const since: Position | null = chat.position;
  await chat.history({ since });
  await chat.history();
  console.log(chat.channel.length, chat.state === 'subscribed', await chat.presence(), (await chat.presenceStats()).numUsers);
  chat.unsubscribe();
  client.disconnect();
}

use().catch((error: unknown) => {
  if (error instanceof ClientError && error.temporary && error.code === CODES.TIMED_OUT) console.log(error.message);
  // @ts-expect-error: every code of this side has a name
  console.log(CODES.NOT_THERE, new ClientError(1, 'why'), new ClientError(1, 'why', true));
});
