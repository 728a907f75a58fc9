"""Seeds of random streams."""

import hashlib

__all__ = ["stream"]


def stream(*key: str | int) -> int:
    """Return the seed of a random stream, such as ("order", seed, epoch): different for different keys."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
