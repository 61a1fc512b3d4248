"""What the landing page shows: that it runs, what runs, and for how many."""

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
    """The documents that come with the source, as plain text."""

    def get_content_type(self) -> str:
        """Markdown is meant to be read as it is."""
        return "text/plain; charset=utf-8"


ROOT = Path(__file__).parent.parent
DOCUMENTS = r"/(README\.md|server/PROTOCOL\.md|docs/[a-z0-9-]+\.md)"
"""The paths that ``DocumentHandler`` answers, below ``ROOT``; nothing else there is anybody's business."""
