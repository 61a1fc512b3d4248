"""A few seconds of the fuzzing that ``make fuzz`` does for as long as one likes: the same inputs in every run."""

import random
from collections.abc import Iterator

import pytest
from targets import TARGETS, Target

INPUTS = 4_000
"""Of each target: two seconds or so."""

DICTIONARY = (
    *(bytes((byte,)) for byte in (0, 1, 9, 10, 13, 32, 127, 128, 191, 255)),
    *(b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b".", b"*", b"?", b";", b"=", b"null", b"true", b"-1", b"1e999"),
    *(b"18446744073709551616", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\\ud800", "\u202e".encode(), b"%00", b"\xc3"),
)

FOUND: dict[str, tuple[bytes, ...]] = {"frames": (), "commands": (), "tokens": (), "rest": ()}
"""Inputs by which fuzzing has found a fault; each has a test beside its module as well."""


def mutated(target: Target, chance: random.Random) -> Iterator[bytes]:
    """Inputs made of the seeds: bytes changed, cut, doubled, joined, or replaced by what parsers stumble over."""
    while True:
        data = bytearray(chance.choice(target.seeds))
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            at = chance.randrange(len(data) + 1)
            end = min(len(data), at + chance.choice((1, 2, 4, 16, 64)))
            match chance.randrange(7):
                case 0:
                    data[at:end] = chance.randbytes(end - at)
                case 1:
                    del data[at:end]
                case 2:
                    data[at:at] = data[at:end] * chance.choice((1, 2, 50))
                case 3:
                    data[at:end] = chance.choice(DICTIONARY)
                case 4:
                    data[at:at] = chance.choice(DICTIONARY)
                case 5:
                    other = chance.choice(target.seeds)
                    data[at:] = other[chance.randrange(len(other) + 1) :]
                case _:
                    if at < len(data):
                        data[at] ^= 1 << chance.randrange(8)
        yield bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations(name: str) -> None:
    """Thousands of inputs that are nearly good break no promise."""
    target = TARGETS[name]
    inputs = mutated(target, random.Random(f"{name} of today, of tomorrow"))
    for seed in (*target.seeds, *FOUND[name], b"", b"\x00"):
        target.run(seed)
    for _ in range(INPUTS):
        data = next(inputs)
        try:
            target.run(data)
        except BaseException:
            print(f"{name}: {data!r}")
            raise


def test_every_seed_gets_far() -> None:
    """Seeds are worth beginning with: of each target's, at least a third are accepted by what is fuzzed."""
    from handlers.frames import Parser
    from server.protocol import JSON

    assert JSON.decode(TARGETS["commands"].seeds[1][1:])[0].subscribe is not None
    parser = Parser(2_000)
    parser.feed(TARGETS["frames"].seeds[0][1:])
    assert parser.next_event() == b'{"id":1,"connect":{}}'
