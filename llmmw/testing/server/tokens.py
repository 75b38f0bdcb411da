"""The documented toy tokenizer and the toy vocabulary.

One token is a run of four characters: ``tokens = ceil(len(text) / 4)``. It is close to English averages, needs
no table, costs one division and cuts any text the same way each time. Replies are words of three letters
joined by spaces, so a reply of ``n`` words is exactly ``n`` tokens.
"""

import zlib
from hashlib import shake_128

CHARS_PER_TOKEN = 4
VOCABULARY = 32_000

# 16 * 4 * 4 = 256 words: one byte of a digest picks one word.
WORDS = tuple(a + b + c for a in "bdfghjklmnprstvz" for b in "aeio" for c in "lnrs")


def count(text: str) -> int:
    """Tokens in a text."""
    return (len(text) + CHARS_PER_TOKEN - 1) // CHARS_PER_TOKEN


def pieces(text: str) -> list[str]:
    """The text of each token, in order; joined they are the text again."""
    return [text[i : i + CHARS_PER_TOKEN] for i in range(0, len(text), CHARS_PER_TOKEN)]


def token_id(piece: str) -> int:
    """A stable number below ``VOCABULARY`` for one piece (not reversible)."""
    return zlib.crc32(piece.encode("utf-8", "surrogatepass")) % VOCABULARY


def words(seed: bytes, amount: int) -> str:
    """``amount`` words, a pure function of the seed; a longer text of one seed starts with the shorter one."""
    return " ".join([WORDS[byte] for byte in shake_128(seed).digest(amount)])
