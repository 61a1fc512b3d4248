"""The chat's list of who is here, while the store that knows them is away."""

import json
from pathlib import Path

from playwright.async_api import Browser, WebSocketRoute, expect
from support import Process
from test_chat import visiting

REFUSALS = 3


async def test_who_is_here_is_asked_again(browser: Browser, tmp_path: Path) -> None:
    """Presence that is away for some seconds when one enters is asked for soon after, not with the next look around."""
    refused: list[int] = []

    def refuse(page: WebSocketRoute) -> None:
        def answer(frame: str | bytes) -> None:
            for reply in map(json.loads, str(frame).split("\n")):
                if "presence" in reply and len(refused) < REFUSALS:
                    refused.append(reply["id"])
                    reply = {"id": reply["id"], "error": {"code": 100, "message": "?", "temporary": True}}
                page.send(json.dumps(reply))

        page.connect_to_server().on_message(answer)

    with Process(tmp_path) as process:
        async with visiting(browser, process.http) as visitors:
            await visitors.tab("Grace")
            ada = await visitors.tab("Ada", route=refuse)
            await expect(ada.page.locator("#count")).to_have_text("2 here")
            assert len(refused) == REFUSALS
