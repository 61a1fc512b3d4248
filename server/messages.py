"""A publication as a back end writes it: in the server API, and in the answer of a publish proxy."""

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta

from server import protocol
from server.history import HIGHEST_VERSION, Version


class Message(msgspec.Struct):
    """PROTOCOL 15.2, 16.4; with ``delta`` it goes as a patch to those who want one (PROTOCOL 12)."""

    data: protocol.Payload = UNSET
    b64data: str = ""
    skip_history: bool = False
    tags: dict[str, str] | None = None
    idempotency_key: str = ""
    delta: bool = False
    version: Annotated[int, Meta(ge=0, le=HIGHEST_VERSION)] = 0
    version_epoch: Annotated[str, Meta(max_length=256)] = ""

    @property
    def versioned(self) -> Version:
        """Which version it is (PROTOCOL 11.8); an epoch alone says nothing."""
        return Version(self.version, self.version_epoch) if self.version else Version()
