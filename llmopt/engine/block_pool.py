"""The blocks of the paged KV cache: which are free, which are held, and which are kept because they may be wanted again
(Kwon et al. 2023, arXiv:2309.06180)."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, MutableSequence, Sequence

from llmopt.errors import LlmoptError


class BlockPool:
    """Hands out block numbers 0 .. total - 1, each holding the keys and values of `block_size` tokens.

    A block is *used* while tables hold it, one or several. Once none does, it is *cached* if it has a key, which says
    what is in it (see `BlockKeys`), until its place is needed; else it is *free*. So free + used + cached = total.

    Blocks are shared only when they are full, and a full block is never written again: no copy is ever needed.
    """

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._free = list(
            reversed(range(total))
        )  # the last is handed out first: its memory is the likeliest in a cache
        self._cached: OrderedDict[int, None] = OrderedDict()  # the first has gone unused longest
        self._holders = [0] * total
        self._keys: list[bytes | None] = [None] * total
        self._places: dict[bytes, int] = {}  # which block has a key

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.total - len(self._free) - len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks, used or cached, that have these keys, as far as one follows the other."""
        found = []
        for key in keys:
            block = self._places.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def grow(self, table: MutableSequence[int], tokens: int, found: Sequence[int] = (), spare: int = 0) -> bool:
        """Extend a block table, by the blocks found first and then by empty ones, until it holds that many tokens.

        False, and nothing taken, where that would not leave `spare` blocks free or cached.
        """
        missing = self.blocks_for(tokens) - len(table) - len(found)
        unused = sum(not self._holders[block] for block in found)
        if missing + unused + spare > len(self._free) + len(self._cached):
            return False
        for block in found:
            self._cached.pop(block, None)
            self._holders[block] += 1
            table.append(block)
        for _ in range(missing):
            table.append(self._take())
        return True

    def name(self, block: int, key: bytes) -> None:
        """Let a block that is full be found by its key; where another has that key already, this one stays unnamed."""
        if self._places.setdefault(key, block) == block:
            self._keys[block] = key

    def release(self, table: MutableSequence[int], keep: int = 0) -> None:
        """Give up a table's blocks, the last of them first, so that a beginning outlives what follows it.

        The table has its first `keep` blocks afterwards, or as many as it had.
        """
        for block in reversed(table[keep:]):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None
        del table[keep:]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise LlmoptError unless every block is free, cached, or held by as many of these tables as it counts."""
        held = Counter(block for table in tables for block in table)
        books = sorted([*self._free, *self._cached, *held]) == list(range(self.total))
        counts = all(self._holders[block] == held[block] for block in range(self.total))
        names = {key: block for block, key in enumerate(self._keys) if key is not None} == self._places
        kept = all(self._keys[block] is not None for block in self._cached)
        if not (books and counts and names and kept and not any(self._keys[block] for block in self._free)):
            raise LlmoptError(
                f"the block pool has lost its books: {len(held)} held + {self.cached} cached + {self.free} free of "
                f"{self.total} blocks"
            )

    def _take(self) -> int:
        """An empty block: a free one, or in its place the cached one that has gone unused longest."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key, self._keys[block] = self._keys[block], None
            if key is not None:
                del self._places[key]
        self._holders[block] = 1
        return block
