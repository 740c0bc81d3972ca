"""The blocks of the paged KV cache: which are free, which belong to a request (Kwon et al. 2023, arXiv:2309.06180)."""

from collections.abc import Iterable, MutableSequence

from llmopt.errors import LlmoptError


class BlockPool:
    """Hands out block numbers 0 .. total - 1, each holding the keys and values of `block_size` tokens.

    The block freed last is handed out first, since its memory is the likeliest to be in a cache.
    """

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._free = list(reversed(range(total)))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def grow(self, table: MutableSequence[int], tokens: int) -> bool:
        """Extend a block table until it holds that many tokens; False, and nothing taken, where too few are free."""
        missing = self.blocks_for(tokens) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            table.append(self._free.pop())
        return True

    def release(self, table: MutableSequence[int]) -> None:
        """Take all blocks of a table back; the table is empty afterwards."""
        self._free.extend(reversed(table))
        del table[:]

    def check(self, tables: Iterable[MutableSequence[int]]) -> None:
        """Raise LlmoptError unless every block is either free or in exactly one of these tables."""
        held = [block for table in tables for block in table]
        if sorted(held + self._free) != list(range(self.total)):
            raise LlmoptError(
                f"the block pool has lost its books: {len(held)} held + {self.free} free of {self.total} blocks"
            )
