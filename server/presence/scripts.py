"""What presence keeps in Redis, and the Lua that reads and changes it.

Below ``{prefix}:presence1:`` (the number is that of this layout) stand

* ``leases``: a sorted set, incarnation to the time its lease runs out, in ms of
  the clock of the one Redis that holds this key.  That clock alone judges: those
  of the processes may differ by any amount.  0: it has run out for good.
* ``channels:{incarnation}``: a set, where this incarnation may have entries, for
  whoever has to clear them away.  Written before the entry.
* per channel, below ``{channel}:`` with the braces, so that a cluster keeps them together
  (Redis Cluster specification, "Hash tags"):
  ``entries`` (client to entry), ``counts`` (incarnation to how many clients),
  ``users`` (user to how many clients), ``of:{incarnation}`` (its clients), and for
  a minute ``swept:{token}``, what a sweep took, so that one whose answer was lost
  can ask again.

So a client that comes or goes costs the same few steps however many there are;
counting reads ``counts`` and the length of ``users``, which is as many steps as
processes; and a sweep reads the entries it clears away and no others.  Tried
and dropped: a hash per incarnation and channel alone (counting users would read
all of them), and a key with an expiry per client (renewing costs each of them, and
nobody would learn that one is gone).

An *entry* is text of fixed width, that Lua can cut, and then bytes that it need
not read: incarnation (20: process 12, number 8), stamp (12), length of the user's
id in bytes (8), the user's id, ``conn_info`` and ``chan_info``.  Stamps count what
one process says, so that what was said earlier and comes later changes nothing.

No script takes more steps than ``SWEPT_BY_SCRIPT`` or ``PAGE_ENTRIES`` times a
handful, but one: counting users while entries of a dead process still stand in
the channel.  Pure.
"""

import hashlib
from typing import NamedTuple

import msgspec

from server.stream import ClientInfo

PROCESS, INCARNATION, STAMP = 12, 20, 12
SWEPT_BY_SCRIPT = 100
"""Entries that one run of a script clears away."""

PAGE_ENTRIES = 500
"""Entries that one run of a script reads, about."""

KEPT_ANSWER_S = 60
"""How long the answer to a sweep may be asked for again."""

_Infos = tuple[bytes | None, bytes | None]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Infos).decode


class Script(NamedTuple):
    """A Lua script and the name by which a Redis that has run it knows it."""

    text: str
    sha: str


def _script(text: str) -> Script:
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


# --- keys and values ----------------------------------------------------------
class Keys:
    """The names of all keys below one prefix."""

    def __init__(self, prefix: str) -> None:
        self._base = f"{prefix}:presence1:"
        self.leases = f"{self._base}leases"

    def channels(self, incarnation: str) -> str:
        """Where ``incarnation`` may have entries."""
        return f"{self._base}channels:{incarnation}"

    def of(self, channel: str, *names: str) -> tuple[str, ...]:
        """The keys of ``channel`` called ``names``, all in one slot of a cluster."""
        tag = channel.replace("%", "%25").replace("}", "%7D")  # a brace would end the hash tag
        return tuple(f"{self._base}{{{tag}}}:{name}" for name in names)


def to_entry(incarnation: str, stamp: int, info: ClientInfo) -> bytes:
    """What stands for one client."""
    user = info.user.encode()
    head = f"{incarnation}{to_stamp(stamp)}{len(user):08x}"
    return head.encode() + user + _encode((info.conn_info, info.chan_info))


def to_stamp(stamp: int) -> str:
    """A stamp as scripts compare it."""
    return f"{stamp:0{STAMP}x}"


def owner_of(entry: bytes) -> str:
    """The incarnation that made an entry."""
    return entry[:INCARNATION].decode()


def from_entry(client: bytes, entry: bytes) -> ClientInfo:
    """Read ``to_entry`` again."""
    start = INCARNATION + STAMP + 8
    end = start + int(entry[start - 8 : start], 16)
    conn_info, chan_info = _decode(entry[end:])
    return ClientInfo(entry[start:end].decode(), client.decode(), conn_info, chan_info)


# --- leases -------------------------------------------------------------------
_CLOCK = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

RENEW = _script(
    _CLOCK
    + """
-- KEYS: leases; ARGV: the incarnation or '', the lease in ms, the incarnation that follows it if it has lapsed
local till = redis.call('ZSCORE', KEYS[1], ARGV[1])
if till and tonumber(till) > now then
    redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
    return 1
end
if ARGV[1] ~= '' then
    redis.call('ZADD', KEYS[1], 0, ARGV[1])  -- also if it is not there any more: its entries may be
end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[3])
return 0
"""
)

LEASES = _script(
    _CLOCK
    + """
-- KEYS: leases; returns those that live and those that do not
local found = {{}, {}}
local all = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for at = 1, #all, 2 do
    table.insert(tonumber(all[at + 1]) > now and found[1] or found[2], all[at])
end
return found
"""
)

LAPSED = _script(
    _CLOCK
    + """
-- KEYS: leases; returns those that have run out, at most 100, and makes that final
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 100)
for _, incarnation in ipairs(found) do
    redis.call('ZADD', KEYS[1], 0, incarnation)
end
return found
"""
)

# --- one channel --------------------------------------------------------------
_CHANNEL = """
-- KEYS: entries, counts, users
local entries, counts, users = KEYS[1], KEYS[2], KEYS[3]
local base = string.sub(entries, 1, -8)

local function clients(incarnation) return base .. 'of:' .. incarnation end
local function owner(entry) return string.sub(entry, 1, 20) end
local function process(entry) return string.sub(entry, 1, 12) end
local function stamp(entry) return tonumber(string.sub(entry, 21, 32), 16) end
local function user(entry) return string.sub(entry, 41, 40 + tonumber(string.sub(entry, 33, 40), 16)) end

local function fewer(key, field)
    if redis.call('HINCRBY', key, field, -1) <= 0 then redis.call('HDEL', key, field) end
end

local function take(client, entry)
    redis.call('HDEL', entries, client)
    redis.call('SREM', clients(owner(entry)), client)
    fewer(counts, owner(entry))
    fewer(users, user(entry))
end
"""

ADD = _script(
    _CHANNEL
    + """
-- ARGV: client, entry, '1' to leave alone what another process has entered; returns whether it stands there now
local before, entry = redis.call('HGET', entries, ARGV[1]), ARGV[2]
if before then
    local ours = process(before) == process(entry)
    if ours and stamp(before) > stamp(entry) or not ours and ARGV[3] == '1' then return 0 end
    take(ARGV[1], before)
end
redis.call('HSET', entries, ARGV[1], entry)
redis.call('SADD', clients(owner(entry)), ARGV[1])
redis.call('HINCRBY', counts, owner(entry), 1)
redis.call('HINCRBY', users, user(entry), 1)
return 1
"""
)

REMOVE = _script(
    _CHANNEL
    + """
-- ARGV: client, incarnation, stamp; returns whether it was there, and how many this incarnation has left
local entry, taken = redis.call('HGET', entries, ARGV[1]), 0
if entry and process(entry) == process(ARGV[2]) and stamp(entry) <= tonumber(ARGV[3], 16) then
    take(ARGV[1], entry)
    taken = 1
end
return {taken, tonumber(redis.call('HGET', counts, ARGV[2]) or 0)}
"""
)

SWEEP = _script(
    _CHANNEL
    + """
-- KEYS: and swept; ARGV: incarnation, how many, seconds to keep the answer
-- returns how many it has left, and client, entry of those taken
local said = redis.call('LRANGE', KEYS[4], 0, -1)
if #said > 0 then return said end
local answer = {0}
for _, client in ipairs(redis.call('SRANDMEMBER', clients(ARGV[1]), ARGV[2])) do
    local entry = redis.call('HGET', entries, client)
    take(client, entry)
    table.insert(answer, client)
    table.insert(answer, entry)
end
answer[1] = redis.call('SCARD', clients(ARGV[1]))
if #answer > 1 then
    redis.call('RPUSH', KEYS[4], unpack(answer))
    redis.call('EXPIRE', KEYS[4], ARGV[3])
end
return answer
"""
)

PAGE = _script("return redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])")

STATS = _script("return {redis.call('HLEN', KEYS[3]), redis.call('HGETALL', KEYS[2])}")

STATS_WITHOUT = _script(
    _CHANNEL
    + """
-- ARGV: incarnations that are gone; returns how many clients and users there are without them
local sum, gone = 0, {}
local all = redis.call('HGETALL', counts)
for at = 2, #all, 2 do sum = sum + all[at] end
for _, incarnation in ipairs(ARGV) do
    for _, client in ipairs(redis.call('SMEMBERS', clients(incarnation))) do
        local who = user(redis.call('HGET', entries, client))
        gone[who] = (gone[who] or 0) + 1
        sum = sum - 1
    end
end
local different = redis.call('HLEN', users)
for who, count in pairs(gone) do
    if tonumber(redis.call('HGET', users, who)) == count then different = different - 1 end
end
return {sum, different}
"""
)

SCRIPTS = (RENEW, LEASES, LAPSED, ADD, REMOVE, SWEEP, PAGE, STATS, STATS_WITHOUT)
