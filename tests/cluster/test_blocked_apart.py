"""PROTOCOL 10.5 with real processes, MongoDB and Redis: a user who is blocked is so everywhere, and stays so."""

from pathlib import Path
from typing import Any

from hopper import ask
from mongod import shared_set
from stage import Place, asked_again, staging
from support import SECRET, Client, Closed, token


async def call(place: Place, method: str, **request: Any) -> Any:
    """A call of the back-end API, as often as it is put off; successfully."""

    async def once() -> dict[str, Any]:
        reply = await ask(place.process.port, f"/api/{method}", body=request, headers={"X-API-Key": "api-key"})
        return dict(reply.json)

    answer = await asked_again(once)
    assert "result" in answer, answer
    return answer["result"]


async def connected(place: Place, user: str) -> Client:
    """A client of this user; raises ``Closed``."""
    return await Client.connected(place.process.url, token=token({"sub": user}, SECRET))


async def turned_away(place: Place, user: str) -> int:
    """The code with which a user is not let in."""
    try:
        await connected(place, user)
    except Closed as end:
        return end.code
    raise AssertionError(f"{user} was let in")


async def test_blocked_by_one_process_and_turned_away_by_all(tmp_path: Path) -> None:
    """When the call is answered all processes have obeyed; those that start later know; lifted, all let in again."""
    async with staging(tmp_path, shared_set()) as stage:
        first, second = stage.places
        ann, ben = await connected(second, "ann"), await connected(second, "ben")
        await ben.ask("subscribe", channel="chat:1")
        await call(first, "block_user", user="ann")
        await call(first, "block_user", user="ben", channel="chat:1", mute=True)
        assert await ann.closed() == (3503, "force disconnect")
        assert await ben.refused("publish", channel="chat:1", data=1) == 103
        assert [await turned_away(place, "ann") for place in stage.places] == [3507, 3507]

        await second.kill()
        await second.start()
        await second.ready()
        assert await turned_away(second, "ann") == 3507
        assert len((await call(second, "blocked_users"))["blocks"]) == 2

        await call(second, "unblock_user", user="ann")
        await call(second, "unblock_user", user="ben", channel="chat:1", mute=True)
        for place in stage.places:
            await (await connected(place, "ann")).close()
            speaker = await connected(place, "ben")
            await speaker.ask("publish", channel="chat:1", data="let in")
            await speaker.close()
