"""What the landing page shows: that it runs, what runs, and for how many."""

import importlib.metadata
import os
from pathlib import Path

from handlers.base import JsonHandler, PageHandler
from server import __version__
from server.node import Node


class StatusHandler(JsonHandler):
    """``GET /v1/status``; PROTOCOL 17.0.4."""

    def initialize(self, node: Node) -> None:
        """``node`` is the process that is asked about."""
        self._node = node

    def get(self) -> None:
        """200 with counts of this process; ``uptime`` in seconds."""
        node = self._node
        self.set_header("Cache-Control", "no-store")
        self.answer(
            {
                "version": __version__,
                "connections": len(node.sessions),
                "channels": len(node.hub.feeds),
                "uptime": max(0, int(node.clock() - node.started_at)),
                "configured": node.settings.configured,
                "guests": node.settings.guests.enabled,
            }
        )


class DocumentHandler(PageHandler):
    """The documents that come with the source, as plain text; an installed server has them elsewhere."""

    @classmethod
    def get_absolute_path(cls, root: str, path: str) -> str:
        """In the source as its address says; installed, ``docs`` is in the package of the engine."""
        found = super().get_absolute_path(root, path)
        return found if os.path.exists(found) else super().get_absolute_path(os.path.join(root, "server"), path)

    def compute_etag(self) -> str | None:
        """None for what is no file."""
        return None if self.absolute_path is None else super().compute_etag()

    async def get(self, path: str, include_body: bool = True) -> None:
        """The file, or, for the README of an installed server, its description in the package's metadata."""
        if path != "README.md" or not INSTALLED:
            await super().get(path, include_body)
            return
        self.absolute_path = None
        self.set_header("Content-Type", self.get_content_type())
        self.set_extra_headers(path)
        text = str(importlib.metadata.metadata("waterspout").json["description"])
        self.finish(text if include_body else "")

    def get_content_type(self) -> str:
        """Markdown is meant to be read as it is."""
        return "text/plain; charset=utf-8"


ROOT = Path(__file__).parent.parent
INSTALLED = not (ROOT / "README.md").exists()
DOCUMENTS = r"/(README\.md|server/PROTOCOL\.md|docs/[a-z0-9-]+\.md)"
"""The paths that ``DocumentHandler`` answers, below ``ROOT``; nothing else there is anybody's business."""
