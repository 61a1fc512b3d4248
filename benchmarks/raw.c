/* The floor: what the kernel alone costs.  A room per path, and a bare loop of send() of one ready frame.
 *
 *     raw PORT
 *
 * Not a server: it answers only the handshake with the sample key of RFC 6455 1.3, expects every read to bring whole
 * messages of one publisher, knows no limits, and drops what a socket does not take.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CLIENTS = 1 << 16, ROOMS = 1 << 14, READ_BYTES = 1 << 18 };

static const char ANSWER[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
                             "\x81\x05ready";

struct room {
    char name[64];
    int *members;
    int count, capacity;
};

static struct room rooms[ROOMS];
static int room_count;
static struct room *room_of[CLIENTS]; /* by file descriptor; NULL before the handshake */

static struct room *find_room(const char *name, size_t size)
{
    uint32_t slot = 2166136261u;
    for (size_t at = 0; at < size; at++) slot = (slot ^ (uint8_t)name[at]) * 16777619u;
    for (slot %= ROOMS; rooms[slot].members; slot = (slot + 1) % ROOMS)
        if (strlen(rooms[slot].name) == size && !memcmp(rooms[slot].name, name, size)) return &rooms[slot];
    if (size >= sizeof rooms->name || ++room_count == ROOMS) abort();
    memcpy(rooms[slot].name, name, size);
    rooms[slot].capacity = 4;
    rooms[slot].members = malloc(sizeof(int) * 4);
    return &rooms[slot];
}

static void join(int fd, const char *request)
{
    const char *name = strchr(request, '/'), *end = name ? strchr(name, ' ') : NULL;
    if (!end) abort();
    struct room *room = find_room(name, (size_t)(end - name));
    if (room->count == room->capacity)
        room->members = realloc(room->members, sizeof(int) * (size_t)(room->capacity *= 2));
    room->members[room->count++] = fd;
    room_of[fd] = room;
    if (send(fd, ANSWER, sizeof ANSWER - 1, MSG_NOSIGNAL) < 0) return;
}

static void leave(int fd)
{
    struct room *room = room_of[fd];
    for (int at = 0; room && at < room->count; at++)
        if (room->members[at] == fd) room->members[at--] = room->members[--room->count];
    room_of[fd] = NULL;
    close(fd);
}

static void send_to_all(const struct room *room, const uint8_t *frame, size_t size)
{
    for (int at = 0; at < room->count; at++)
        if (send(room->members[at], frame, size, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) continue;
}

static void take(int fd, uint8_t *data, size_t size)
{
    while (size >= 6) {
        size_t length = data[1] & 0x7f, head = 2;
        if (length == 126) {
            length = (size_t)(data[2] << 8 | data[3]);
            head = 4;
        }
        const uint8_t *mask = data + head;
        uint8_t *payload = data + head + 4;
        if (length == 127 || size < head + 4 + length) return;
        for (size_t at = 0; at < length; at++) payload[at] ^= mask[at & 3];
        if ((data[0] & 0x0f) == 8) return;
        /* The frame for the others, without the mask, is made in place, right before the payload. */
        uint8_t *frame = payload - head;
        memmove(frame, data, head);
        frame[1] &= 0x7f;
        send_to_all(room_of[fd], frame, head + length);
        data = payload + length;
        size -= head + 4 + length;
    }
}

int main(int count, char **arguments)
{
    static uint8_t data[READ_BYTES + 1];
    static struct epoll_event events[512];
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), loop = epoll_create1(0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET,
        .sin_port = htons((uint16_t)atoi(count > 1 ? arguments[1] : "0")),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event interest = {.events = EPOLLIN, .data.fd = listener};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("raw");
        return 1;
    }
    epoll_ctl(loop, EPOLL_CTL_ADD, listener, &interest);
    for (;;) {
        int ready = epoll_wait(loop, events, 512, -1);
        for (int at = 0; at < ready; at++) {
            int fd = events[at].data.fd;
            if (fd == listener) {
                while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (fd >= CLIENTS) abort();
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                    interest = (struct epoll_event){.events = EPOLLIN, .data.fd = fd};
                    epoll_ctl(loop, EPOLL_CTL_ADD, fd, &interest);
                }
                continue;
            }
            ssize_t size = recv(fd, data, READ_BYTES, 0);
            if (size == 0 || (size < 0 && errno != EAGAIN)) {
                leave(fd);
            } else if (size > 0 && room_of[fd]) {
                take(fd, data, (size_t)size);
            } else if (size > 0) {
                data[size] = 0;
                join(fd, (char *)data);
            }
        }
    }
}
