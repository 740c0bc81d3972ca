"""By which key a block of the KV cache is found again."""

import secrets
from array import array
from hashlib import blake2b

from llmopt.engine.request import Request

KEY_BYTES = 16


class BlockKeys:
    """Keys of full blocks. Each is a hash of the block's tokens and of the key before it, so that requests with the
    same key have the same tokens from their beginning to the end of that block.

    The hash is keyed with a secret that each process draws anew (BLAKE2, RFC 7693), so that nobody can make two texts
    that have the same key and thereby read or spoil what others computed. Who must not even learn, from the time to a
    first token, that somebody has sent the same text gives a salt: only requests with the same salt share blocks.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._secret = secrets.token_bytes(32)

    def catch_up(self, request: Request) -> None:
        """Give a request the keys of all full blocks of its known tokens that it has none for yet."""
        size, keys = self.block_size, request.keys
        for place in range(len(keys), request.known // size):
            before = keys[-1] if keys else self._beginning(request.cache_salt)
            tokens = array("i", request.tokens[place * size : (place + 1) * size]).tobytes()
            keys.append(self._hash(before + tokens, b"block"))

    def _beginning(self, salt: str | None) -> bytes:
        """What stands in the place of a key before the first block."""
        return bytes(KEY_BYTES) if salt is None else self._hash(salt.encode(), b"salt")

    def _hash(self, data: bytes, kind: bytes) -> bytes:
        return blake2b(data, digest_size=KEY_BYTES, key=self._secret, person=kind).digest()
