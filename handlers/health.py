"""For operators and their load balancers."""

from handlers.base import JsonHandler


class LiveHandler(JsonHandler):
    """``GET /health/live``: the event loop turns."""

    def get(self) -> None:
        """200 and ``{}``."""
        self.answer({})
