"""For operators and their load balancers; PROTOCOL 17."""

from handlers.base import JsonHandler
from server.node import Node


class LiveHandler(JsonHandler):
    """``GET /health/live``: the event loop turns."""

    def get(self) -> None:
        """200 and ``{}``."""
        self.answer({})


class ReadyHandler(JsonHandler):
    """``GET /health/ready``: may clients be sent here?"""

    def initialize(self, node: Node) -> None:
        """``node`` is the process that is asked about."""
        self._node = node

    def get(self) -> None:
        """200 and ``{"ready": true}``; 503 with the reasons, by part, while something that it needs is away."""
        self.set_header("Cache-Control", "no-store")
        troubles = self._node.parts.troubled
        self.answer({"ready": False, "reasons": troubles} if troubles else {"ready": True}, 503 if troubles else 200)
