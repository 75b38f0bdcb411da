"""The prefix cache model: chained hashes of prompt blocks, least recently used ones forgotten."""

from collections import OrderedDict
from collections.abc import Sequence

from .tokens import CHARS_PER_TOKEN


class PrefixCache:
    """Which prompt blocks the pretended device still holds."""

    def __init__(self, block_tokens: int, capacity: int) -> None:
        self.block_tokens = block_tokens
        self.capacity = capacity
        self.queries = 0
        self.hits = 0
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def visit(self, units: str | Sequence[int], tokens: int, salt: str) -> int:
        """Prompt tokens found in the cache; all full blocks of the prompt are held from now on.

        ``units`` is the prompt text or its token ids. The last token is always computed, as in vLLM.
        """
        stride = self.block_tokens * (CHARS_PER_TOKEN if isinstance(units, str) else 1)
        chain = hash(salt)
        found = 0
        unbroken = True
        for start in range(0, len(units) - stride + 1, stride):
            block = units[start : start + stride]
            chain = hash((chain, block if isinstance(block, str) else tuple(block)))
            if chain in self._blocks:
                self._blocks.move_to_end(chain)
                found += unbroken
            else:
                unbroken = False
                self._blocks[chain] = None
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)
        cached = min(found, max(0, tokens - 1) // self.block_tokens) * self.block_tokens
        self.queries += tokens
        self.hits += cached
        return cached

    def clear(self) -> None:
        """Forget blocks and counts."""
        self._blocks.clear()
        self.queries = self.hits = 0
