"""Seeds as pure functions of what they are for, so that nothing random needs saving."""

import hashlib


def derive(seed: int, *what: object) -> int:
    """A 31-bit seed; unrelated for different arguments."""
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
