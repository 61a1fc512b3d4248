"""Patches (PROTOCOL 12) against the decoders of both SDKs, which check size and checksum themselves."""

import json
import random
import subprocess
from base64 import b64decode, b64encode
from itertools import pairwise

import pytest
from centrifuge.fossil import apply_delta
from support import ROOT

from server.delta import create


def board(moves: int) -> bytes:
    """A game after so many moves: a JSON payload in several scripts, of which a little changes each time."""
    chance = random.Random(1)
    squares = [{"square": place, "piece": None, "note": "naïve 日本語 🙂"} for place in range(64)]
    for move in range(moves):
        squares[chance.randrange(64)].update(piece=chance.choice("♔♕♖♗♘♙"), note=f"über {move}" * chance.randrange(3))
        if not move % 7:
            chance.shuffle(squares)
    return json.dumps({"move": moves, "squares": squares}, ensure_ascii=False).encode()


def patches(*, text: bool) -> list[tuple[bytes, bytes, bytes]]:
    """Base, patch and target of fifty moves."""
    made = []
    for base, target in pairwise(map(board, range(51))):
        patch = create(base, target, text=text)
        assert patch is not None
        made.append((base, patch, target))
    return made


@pytest.mark.parametrize("form", ["json", "protobuf"])
def test_centrifuge_js(form: str) -> None:
    """The JavaScript SDK makes the targets, in JSON from patches that went through text, in Protobuf from bytes."""
    moves = patches(text=form == "json")
    asked = [
        (b64encode(base).decode(), patch.decode() if form == "json" else b64encode(patch).decode())
        for base, patch, _ in moves
    ]
    done = subprocess.run(
        ["node", "js/patches.mjs", form],
        cwd=ROOT / "tests" / "sdk",
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [b64decode(one) for one in json.loads(done.stdout)] == [target for _, _, target in moves]


@pytest.mark.parametrize("text", [True, False], ids=["text", "bytes"])
def test_centrifuge_python(text: bool) -> None:
    """The Python SDK makes the targets, from patches that are text and from others."""
    for base, patch, target in patches(text=text):
        assert apply_delta(base, patch) == target
