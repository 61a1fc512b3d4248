"""What a look finds out of commits that wait for one: where their channels stand, who has their slots and keys.

Reads only, but for the documents of channels that nobody has published to.
"""

import asyncio
from collections.abc import Sequence

from server.history import random_epoch
from server.history.mongo_places import Place, Places, View
from server.history.mongo_scheme import CHANNELS, LOG, Channel, Document, Record, new_channel, slots
from server.history.mongo_server import MongoServer
from server.history.mongo_write import Write

LOOKED_AT = 100


class Looks:
    """Asks ``server`` about commits; what it raises is ``errors.Unavailable``."""

    def __init__(self, server: MongoServer, places: Places) -> None:
        self._server = server
        self._places = places

    async def views_and_holders(self, writes: Sequence[Write]) -> tuple[dict[str, View], dict[str, Record]]:
        """Where the channels of ``writes`` stand, and who holds the slots of those that were sent.

        Where only the slot was taken, and the channel is known, one look at what
        stands from that slot on says both, as long as that is a few documents of
        the life that we know.  It finds the holder as a rule: MongoDB answers with
        "duplicate key" when a majority has what stands in the way (6.0 does).  If
        not, a linearizable one will: that waits for it.
        """
        views: dict[str, View] = {}
        holders: dict[str, Record] = {}
        quick: list[tuple[Write, Place, Document]] = []
        rest: list[Write] = []
        for write in writes:
            place = self._places.fresh(write.channel)
            if write.document is None or not write.sent or write.doubted or place is None:
                rest.append(write)
            else:
                quick.append((write, place, write.document))
        found = await asyncio.gather(*(self._from_slot(*one) for one in quick))
        for (write, _, _), seen in zip(quick, found, strict=True):
            if seen is None:
                rest.append(write)
            else:
                views[write.channel], holders[write.channel] = seen
        if rest:
            views_of_rest, holders_of_rest = await self._views_at_length(rest)
            views.update(views_of_rest)
            holders.update(holders_of_rest)
        return views, holders

    async def _from_slot(self, write: Write, place: Place, document: Document) -> tuple[View, Record] | None:
        """The view from a slot that was taken, and who holds it; ``None`` if that takes more than one look.

        It does if an end is there: what stands behind it is of another life, with
        an epoch and a base that only the channel's document tells.
        """
        first = document["_id"]["first"]
        state = Channel(write.channel, place.epoch, place.base, place.floor, place.floor, 0, 0)
        found = await self._server.find(
            LOG,
            slots(write.channel, first - 1),
            fields=("last", "time", "commit", "end"),
            limit=LOOKED_AT,
            certain=write.blind > 0,
        )
        records = self._places.records(found)
        if not records or records[0].first != first or len(found) == LOOKED_AT or any(each.ends for each in records):
            return None
        return View(state, records[-1]), records[0]

    async def _views_at_length(self, writes: Sequence[Write]) -> tuple[dict[str, View], dict[str, Record]]:
        holders = await self._holders([write for write in writes if write.sent])
        return await self._views(writes), holders

    async def _holders(self, writes: Sequence[Write]) -> dict[str, Record]:
        """Who holds the slots of what was sent, by channel."""
        blind = any(write.blind for write in writes)
        ids = [write.document["_id"] for write in writes if write.document is not None]
        if not ids:
            return {}
        found = await self._server.find(
            LOG, {"_id": {"$in": ids}}, fields=("last", "time", "commit", "end"), ordered=False, certain=blind
        )
        return {record.channel: record for record in self._places.records(found)}

    async def hits(self, writes: Sequence[Write]) -> dict[str, list[Record]]:
        """The documents, by channel, that have a key of what was sent."""
        keyed = [write for write in writes if write.keys]
        found = await asyncio.gather(
            *(
                self._server.find(
                    LOG,
                    {"_id.channel": write.channel, "keys.key": {"$in": list(write.keys)}},
                    fields=("last", "time", "commit", "keys"),
                    ordered=False,
                )
                for write in keyed
            )
        )
        return {write.channel: self._places.records(documents) for write, documents in zip(keyed, found, strict=True)}

    async def _views(self, writes: Sequence[Write]) -> dict[str, View]:
        """Where the channels of ``writes`` stand; those that nobody has published to are made.

        Of one whose document is somebody else's there is nothing to see.
        """
        names = [write.channel for write in writes]
        states = await self._places.states(names)
        absent = [write.channel for write in writes if write.channel not in states and not write.sent]
        views = await self._places.look([name for name in names if name in states]) if states else {}
        if absent:
            now_ms = self._places.now_ms
            await self._server.update_each(
                CHANNELS,
                [({"_id": name}, {"$setOnInsert": new_channel(random_epoch(), now_ms)}) for name in absent],
                upsert=True,
            )
            made = await self._places.states(absent)
            views.update((name, View(made[name], None)) for name in absent if name in made)
        return {name: views.get(name, View(None, None)) for name in names}
