"""The order of commands that overtake one another on their way to `/emulation`, and where messages end in a stream."""

import random

import pytest

from handlers.emulation import LOOKS, Turns
from handlers.stream_outbox import EVENTS, LENGTHS, LINES, Framing, around_chunk
from server.protobuf import prefixed
from server.protocol import Command


def post(*ids: int) -> list[Command]:
    """A batch of commands with these ids."""
    return [Command(id=id) for id in ids]


def taken(turns: Turns, look: int) -> list[int]:
    """The ids of all commands whose turn it is at a look."""
    ids: list[int] = []
    while commands := turns.take(look):
        ids += [command.id for command in commands]
    return ids


# --- turns ------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_any_order_becomes_theirs(seed: int) -> None:
    """PROTOCOL 2.5: however posts overtake one another, if none is late the commands are taken as they were given."""
    chance = random.Random(seed)
    posts, id = [], 2
    while id < 200:
        size = chance.choice((1, 1, 1, 5))
        posts.append(post(*range(id, id + size)))
        id += size
    shuffled = chance.sample(posts, len(posts))
    turns = Turns(2)
    came: list[int] = []
    for commands in shuffled:
        turns.put(commands, 0, 1)
        came += taken(turns, 0)
    assert came == list(range(2, id))
    assert turns.waiting_bytes == 0


def test_a_missing_id_is_passed_over() -> None:
    """PROTOCOL 2.5: it is waited for as long as said, counted from the first that came after it, and no longer."""
    turns = Turns(2)
    turns.put(post(4), 10, 1)
    turns.put(post(7), 12, 1)
    turns.put(post(3), 13, 1)
    assert taken(turns, 10 + LOOKS - 1) == []
    assert taken(turns, 10 + LOOKS) == [3, 4]
    assert taken(turns, 12 + LOOKS) == [7]
    turns.put(post(8), 50, 1)
    assert taken(turns, 50) == [8]


def test_a_late_id_has_its_turn_at_once() -> None:
    """PROTOCOL 2.5: what was passed over and comes after all is carried out; so is an id that is used again."""
    turns = Turns(2)
    turns.put(post(5), 0, 1)
    assert taken(turns, LOOKS) == [5]
    for id in (3, 4, 4, 2, 1):
        turns.put(post(id), LOOKS, 1)
        assert taken(turns, LOOKS) == [id]
    turns.put(post(6), LOOKS, 1)
    assert taken(turns, LOOKS) == [6]


def test_a_client_that_counts_otherwise() -> None:
    """Ids in steps, or at random, cost a wait and nothing else; a batch waits for nothing inside of itself."""
    turns = Turns(2)
    turns.put(post(10, 20, 30), 0, 1)
    assert taken(turns, LOOKS - 1) == []
    assert taken(turns, LOOKS) == [10, 20, 30]
    for number, id in enumerate(random.Random(1).sample(range(100, 2**32 - 1), 4_000)):
        turns.put(post(id), 100 + number // 100, 3)
    assert turns.waiting_bytes == 12_000
    assert len(taken(turns, 200)) == 4_000
    assert turns.waiting_bytes == 0


def test_pongs_in_a_batch_keep_their_place() -> None:
    """What has no id goes along with the batch in which it stands."""
    turns = Turns(2)
    turns.put([*post(0, 2), *post(0)], 0, 1)
    assert taken(turns, 0) == [0, 2, 0]


# --- where messages end -------------------------------------------------------------
@pytest.mark.parametrize(
    ("framing", "messages"),
    [
        (LINES, [b"{}", b'{"a":1}', b"x" * 500]),
        (EVENTS, [b"{}", b'{"a":1}', b"x" * 500]),
        (LENGTHS, [prefixed(b""), prefixed(b"abc"), prefixed(b"x" * 300), prefixed(b"\x80" * 20_000)]),
    ],
    ids=["lines", "events", "lengths"],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_around_finds_the_message(framing: Framing, messages: list[bytes], chunked: bool) -> None:
    """For each byte of a run of messages it is known where its message begins and ends, also between two of them."""
    frames = [framing.wrap(message) for message in messages]
    around = framing.around
    if chunked:
        frames = [b"%x\r\n%s\r\n" % (len(frame), frame) for frame in frames]
        around = around_chunk
    data = b"".join(frames)
    begin = 0
    for frame in frames:
        end = begin + len(frame)
        assert around(data, begin) == (begin, begin)
        for at in {begin + 1, begin + 2, (begin + end) // 2, end - 2, end - 1} - {begin, end}:
            if begin < at < end:
                assert around(data, at) == (begin, end)
                assert around(bytearray(data), at) == (begin, end)
        begin = end
    assert around(data, len(data)) == (len(data), len(data))
