"""Offline batches and the files they need: what the server remembers of them."""

from typing import Any

from msgspec import Struct

from .wire import Json


class Item(Struct):
    """One request of a batch, and later what became of it."""

    custom_id: str
    path: str
    body: bytes
    ending: str = ""
    """``answered``, ``expired`` or ``canceled``."""
    status: int = 0
    answer: Any = None


class Batch(Struct):
    """A batch of either kind."""

    id: str
    key: str
    created_at: float
    items: list[Item]
    asked: Json
    looks: int = 0
    canceled: bool = False
    ended: bool = False
    errors: list[Json] = []
    files: dict[str, str] = {}


class Book:
    """Files and batches of one server."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[str, bytes]] = {}
        self.batches: dict[str, Batch] = {}

    def new_id(self, kind: str) -> str:
        """The next name of a kind."""
        return f"{kind}{len(self.files) + len(self.batches) + 1:08d}"

    def keep(self, key: str, data: bytes) -> str:
        """Store a file of that API key; its id."""
        name = self.new_id("file-")
        self.files[name] = (key, data)
        return name
