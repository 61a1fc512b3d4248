// Moves one client of centrifuge-js as the lines on standard input say, and tells on standard output what it says.
//
// In:  {"id", "order", ...arguments}   an order, answered by {"id", "result"} or {"id", "error": {"code", "message"}}
//      {"answer", "value"}             the answer to a question
// Out: {"event", "channel", "fields"}  an event of the client (channel "") or of a subscription
//      {"ask", "number", "channel"}    the SDK wants a token or a state
//
// The process ends when its input does.  Whatever nobody expected ends it with a trace and an exit code.
import readline from "node:readline";
import WebSocket from "ws";

const options = JSON.parse(process.argv[2]);
const binary = options.format === "protobuf";
const { Centrifuge } = await import(binary ? "centrifuge/build/protobuf" : "centrifuge");

const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");
const packed = (data) => (binary ? new TextEncoder().encode(JSON.stringify(data)) : data);
// An absent payload is undefined in JSON, and empty in Protobuf.
const unpacked = (data) => {
  if (data === undefined || data === null || (binary && data.length === 0)) return null;
  return binary ? JSON.parse(new TextDecoder().decode(data)) : data;
};

// --- questions ------------------------------------------------------------------
const questions = new Map();
function ask(what, channel) {
  return new Promise((resolve) => {
    const number = questions.size + 1;
    questions.set(number, resolve);
    say({ ask: what, number, channel });
  });
}

// --- what the SDK says, under the names of the protocol ----------------------------
const info = (info) =>
  info && {
    user: info.user,
    client: info.client,
    conn_info: unpacked(info.connInfo),
    chan_info: unpacked(info.chanInfo),
  };
const publication = (context) => ({
  data: unpacked(context.data),
  offset: context.offset ?? 0,
  info: info(context.info) ?? null,
  tags: context.tags ?? {},
});
const subscribed = (context) => ({
  recoverable: context.recoverable,
  positioned: context.positioned,
  was_recovering: context.wasRecovering,
  recovered: context.recovered,
  data: unpacked(context.data),
  ...context.streamPosition,
});
const change = (context) => ({ code: context.code ?? 0, reason: context.reason ?? "" });
const fault = (context) => ({ code: context.error.code, reason: context.error.message });
const FIELDS = {
  connecting: change,
  connected: (context) => ({ client: context.client }),
  disconnected: change,
  subscribing: change,
  subscribed,
  unsubscribed: change,
  publication,
  join: (context) => info(context.info),
  leave: (context) => info(context.info),
  error: fault,
};

function listen(emitter, own) {
  for (const [event, fields] of Object.entries(FIELDS)) {
    emitter.on(event, (context) => {
      // Only events of server-side subscriptions have a channel on the client object.
      const channel = own ?? context.channel ?? "";
      say({ event: !own && channel ? `server_${event}` : event, channel, fields: fields(context) });
    });
  }
}

// --- orders -----------------------------------------------------------------------
const { transport } = options;
const page = new URL(options.url.replace(/^ws/, "http"));
const endpoint = new URL(`/connection/${transport}`, page).href;
const client = new Centrifuge(transport === "websocket" ? options.url : [{ transport, endpoint }], {
  websocket: WebSocket,
  emulationEndpoint: new URL("/emulation", page).href,
  token: options.token,
  getToken: options.get_token ? () => ask("token", "") : null,
  minReconnectDelay: options.shortest_ms,
  maxReconnectDelay: options.longest_ms,
});
listen(client);

function subscribe({ channel, options: wishes }) {
  const subscription = client.newSubscription(channel, {
    minResubscribeDelay: options.shortest_ms,
    maxResubscribeDelay: options.longest_ms,
    ...(wishes.token && { token: wishes.token }),
    ...(wishes.get_token && { getToken: (context) => ask("token", context.channel) }),
    ...(wishes.get_state && { getState: () => ask("state", channel) }),
    ...(wishes.since && { since: { offset: wishes.since[0], epoch: wishes.since[1] } }),
    ...(wishes.join_leave && { joinLeave: true }),
    ...(wishes.positioned && { positioned: true }),
    ...(wishes.recoverable && { recoverable: true }),
    ...(wishes.delta && { delta: wishes.delta }),
    ...(wishes.tags_filter && { tagsFilter: wishes.tags_filter }),
  });
  listen(subscription, channel);
  subscription.subscribe();
}

const ORDERS = {
  connect: () => client.connect(),
  disconnect: () => client.disconnect(),
  subscribe,
  unsubscribe({ channel }) {
    const subscription = client.getSubscription(channel);
    subscription.unsubscribe();
    client.removeSubscription(subscription);
  },
  publish: ({ channel, data }) => client.publish(channel, packed(data)),
  async history({ channel, limit, since, reverse }) {
    const position = since && { offset: since[0], epoch: since[1] };
    const page = await client.history(channel, { limit, reverse, ...(position && { since: position }) });
    return { publications: page.publications.map(publication), offset: page.offset, epoch: page.epoch };
  },
  async presence({ channel }) {
    const { clients } = await client.presence(channel);
    return Object.fromEntries(Object.entries(clients).map(([id, member]) => [id, info(member)]));
  },
  async presence_stats({ channel }) {
    const stats = await client.presenceStats(channel);
    return { num_clients: stats.numClients, num_users: stats.numUsers };
  },
  rpc: async ({ method, data }) => ({ data: unpacked((await client.rpc(method, packed(data))).data) }),
  async together({ orders }) {
    client.startBatching();
    const results = orders.map((one) => ORDERS[one.order](one));
    client.stopBatching();
    return { results: await Promise.all(results) };
  },
};

for await (const text of readline.createInterface({ input: process.stdin })) {
  const line = JSON.parse(text);
  if ("answer" in line) {
    questions.get(line.answer)(line.value);
    continue;
  }
  // Orders are begun in turn, but not waited for: the next one may be an answer that this one needs.
  Promise.resolve()
    .then(() => ORDERS[line.order](line))
    .then(
      (result) => say({ id: line.id, result: result ?? {} }),
      (error) => {
        if (error.code === undefined) throw error;
        say({ id: line.id, error: { code: error.code, message: error.message } });
      },
    );
}
client.disconnect();
