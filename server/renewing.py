"""What expires while its client need not care: the back end is asked, and says how it goes on.

PROTOCOL 16.2, 16.5.
"""

from collections.abc import Coroutine
from typing import Any

import msgspec

from server.errors import CONNECTION_EXPIRED, Disconnected, Refused, Unavailable
from server.hooks import Client, Hook, Hooks, Renewal
from server.hub import Subscription
from server.session import Session

RENEWAL_S = 60
"""How long what has expired goes on while the back end is asked about it."""


def renew(session: Session, now: float) -> None:
    """Have the back end asked about whatever has expired and is renewed by asking it; PROTOCOL 16.2, 16.5.

    What is asked about goes on for ``RENEWAL_S``, and is asked about again after
    that if there was no answer: a back end's bad minute costs nobody a connection.
    """
    hooks, client = session.node.hooks, session.handle
    if hooks is None or client is None:
        return
    if session.expire_at and session.expire_at <= now and (hook := hooks.find("refreshing")) is not None:
        session.expire_at = int(now) + RENEWAL_S
        session.node.spawn(_renew(session, hooks, hook, client), f"renew {session.client}")
    for subscription in session.subscriptions.values():
        if subscription.expire_at and subscription.expire_at <= now:
            hook = hooks.find("sub_refreshing", subscription.namespace.name)
            if hook is not None:
                subscription.expire_at = int(now) + RENEWAL_S
                work = _renew_subscription(session, hooks, hook, client, subscription)
                session.node.spawn(work, f"renew {session.client} {subscription.channel}")


async def _renew(session: Session, hooks: Hooks, hook: Hook, client: Client) -> None:
    renewal = await _renewal(session, hooks.ask(hook, client))
    if renewal is None or session.closed:
        return
    if renewal.expired:
        session.disconnect(CONNECTION_EXPIRED, f"{hook.called} says so")
        return
    session.expire_at = renewal.expire_at
    if renewal.info is not None:
        session.renew_info(renewal.info)
    session.plan()


async def _renew_subscription(
    session: Session, hooks: Hooks, hook: Hook, client: Client, subscription: Subscription
) -> None:
    renewal = await _renewal(session, hooks.ask(hook, client, subscription.channel))
    if renewal is None or session.closed or subscription.closed:
        return
    if renewal.expired:
        session.expire(subscription)
        return
    subscription.expire_at = renewal.expire_at
    if renewal.info is not None and renewal.info != subscription.info.chan_info:
        subscription.info = msgspec.structs.replace(subscription.info, chan_info=renewal.info)
        session.node.spawn(session.node.members.enter(subscription), f"enter {subscription.channel}")
    session.plan()


async def _renewal(session: Session, asking: Coroutine[Any, Any, Renewal]) -> Renewal | None:
    """What the back end says, ``None`` if nothing; an expiry that is past already means that it is over."""
    try:
        renewal = await asking
    except Disconnected as end:
        session.disconnect(end.disconnect, end.why)
        return None
    except (Refused, Unavailable):
        return None  # It has been logged.
    past = 0 < renewal.expire_at <= session.node.clock()
    return Renewal(True) if past else renewal
