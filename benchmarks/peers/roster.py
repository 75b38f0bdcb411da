"""All peers, in the order of the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peers.adapters import (
    aiocache,
    bare,
    cashews,
    dspy,
    floor,
    gptcache,
    hishel,
    inspect_ai,
    langchain,
    litellm,
    openai,
    ours,
)

if TYPE_CHECKING:
    from peers.protocol import Peer

PEERS = (
    ours.PEER,
    ours.SDK,
    bare.AIOHTTP,
    bare.HTTPX,
    bare.HTTPX2,
    openai.PEER,
    openai.BY_HAND,
    litellm.PEER,
    langchain.PEER,
    dspy.PEER,
    inspect_ai.PEER,
    floor.PEER,
    gptcache.PEER,
    cashews.PEER,
    aiocache.PEER,
    hishel.PEER,
)


def peer_named(name: str) -> Peer:
    """The peer of that name."""
    return next(peer for peer in PEERS if peer.name == name)
