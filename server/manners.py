"""Manners: how subscriptions are sent to, so that all of one manner get the same bytes.

Subscribers of one channel differ in their wire, in whether they know it by a number
(PROTOCOL 21.4), in the publications they want (13), and in whether they get patches
(12).  A *manner* is one combination of these; equal ones are one object, and the hub
keeps the live subscriptions of a channel by manner.  So whatever is decided or encoded
is so once for a manner, or less: a filter is judged once for a publication, and a
frame is encoded once for each form that anybody gets (``Sending``).

Patches rest on what stands here:

* The *base* of a patch is the payload that the client got last on this subscription.
  Whoever has certainly got what the live ones of the channel got last is *based*; to
  anybody else the next publication goes in full, and is then its base.  Certainty is
  not a matter of offsets: the very bytes that were sent are compared, so that no
  repair, no erased payload and no new epoch can deceive anybody.
* That a publication was published with ``delta`` goes with it to the live ones, here
  and by announcement, and is not stored: the wish saves work where a patch is not
  worth it, and says nothing of the content.  A live publication that was read from
  history to fill a hole has no such wish and goes out in full, unless the namespace
  has ``delta_publish``.  What one client is sent of history (its recovery) is patched
  from one publication to the next, however it was published, as Centrifugo does.
* Numberless publications are sent in full, since nothing says which one was before;
  what passes through a kept channel is a base like any other, for that is what
  clients take it for.

Tried and dropped: the base in each subscription (a store for each delivery, of bytes
that are the same for all of them); keeping the patch beside the publication in history
(another store format, for bytes that are made in less time than they are read in).

Pure.
"""

from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum
from weakref import WeakValueDictionary

import msgspec

from server import delta, protocol
from server.channels import Namespace
from server.filters import Filter
from server.outbox import Wire
from server.stream import Publication

PATCHES_BYTES = 4 * 1024 * 1024
"""How much of what patches were made of, and of the patches, is remembered by one process."""


class Delta(Enum):
    """What a subscription gets as payloads (PROTOCOL 12)."""

    OFF = "payloads as they are"
    FULL = "payloads in the form that patches need, since its base is in doubt"
    BASED = "patches, where they are shorter"


class Manner:
    """One way of being sent to; made by ``of`` only, so that equal ones are identical."""

    __slots__ = ("__weakref__", "delta", "filter", "numbered", "plain", "wire")

    def __init__(self, wire: Wire, numbered: bool, filter: Filter | None, delta: Delta) -> None:
        self.wire = wire
        self.numbered = numbered
        self.filter = filter
        self.delta = delta
        self.plain = filter is None and delta is Delta.OFF
        """Does it get every publication, and payloads as they are?"""

    def __repr__(self) -> str:
        numbered = " numbered" if self.numbered else ""
        filter = f" {self.filter!r}" if self.filter is not None else ""
        return f"<Manner {self.wire.format}{numbered}{filter} {self.delta.name}>"

    @classmethod
    def of(
        cls, wire: Wire, *, numbered: bool = False, filter: Filter | None = None, delta: Delta = Delta.OFF
    ) -> "Manner":
        """The manner of these traits; it is forgotten when nobody has it any more."""
        traits = wire, numbered, filter, delta
        found = _known.get(traits)
        if found is None:
            found = _known[traits] = cls(*traits)
        return found

    def but(self, delta: Delta) -> "Manner":
        """The same with another kind of payloads."""
        return Manner.of(self.wire, numbered=self.numbered, filter=self.filter, delta=delta)


_known: WeakValueDictionary[tuple[Wire, bool, Filter | None, Delta], Manner] = WeakValueDictionary()


# --- patches ------------------------------------------------------------------------
class Patches:
    """Patches made lately: those who come back together need the same ones, one after the other."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[bytes, bytes, bool], bytes | None] = OrderedDict()
        self._bytes = 0

    def between(self, base: bytes, target: bytes, *, text: bool) -> bytes | None:
        """See ``delta.create``."""
        key = base, target, text
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        patch = self._made[key] = delta.create(base, target, text=text)
        self._bytes += _weight(key, patch)
        while self._bytes > PATCHES_BYTES:
            self._bytes -= _weight(*self._made.popitem(last=False))
        return patch


def _weight(key: tuple[bytes, bytes, bool], patch: bytes | None) -> int:
    return len(key[0]) + len(key[1]) + len(patch or b"") + 256


# --- publications on their way ----------------------------------------------------------
class Sending:
    """One publication on its way to the subscriptions of a channel.

    ``number`` is the channel's; ``base`` is what the based ones got last, ``None`` if
    there are none or if this publication shall go to everybody in full.
    """

    __slots__ = (
        "_base",
        "_channel",
        "_epoch",
        "_frames",
        "_namespace",
        "_number",
        "_patches",
        "_verdicts",
        "publication",
    )

    def __init__(
        self,
        channel: str,
        number: int,
        namespace: Namespace,
        publication: Publication,
        epoch: str,
        patches: Patches,
        base: bytes | None = None,
    ) -> None:
        self.publication = publication
        self._channel = channel
        self._number = number
        self._namespace = namespace
        self._epoch = epoch
        self._patches = patches
        self._base = base
        self._frames: dict[tuple[Wire, bool, bool, bool, bool], bytes] = {}
        self._verdicts: dict[Filter, bool] = {}

    def wanted(self, filter: Filter) -> bool:
        """Do those with this filter want it?"""
        verdict = self._verdicts.get(filter)
        if verdict is None:
            verdict = self._verdicts[filter] = filter.matches(self.publication.tags)
        return verdict

    def frame(self, manner: Manner) -> bytes:
        """Its frame for subscriptions of this manner; raises ``protocol.Inexpressible`` (PROTOCOL 9.4)."""
        wire, plain = manner.wire, manner.delta is Delta.OFF
        patch = None
        if manner.delta is Delta.BASED and self._base is not None:
            patch = _patch(self._patches, wire.format, self._base, self.publication.data, self._namespace)
        filtered = manner.filter is not None
        form = wire, manner.numbered, plain, patch is not None, filtered
        frame = self._frames.get(form)
        if frame is None:
            body = express(wire.format, self.publication, self._epoch, self._namespace)
            if filtered and self.publication.offset:
                body.epoch = self._epoch  # offset 1, which has it, may not be wanted
            if not plain:
                _put(body, wire.format, self.publication.data, patch)
            frame = self._frames[form] = encode(manner, self._channel, self._number, "pub", body)
        return frame


def encode(manner: Manner, channel: str, number: int, kind: str, body: protocol.Body) -> bytes:
    """The frame of a push to who knows the channel by its name, or by its number (PROTOCOL 21.4)."""
    wire = manner.wire
    if manner.numbered:
        return wire.frame(wire.codec.push_by_number(number, kind, body))
    return wire.frame(wire.codec.push(channel, kind, body))


def in_full(
    manner: Manner, channel: str, number: int, namespace: Namespace, publication: Publication, epoch: str
) -> bytes:
    """The frame of a publication for who gets all of them as they are; raises ``protocol.Inexpressible``."""
    if manner.numbered or namespace.binary:
        return encode(manner, channel, number, "pub", express(manner.wire.format, publication, epoch, namespace))
    wire = manner.wire
    return wire.frame(wire.codec.publication(channel, publication, epoch))


def bodies(
    manner: Manner, publications: Sequence[Publication], epoch: str, namespace: Namespace, patches: Patches
) -> list[protocol.Publication]:
    """What a client of this manner recovers in one reply: what it wants of these, the first one in full.

    Raises ``protocol.Inexpressible``.
    """
    format, found = manner.wire.format, []
    base: bytes | None = None
    for publication in publications:
        if manner.filter is not None and not manner.filter.matches(publication.tags):
            continue
        body = express(format, publication, epoch, namespace)
        if manner.delta is not Delta.OFF:
            data = publication.data
            _put(body, format, data, _patch(patches, format, base, data, namespace) if base is not None else None)
            base = data
        found.append(body)
    return found


def _patch(patches: Patches, format: str, base: bytes, data: bytes, namespace: Namespace) -> bytes | None:
    """JSON needs patches that are text; where all payloads are text, one patch serves both formats."""
    return patches.between(base, data, text=format == "json" or not namespace.binary)


def _put(body: protocol.Publication, format: str, data: bytes, patch: bytes | None) -> None:
    """Payload or patch, as who asked for patches gets it: in JSON as a string of exactly these bytes."""
    found = data if patch is None else patch
    body.data = msgspec.Raw(msgspec.json.encode(found.decode()) if format == "json" else found)
    body.delta = patch is not None


def express(format: str, publication: Publication, epoch: str, namespace: Namespace) -> protocol.Publication:
    """A publication as a client of this format gets it.

    Raises ``protocol.Inexpressible`` for a payload that is no JSON and a client
    that speaks JSON, which only a ``binary`` namespace can bring together.
    """
    body = protocol.publication(publication, epoch)
    if namespace.binary and format == "json":
        if not protocol.is_json(publication.data):
            raise protocol.Inexpressible(
                f"a payload of the binary namespace {namespace.name!r} is no JSON, and this client speaks JSON"
            )
        body.data = msgspec.Raw(protocol.one_line(publication.data))
    return body
