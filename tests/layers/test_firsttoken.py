"""When a passing stream has its first token."""

import pytest

from llmmw.call import Item
from llmmw.errors import ResponseTooLarge
from llmmw.layers import firsttoken
from llmmw.layers.firsttoken import MAX_SILENT, FirstToken
from llmmw.testing.fake import chat_chunks

ONE, TWO = chat_chunks("one two")[:2]
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
PING = b": ping\n\n"


@pytest.mark.parametrize(
    ("op", "chunks", "at"),
    [
        ("chat", [ROLE, ONE, TWO], 2),
        ("chat", [PING, ROLE, PING, ONE], 4),
        ("chat", [ONE[:20], ONE[20:], TWO], 2),
        ("chat", [PING] * (MAX_SILENT + 3), MAX_SILENT),
        ("chat", [Item("a value"), ROLE], 1),
        ("embed", [PING, ROLE], 1),
        ("chat", [PING, ROLE], None),
    ],
)
def test_it_is_told_once_with_the_first_chunk_that_holds_one(op, chunks, at):
    told = []
    reader = FirstToken(op, lambda: told.append(len(seen)))
    seen = []
    for chunk in chunks:
        seen.append(chunk)
        reader.read(chunk)
    assert told == ([] if at is None else [at])


def test_a_stream_that_cannot_be_read_is_not_looked_at_any_more(monkeypatch):
    class Watch:
        fed = 0

        def __init__(self, op):
            pass

        def feed(self, chunk):
            Watch.fed += 1
            raise ResponseTooLarge("an event without an end")

    monkeypatch.setattr(firsttoken, "StreamWatch", Watch)
    told = []
    reader = FirstToken("chat", lambda: told.append(1))
    for chunk in (ROLE, ONE, TWO):
        reader.read(chunk)
    assert (told, Watch.fed) == ([], 1)
