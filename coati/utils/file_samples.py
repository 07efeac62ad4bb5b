"""What is in a file, in bounded time: its size, its ends and blocks between them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

SAMPLED_BYTES = 2**16
SAMPLES = 16


def sampled_blocks(file: Path) -> Iterator[bytes]:
    """SAMPLES + 1 blocks of ``file`` at even distances; all of one of up to 1 MiB."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        for part in range(SAMPLES + 1):
            stream.seek(max(0, (size - SAMPLED_BYTES) * part // SAMPLES))
            yield stream.read(SAMPLED_BYTES)


def sampled_hash(file: Path) -> str:
    """Of the size and the :func:`sampled_blocks` of ``file``."""
    digest = hashlib.sha256(f"{file.stat().st_size}\n".encode())
    for block in sampled_blocks(file):
        digest.update(block)
    return digest.hexdigest()[:12]
