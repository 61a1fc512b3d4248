/* A crowd of WebSocket clients in one thread, cheap enough not to be what is measured.
 *
 *     load port=8000 path=/ws/@C clients=1000 channels=1 flight=1 publish=@P seconds=3 pid=1234
 *
 * Arguments are key=value; `wishes` below has all of them with their meaning.  The result is one JSON object on
 * stdout.  load.py is the same in Python, for machines without a compiler.
 *
 * Every client does the whole handshake of RFC 6455 and says and hears a few texts until it is subscribed.  A
 * publication carries a mark in its payload, "~", 16 hexadecimal digits of the time of sending in ns and 8 of its
 * number in the channel, which every kind of envelope leaves as it is: so each delivery is counted, timed, and
 * compared with the number that this client must see next, wherever it stands in whatever a server makes of a frame.
 * What is lost or repeated (or overtaken, which is first the one, then the other) is reported, and so is every
 * connection that ends.
 *
 * The server's CPU time is read from /proc at both ends of each window, in the same thread, between two system calls.
 *
 * Windows: one, or two with slow=1 (in the second one, one client has stopped reading) and with returners=N (the
 * second one begins when N clients come to catch up, and ends when the last of them has).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    SCRIPT_STEPS = 12,
    PIDS = 16,
    MARK = 1 + 16 + 8,
    READ_BYTES = 1 << 20,
    FRAME_BYTES = 1 << 16,
    ASKED = 1024,  /* acknowledgements that one publisher may wait for */
    FIRST_ID = 10, /* command ids below are the scripts' own */
    BUCKETS = 1 << 14,
    SLOW_BYTES = 1 << 16, /* what the kernel keeps for the slow client; it would keep megabytes by itself */
    PRELUDE = 50,         /* idle: clients that come first, so that nobody is charged for what happens once */
};
static const uint64_t SECOND = 1000000000ull;
static const double CONNECT_PATIENCE_S = 30, CATCH_UP_S = 120;

/* The RFC's own example (section 1.3); a server that answers it rightly answers every key rightly, or cheats well. */
static const char KEY[] = "dGhlIHNhbXBsZSBub25jZQ==", ACCEPT[] = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/* --- what is wanted ----------------------------------------------------------------------------------------------- */
struct step {
    bool hear;
    const char *text;
};
struct script {
    int length;
    struct step step[SCRIPT_STEPS];
};

static struct script scripts[3]; /* by role */
static struct {
    long port, publish_port;    /* with a port of their own, publishers are connections beside the subscribers */
    const char *path, *publish; /* @C is the channel, @P the payload, @N the number of the command */
    const char *channel;        /* what the names of channels begin with */
    long clients, channels;
    long flight;      /* publications on their way in each channel; 0: `rate` a second in all */
    long rate, bytes; /* of a payload */
    double warm, seconds;
    double patience;                /* seconds without anything after which what is on its way counts as lost */
    long connecting;                /* handshakes at once */
    const char *ack, *refusal;      /* what a frame holds that acknowledges or refuses a publication; "" for nothing */
    const char *heartbeat, *answer; /* a message that is to be answered, and with what; "" for nothing */
    long idle, fill, returners, slow;
    long spin;     /* look for what has come again and again, and never sleep: for a core of our own */
    long announce; /* say "begin" on stderr when the first window does */
    long core;     /* of the server, to see who else is on it; -1 for unknown */
} wanted = {.path = "/",
    .publish = "@P",
    .channel = "c",
    .clients = 1,
    .channels = 1,
    .flight = 1,
    .bytes = 128,
    .seconds = 3,
    .patience = 3,
    .connecting = 64,
    .ack = "",
    .refusal = "",
    .heartbeat = "",
    .answer = "",
    .core = -1};

static const struct {
    const char *key;
    long *number;
    double *real;
    const char **text;
} wishes[] = {
    {"port", &wanted.port},
    {"publish_port", &wanted.publish_port},
    {"clients", &wanted.clients},
    {"channels", &wanted.channels},
    {"flight", &wanted.flight},
    {"rate", &wanted.rate},
    {"bytes", &wanted.bytes},
    {"connecting", &wanted.connecting},
    {"idle", &wanted.idle},
    {"fill", &wanted.fill},
    {"returners", &wanted.returners},
    {"slow", &wanted.slow},
    {"spin", &wanted.spin},
    {"core", &wanted.core},
    {"announce", &wanted.announce},
    {"warm", .real = &wanted.warm},
    {"seconds", .real = &wanted.seconds},
    {"patience", .real = &wanted.patience},
    {"path", .text = &wanted.path},
    {"publish", .text = &wanted.publish},
    {"channel", .text = &wanted.channel},
    {"ack", .text = &wanted.ack},
    {"refusal", .text = &wanted.refusal},
    {"heartbeat", .text = &wanted.heartbeat},
    {"answer", .text = &wanted.answer},
};

enum role { SUBSCRIBER, PUBLISHER, RETURNER };
enum state { WAITING, CONNECTING, UPGRADING, TALKING, READY, GONE };

struct client {
    int fd;
    enum state state;
    enum role role;
    struct channel *channel;
    int step;
    bool deaf; /* has stopped reading; nobody waits for it any more */
    uint16_t close_code;
    uint32_t next; /* the number it must see next */
    uint64_t heard;
    uint32_t said;   /* publications of this client */
    uint64_t *asked; /* when the last ASKED of them left */
    uint8_t *kept;   /* the beginning of a frame whose end has not come */
    size_t kept_bytes, kept_room;
};

struct channel {
    char name[64];
    struct client *publisher;
    uint32_t subscribers, published;
    int64_t outstanding; /* deliveries that are still to come */
};

struct window {
    uint64_t began, ended;
    uint64_t published, deliveries, acks, reads;
    double cpu_s[PIDS], own_cpu_s, core_busy_s, core_stolen_s;
    uint32_t delivery_ns[BUCKETS], ack_ns[BUCKETS];
};

static struct client *clients;
static struct channel *channels;
static long everyone, ready, under_way, gone, upgrades_refused;
static uint64_t lost, repeated, forgiven, broken, refused, acks_missing;
static uint64_t published, deliveries, acks, reads;
static struct window connecting, windows[2], *window;
static int loop_fd;
static long pids[PIDS], pid_count;
static uint8_t inbox[READ_BYTES + FRAME_BYTES];

/* --- small things ------------------------------------------------------------------------------------------------- */
static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(2);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

/* A bucket is the exponent and the first six bits of the fraction of the time as a float: 1.6 % wide. */
static void note(uint32_t *buckets, uint64_t ns)
{
    union {
        float value;
        uint32_t bits;
    } as = {.value = (float)ns};
    buckets[as.bits >> 17]++;
}

static double quantile_ms(const uint32_t *buckets, double share)
{
    uint64_t all = 0, passed = 0;
    for (int at = 0; at < BUCKETS; at++) all += buckets[at];
    if (!all) return -1;
    uint64_t rank = (uint64_t)(share * (double)(all - 1));
    for (uint32_t at = 0; at < BUCKETS; at++) {
        passed += buckets[at];
        if (passed > rank) {
            union {
                uint32_t bits;
                float value;
            } as = {.bits = (at << 17) | (1 << 16)};
            return as.value / 1e6;
        }
    }
    return -1;
}

static size_t expand(
    char *out, size_t room, const char *template, const char *channel, const char *payload, uint32_t id)
{
    char number[16];
    snprintf(number, sizeof number, "%u", id);
    size_t length = 0;
    for (const char *at = template; *at; at++) {
        const char *value = at[0] != '@'   ? NULL
                            : at[1] == 'C' ? channel
                            : at[1] == 'P' ? payload
                            : at[1] == 'N' ? number
                                           : NULL;
        size_t size = value ? strlen(value) : 1;
        if (length + size >= room) fail("%zu bytes are too few for %s", room, template);
        memcpy(out + length, value ? value : at, size);
        length += size;
        at += value != NULL;
    }
    out[length] = 0;
    return length;
}

/* --- the server seen from outside --------------------------------------------------------------------------------- */
static double cpu_of(long pid)
{
    char path[48], text[1024];
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    size_t size = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[size] = 0;
    unsigned long user = 0, system = 0;
    const char *after_name = strrchr(text, ')');
    if (after_name) sscanf(after_name + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system);
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

static long memory_kb(void)
{
    long sum = 0;
    for (int at = 0; at < pid_count; at++) {
        char path[48];
        long pages = 0;
        snprintf(path, sizeof path, "/proc/%ld/statm", pids[at]);
        FILE *file = fopen(path, "r");
        if (!file) continue;
        if (fscanf(file, "%*d %ld", &pages) != 1) pages = 0;
        fclose(file);
        sum += pages * (sysconf(_SC_PAGESIZE) / 1024);
    }
    return sum;
}

static double own_cpu(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

/* How long the server's core has worked for anybody, and how long it was not there at all. */
static void core_of_server(double *busy_s, double *stolen_s)
{
    char name[32], line[512];
    *busy_s = *stolen_s = 0;
    if (wanted.core < 0) return;
    snprintf(name, sizeof name, "cpu%ld ", wanted.core);
    FILE *file = fopen("/proc/stat", "r");
    if (!file) return;
    while (fgets(line, sizeof line, file)) {
        unsigned long user, nice, system, idle, waiting, interrupts, soft, stolen;
        if (strncmp(line, name, strlen(name))) continue;
        if (sscanf(line, "%*s %lu %lu %lu %lu %lu %lu %lu %lu", &user, &nice, &system, &idle, &waiting, &interrupts,
                &soft, &stolen) == 8) {
            *busy_s = (double)(user + nice + system + interrupts + soft) / (double)sysconf(_SC_CLK_TCK);
            *stolen_s = (double)stolen / (double)sysconf(_SC_CLK_TCK);
        }
    }
    fclose(file);
}

static void look(struct window *at, int sign)
{
    double busy_s, stolen_s;
    core_of_server(&busy_s, &stolen_s);
    for (int pid = 0; pid < pid_count; pid++) at->cpu_s[pid] += sign * cpu_of(pids[pid]);
    at->own_cpu_s += sign * own_cpu();
    at->core_busy_s += sign * busy_s;
    at->core_stolen_s += sign * stolen_s;
    at->published += (uint64_t)sign * published;
    at->deliveries += (uint64_t)sign * deliveries;
    at->acks += (uint64_t)sign * acks;
    at->reads += (uint64_t)sign * reads;
}

static void begin_window(struct window *at)
{
    at->began = now_ns();
    look(at, -1);
    window = at;
}

static void end_window(void)
{
    look(window, 1);
    window->ended = now_ns();
    window = NULL;
}

/* --- one client --------------------------------------------------------------------------------------------------- */
static void watch(struct client *client, uint32_t events, int operation)
{
    struct epoll_event event = {.events = events, .data.ptr = client};
    if (epoll_ctl(loop_fd, operation, client->fd, &event)) fail("epoll_ctl: %s", strerror(errno));
}

static void end(struct client *client)
{
    if (client->state == GONE) return;
    if (client->state == READY) ready--;
    else under_way--;
    if (!client->deaf) gone++;
    client->state = GONE;
    close(client->fd);
    client->fd = -1;
}

static void put(struct client *client, const void *data, size_t size)
{
    const uint8_t *at = data;
    while (size && client->state != GONE) {
        ssize_t sent = send(client->fd, at, size, MSG_NOSIGNAL);
        if (sent >= 0) {
            at += sent;
            size -= (size_t)sent;
        } else if (errno == EAGAIN) {
            struct pollfd full = {client->fd, POLLOUT, 0};
            if (poll(&full, 1, (int)(wanted.patience * 1000)) < 1)
                fail("the server has read nothing for %.0f s", wanted.patience);
        } else if (errno != EINTR) {
            end(client);
        }
    }
}

/* A whole masked frame; returns its size. */
static size_t frame(uint8_t *out, uint8_t opcode, const char *payload, size_t size)
{
    static const uint8_t mask[4] = {0x37, 0xfa, 0x21, 0x3d};
    size_t at = 2;
    out[0] = 0x80 | opcode;
    if (size < 126) {
        out[1] = 0x80 | (uint8_t)size;
    } else {
        out[1] = 0x80 | 126;
        out[2] = (uint8_t)(size >> 8);
        out[3] = (uint8_t)size;
        at = 4;
    }
    memcpy(out + at, mask, 4);
    at += 4;
    for (size_t byte = 0; byte < size; byte++) out[at + byte] = (uint8_t)payload[byte] ^ mask[byte & 3];
    return at + size;
}

static void put_frame(struct client *client, uint8_t opcode, const char *payload, size_t size)
{
    uint8_t out[FRAME_BYTES];
    if (size + 8 > sizeof out) fail("a text of %zu bytes is too long", size);
    put(client, out, frame(out, opcode, payload, size));
}

static void go_on(struct client *client)
{
    struct script *script = &scripts[client->role];
    while (client->step < script->length && !script->step[client->step].hear) {
        char text[4096];
        size_t size = expand(text, sizeof text, script->step[client->step++].text, client->channel->name, "", 0);
        put_frame(client, 1, text, size);
    }
    if (client->step < script->length || client->state != TALKING) return;
    client->state = READY;
    ready++;
    under_way--;
    if (client->role == SUBSCRIBER) {
        client->channel->subscribers++;
        client->next = client->channel->published;
    }
}

static void arrange(struct client *client)
{
    int on = 1;
    struct linger abort = {1, 0}; /* thousands of sockets in TIME_WAIT would be in the way of the next run */
    bool elsewhere = client->role == PUBLISHER && wanted.publish_port;
    struct sockaddr_in address = {
        .sin_family = AF_INET,
        .sin_port = htons((uint16_t)(elsewhere ? wanted.publish_port : wanted.port)),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (client->fd < 0) fail("socket: %s", strerror(errno));
    setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(client->fd, SOL_SOCKET, SO_LINGER, &abort, sizeof abort);
    int little = SLOW_BYTES;
    if (wanted.slow && client == &clients[everyone - wanted.returners - 1])
        setsockopt(client->fd, SOL_SOCKET, SO_RCVBUF, &little, sizeof little);
    if (connect(client->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)
        fail("connect: %s", strerror(errno));
    client->state = CONNECTING;
    under_way++;
    watch(client, EPOLLOUT, EPOLL_CTL_ADD);
}

static void upgrade(struct client *client)
{
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(client->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) fail("connect: %s", strerror(error));
    char path[512], request[1024];
    expand(path, sizeof path, wanted.path, client->channel->name, "", 0);
    int length = snprintf(request, sizeof request,
        "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%ld\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n\r\n",
        path, wanted.port, KEY);
    client->state = UPGRADING;
    watch(client, EPOLLIN, EPOLL_CTL_MOD);
    put(client, request, (size_t)length);
}

/* Returns the bytes of a proper answer's head, 0 if its end has not come. */
static size_t take_answer(struct client *client, const uint8_t *data, size_t size)
{
    const uint8_t *tail = memmem(data, size, "\r\n\r\n", 4);
    if (!tail) return 0;
    size_t head = (size_t)(tail - data) + 4;
    if (size < 12 || memcmp(data + 8, " 101", 4) || !memmem(data, head, ACCEPT, sizeof ACCEPT - 1)) {
        if (!upgrades_refused++)
            fprintf(stderr, "load: the handshake was answered with\n%.*s\n", (int)head, (const char *)data);
        end(client);
        return head;
    }
    client->state = TALKING;
    go_on(client);
    return head;
}

/* --- what comes --------------------------------------------------------------------------------------------------- */
static int hex(uint8_t digit) { return digit <= '9' ? digit - '0' : (digit | 32) - 'a' + 10; }

static void deliver(struct client *client, const uint8_t *mark, uint64_t now)
{
    uint64_t sent_at = 0;
    uint32_t number = 0;
    for (int at = 1; at < 17; at++) sent_at = sent_at << 4 | (uint64_t)hex(mark[at]);
    for (int at = 17; at < MARK; at++) number = number << 4 | (uint32_t)hex(mark[at]);
    client->heard++;
    if (client->deaf) return;
    if (number < client->next) {
        repeated++;
        return;
    }
    uint32_t skipped = number - client->next;
    lost += skipped;
    if (client->role == SUBSCRIBER) client->channel->outstanding -= skipped;
    client->next = number + 1;
    if (client->role != SUBSCRIBER) return;
    client->channel->outstanding--;
    deliveries++;
    if (window) note(window->delivery_ns, now - sent_at);
}

static void count_acks(struct client *client, const uint8_t *data, size_t size, uint64_t now)
{
    const uint8_t *at = data, *tail = data + size;
    size_t length = strlen(wanted.ack);
    while ((at = memmem(at, (size_t)(tail - at), wanted.ack, length))) {
        /* The id stands before, in the same message: {"id":12,"publish":{}} */
        const uint8_t *id = memrchr(data, ':', (size_t)(at - data));
        uint32_t number = id ? (uint32_t)strtoul((const char *)id + 1, NULL, 10) : 0;
        acks++;
        acks_missing--;
        if (window && client->asked) note(window->ack_ns, now - client->asked[number % ASKED]);
        at += length;
    }
    if (*wanted.refusal && memmem(data, size, wanted.refusal, strlen(wanted.refusal)) && !refused++)
        fprintf(stderr, "load: a publication was refused: %.*s\n", (int)size, (const char *)data);
}

static void take_frame(struct client *client, uint8_t first, const uint8_t *data, size_t size, uint64_t now)
{
    switch (first) {
    case 0x81: break;
    case 0x88:
        client->close_code = size < 2 ? 1005 : (uint16_t)(data[0] << 8 | data[1]);
        if (!client->deaf && !gone)
            fprintf(stderr, "load: a connection was closed with %d %.*s\n", client->close_code,
                size > 2 ? (int)size - 2 : 0, (const char *)data + 2);
        end(client);
        return;
    case 0x89: put_frame(client, 10, (const char *)data, size); return;
    case 0x8a: return;
    default:
        broken++; /* no extension was asked for, and none of the servers has a reason to fragment or to send binary */
        return;
    }
    if (*wanted.heartbeat && size == strlen(wanted.heartbeat) && !memcmp(data, wanted.heartbeat, size)) {
        put_frame(client, 1, wanted.answer, strlen(wanted.answer));
        return;
    }
    const struct script *script = &scripts[client->role];
    if (client->state == TALKING && client->step < script->length) {
        const char *text = script->step[client->step].text;
        if (memmem(data, size, text, strlen(text))) {
            client->step++;
            go_on(client);
        }
    }
    if (*wanted.ack && client->asked) count_acks(client, data, size, now);
    const uint8_t *at = data, *tail = data + size;
    while (tail - at >= MARK && (at = memchr(at, '~', (size_t)(tail - at - MARK + 1)))) {
        deliver(client, at, now);
        at += MARK;
    }
}

/* Returns how many bytes were whole frames. */
static size_t take_frames(struct client *client, const uint8_t *data, size_t size, uint64_t now)
{
    size_t at = 0;
    while (size - at >= 2 && client->state != GONE) {
        size_t head = 2, length = data[at + 1];
        if (length & 0x80) {
            broken++; /* a server must not mask (RFC 6455 5.1) */
            end(client);
            break;
        }
        if (length >= 126) {
            head = length == 126 ? 4 : 10;
            if (size - at < head) break;
            length = 0;
            for (size_t byte = 2; byte < head; byte++) length = length << 8 | data[at + byte];
        }
        if (size - at - head < length) break;
        take_frame(client, data[at], data + at + head, length, now);
        at += head + length;
    }
    return at;
}

static void read_from(struct client *client)
{
    uint8_t *data = inbox;
    size_t size = client->kept_bytes, taken = 0;
    if (size) memcpy(data, client->kept, size);
    ssize_t came = recv(client->fd, data + size, sizeof inbox - size, 0);
    if (came <= 0) {
        if (came == 0 || (errno != EAGAIN && errno != EINTR)) end(client);
        return;
    }
    uint64_t now = now_ns();
    reads++;
    size += (size_t)came;
    if (client->state == UPGRADING) taken = take_answer(client, data, size);
    if (client->state != UPGRADING && client->state != GONE)
        taken += take_frames(client, data + taken, size - taken, now);
    size_t left = client->state == GONE ? 0 : size - taken;
    if (left > client->kept_room) {
        client->kept_room = left * 2;
        client->kept = realloc(client->kept, client->kept_room);
        if (!client->kept || client->kept_room > sizeof inbox) fail("a frame is too long: %zu bytes", left);
    }
    if (left) memcpy(client->kept, data + taken, left);
    client->kept_bytes = left;
}

static void pump(int patience_ms)
{
    static struct epoll_event events[1024];
    int count = epoll_wait(loop_fd, events, 1024, wanted.spin ? 0 : patience_ms);
    for (int at = 0; at < count; at++) {
        struct client *client = events[at].data.ptr;
        if (client->state == CONNECTING) upgrade(client);
        else if (client->state != GONE) read_from(client);
    }
}

/* --- the crowd ---------------------------------------------------------------------------------------------------- */
static void connect_some(long begin, long end_at)
{
    long next = begin, target = ready + gone + (end_at - begin);
    uint64_t moved_at = now_ns();
    for (long before = -1; ready + gone < target;) {
        while (next < end_at && under_way < wanted.connecting) arrange(&clients[next++]);
        pump(10);
        if (ready + gone != before) {
            before = ready + gone;
            moved_at = now_ns();
        } else if ((double)(now_ns() - moved_at) / 1e9 > CONNECT_PATIENCE_S) {
            fail("%ld of %ld clients are connected and subscribed, and then nothing for %.0f s", ready, everyone,
                CONNECT_PATIENCE_S);
        }
    }
    if (gone) fail("%ld of %ld connections have ended at once", gone, everyone);
}

static void publish(struct channel *channel, long count)
{
    static uint8_t out[FRAME_BYTES * 4];
    static char payload[FRAME_BYTES / 2], text[FRAME_BYTES];
    struct client *client = channel->publisher;
    uint64_t now = now_ns();
    size_t size = 0;
    for (; count > 0; count--) {
        int length = snprintf(payload, sizeof payload, "{\"mark\":\"~%016llx%08x\",\"pad\":\"", (unsigned long long)now,
            channel->published);
        while (length < wanted.bytes - 2) payload[length++] = '.';
        memcpy(payload + length, "\"}", 3);
        uint32_t id = FIRST_ID + client->said++;
        size_t whole = expand(text, sizeof text, wanted.publish, channel->name, payload, id);
        if (size + whole + 8 > sizeof out) {
            put(client, out, size);
            size = 0;
        }
        size += frame(out + size, 1, text, whole);
        if (client->asked) client->asked[id % ASKED] = now, acks_missing++;
        channel->published++;
        channel->outstanding += channel->subscribers;
        published++;
    }
    put(client, out, size);
}

static void keep_in_flight(long flight)
{
    for (long at = 0; at < wanted.channels; at++) {
        struct channel *channel = &channels[at];
        long under =
            channel->subscribers ? (channel->outstanding + channel->subscribers - 1) / channel->subscribers : 0;
        if (under < flight) publish(channel, flight - under);
    }
}

static bool anything_outstanding(void)
{
    for (long at = 0; at < wanted.channels; at++)
        if (channels[at].outstanding > 0) return true;
    return *wanted.ack && acks_missing > 0 && !gone;
}

/* What has not come by now never will: count it, so that the next publication does not wait for it. */
static void forgive(void)
{
    for (long at = 0; at < wanted.channels; at++)
        if (channels[at].outstanding > 0) forgiven += (uint64_t)channels[at].outstanding, channels[at].outstanding = 0;
}

static bool caught_up(void)
{
    for (long at = 0; at < everyone; at++)
        if (clients[at].role == RETURNER && clients[at].heard < (uint64_t)wanted.fill) return false;
    return true;
}

/* A window in which nothing has come says nothing: wait for the first delivery, though the time is up. */
static bool empty(void)
{
    if (!window || wanted.idle) return false;
    return window->deliveries + deliveries == 0 || (*wanted.ack && window->acks + acks == 0);
}

/* Publish and listen for so long, or until somebody is done. */
static void work(double seconds, bool (*done)(void))
{
    uint64_t start = now_ns(), until = start + (uint64_t)(seconds * 1e9), due = start, moved_at = start,
             before = deliveries;
    uint64_t late = until + (uint64_t)(CONNECT_PATIENCE_S * 1e9);
    static long turn;
    long next_returner = everyone - wanted.returners;
    for (uint64_t now = start; (now < until || (empty() && now < late)) && !(done && done()); now = now_ns()) {
        int patience_ms = 10;
        if (done)
            while (next_returner < everyone && under_way < wanted.connecting) arrange(&clients[next_returner++]);
        if (wanted.idle) {
            patience_ms = 50;
        } else if (wanted.flight) {
            keep_in_flight(wanted.flight);
            if (before != deliveries) before = deliveries, moved_at = now;
            else if ((double)(now - moved_at) / 1e9 > wanted.patience / 2) forgive(), moved_at = now;
        } else {
            for (; due <= now; due += SECOND / (uint64_t)wanted.rate) publish(&channels[turn++ % wanted.channels], 1);
            patience_ms = (int)((due - now) / 1000000);
        }
        pump(patience_ms);
    }
}

static void drain(void)
{
    uint64_t moved_at = now_ns(), before = deliveries + acks;
    while (anything_outstanding() && (double)(now_ns() - moved_at) / 1e9 < wanted.patience) {
        pump(10);
        if (before != deliveries + acks) before = deliveries + acks, moved_at = now_ns();
    }
    forgive();
}

static void fill(void)
{
    struct channel *channel = &channels[0];
    struct client *client = channel->publisher;
    while ((long)channel->published < wanted.fill) {
        long under = (long)channel->outstanding, left = wanted.fill - (long)channel->published;
        if (under < 50) publish(channel, left < 50 - under ? left : 50 - under);
        pump(10);
        if (client->state != READY) fail("the publisher was disconnected while it filled the channel");
    }
    drain();
    if (forgiven) fail("%llu publications were lost while a channel was filled", (unsigned long long)forgiven);
}

static void stop_reading(struct client *client)
{
    client->deaf = true;
    epoll_ctl(loop_fd, EPOLL_CTL_DEL, client->fd, NULL);
    client->channel->subscribers--;
    client->channel->outstanding -= client->channel->published - client->next;
}

/* Read what the slow one was sent, up to the server's goodbye if there was one. */
static void read_the_rest(struct client *client)
{
    struct pollfd left = {client->fd, POLLIN, 0};
    while (client->state != GONE && (left.fd = client->fd, poll(&left, 1, 500)) > 0) read_from(client);
}

/* --- what came of it ---------------------------------------------------------------------------------------------- */
static void print_window(const struct window *at)
{
    double cpu_s = 0;
    for (int pid = 0; pid < pid_count; pid++) cpu_s += at->cpu_s[pid];
    double other_s = at->core_busy_s - cpu_s;
    printf("{\"wall_s\":%.4f,\"published\":%llu,\"deliveries\":%llu,\"acks\":%llu,\"reads\":%llu,\"cpu_s\":%.3f,\"load_"
           "cpu_s\":%.3f,"
           "\"other_s\":%.3f,\"stolen_s\":%.3f,\"p50_ms\":%.4f,\"p99_ms\":%.4f,\"max_ms\":%.4f,\"ack_p50_ms\":%.4f,"
           "\"ack_p99_ms\":%.4f,\"cpu_by\":[",
        (double)(at->ended - at->began) / 1e9, (unsigned long long)at->published, (unsigned long long)at->deliveries,
        (unsigned long long)at->acks, (unsigned long long)at->reads, cpu_s, at->own_cpu_s, other_s > 0 ? other_s : 0,
        at->core_stolen_s, quantile_ms(at->delivery_ns, .5), quantile_ms(at->delivery_ns, .99),
        quantile_ms(at->delivery_ns, 1), quantile_ms(at->ack_ns, .5), quantile_ms(at->ack_ns, .99));
    for (int pid = 0; pid < pid_count; pid++) printf("%s%.3f", pid ? "," : "", at->cpu_s[pid]);
    printf("]}");
}

static void read_arguments(int count, char **arguments)
{
    static const char *const roles[] = {"", "publisher_", "returner_"};
    for (int at = 1; at < count; at++) {
        char *key = arguments[at], *value = strchr(key, '=');
        if (!value) fail("expected key=value, got %s", key);
        *value++ = 0;
        bool known = false;
        for (int role = SUBSCRIBER; role <= RETURNER; role++) {
            size_t length = strlen(roles[role]);
            struct script *script = &scripts[role];
            if (strncmp(key, roles[role], length) || (strcmp(key + length, "say") && strcmp(key + length, "hear")))
                continue;
            if (script->length == SCRIPT_STEPS) fail("more than %d steps", SCRIPT_STEPS);
            script->step[script->length++] = (struct step){key[length] == 'h', value};
            known = true;
        }
        if (!strcmp(key, "pid")) {
            if (pid_count == PIDS) fail("more than %d processes", PIDS);
            pids[pid_count++] = atol(value);
            known = true;
        }
        for (size_t wish = 0; wish < sizeof wishes / sizeof *wishes; wish++) {
            if (strcmp(key, wishes[wish].key)) continue;
            if (wishes[wish].number) *wishes[wish].number = atol(value);
            if (wishes[wish].real) *wishes[wish].real = atof(value);
            if (wishes[wish].text) *wishes[wish].text = value;
            known = true;
        }
        if (!known) fail("unknown: %s", key);
    }
    if (!wanted.flight && !wanted.rate && !wanted.idle) fail("expected flight, rate or idle");
    if (wanted.bytes > FRAME_BYTES / 4 || wanted.flight > ASKED) fail("bytes or flight are out of bounds");
}

static void gather(void)
{
    bool apart = wanted.publish_port != 0;
    everyone = wanted.clients + (apart ? wanted.channels : 0) + wanted.returners;
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_cur < (rlim_t)everyone + 16)
        fail("%ld clients need more open files than %lu", everyone, (unsigned long)files.rlim_cur);
    clients = calloc((size_t)everyone, sizeof *clients);
    channels = calloc((size_t)wanted.channels, sizeof *channels);
    if (!clients || !channels) fail("out of memory");
    for (long at = 0; at < wanted.channels; at++)
        snprintf(channels[at].name, sizeof channels[at].name, "%s%ld", wanted.channel, at);
    for (long at = 0; at < everyone; at++) {
        struct client *client = &clients[at];
        long publishers = apart ? wanted.channels : 0;
        client->fd = -1;
        client->role = at < wanted.clients ? SUBSCRIBER : at < wanted.clients + publishers ? PUBLISHER : RETURNER;
        client->channel = &channels[(client->role == PUBLISHER ? at - wanted.clients : at) % wanted.channels];
        if (client->role == RETURNER) client->channel = &channels[0];
        if (client->role == (apart ? PUBLISHER : SUBSCRIBER) && !client->channel->publisher) {
            client->channel->publisher = client;
            if (*wanted.ack) client->asked = calloc(ASKED, sizeof *client->asked);
        }
    }
}

int main(int count, char **arguments)
{
    read_arguments(count, arguments);
    gather();
    loop_fd = epoll_create1(EPOLL_CLOEXEC);
    signal(SIGPIPE, SIG_IGN);

    long here = everyone - wanted.returners, first = 0;
    if (wanted.idle) first = PRELUDE < here ? PRELUDE : 0;
    else if (wanted.fill) first = wanted.channels;
    connect_some(0, first);
    if (wanted.fill) fill();
    if (wanted.idle) {
        wanted.spin = 0;
        work(0.5, NULL);
    }
    long memory_before = memory_kb();
    begin_window(&connecting);
    connect_some(first, here);
    end_window();
    work(wanted.warm, NULL);
    long memory_after = memory_kb();

    if (wanted.announce) fputs("begin\n", stderr);
    begin_window(&windows[0]);
    work(wanted.seconds, NULL);
    end_window();
    double caught_up_s = -1;
    struct client *slow = &clients[here - 1];
    if (wanted.slow) stop_reading(slow);
    if (wanted.slow || wanted.returners) {
        begin_window(&windows[1]);
        work(wanted.returners ? CATCH_UP_S : wanted.seconds, wanted.returners ? caught_up : NULL);
        end_window();
        if (wanted.returners && caught_up()) caught_up_s = (double)(windows[1].ended - windows[1].began) / 1e9;
    }
    if (!wanted.idle) drain();
    if (wanted.slow) read_the_rest(slow);

    printf("{\"connecting\":");
    print_window(&connecting);
    printf(",\"windows\":[");
    print_window(&windows[0]);
    if (wanted.slow || wanted.returners) printf(","), print_window(&windows[1]);
    printf("],\"clients\":%ld,\"connected\":%ld,\"memory_before_kb\":%ld,\"memory_after_kb\":%ld,"
           "\"lost\":%llu,\"repeated\":%llu,\"gone\":%ld,\"broken\":%llu,\"refused\":%llu,\"unacknowledged\":%llu,"
           "\"caught_up_s\":%.3f,\"slow_code\":%d,\"slow_heard\":%llu}\n",
        wanted.clients, here - first, memory_before, memory_after,
        (unsigned long long)(lost + forgiven), (unsigned long long)repeated, gone, (unsigned long long)broken,
        (unsigned long long)refused, *wanted.ack ? (unsigned long long)acks_missing : 0, caught_up_s,
        wanted.slow ? slow->close_code : 0, wanted.slow ? (unsigned long long)slow->heard : 0);
    return 0;
}
