"""How Gemini packs parameters into chunks, of which the last places stay empty."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

MEBI = 2**20
SMALLEST = 32 * MEBI  # elements, gemini_plugin.py: min_chunk_size_m
RANGE = 32  # MEBI elements above the smallest size, gemini_plugin.py: search_range_m


@dataclass
class Chunk:
    """Elements of a chunk, and how many of them parameters use, from the first on."""

    size: int
    used: int

    def used_by_first(self, processes: int) -> int:
        """Of the equal parts of ``processes``, elements that are used of the first one: the process
        that has the most."""
        return min(self.used, -(-self.size // processes))


def chunks(sizes: Sequence[int]) -> list[Chunk]:
    """The chunks for parameters of ``sizes`` elements: parameters in their order, each whole; one
    that is larger than a chunk has its own.

    The size is that of the least waste, as ColossalAI searches it
    (zero/gemini/chunk/search_utils.py:106, there in steps of 1024 elements), without those that are
    larger than the mean by three standard deviations.
    """
    if sum(sizes) < SMALLEST:
        return [Chunk(sum(sizes), sum(sizes))]
    limit = fmean(sizes) + 3 * pstdev(sizes)
    common = [size for size in sizes if size <= limit]
    start = max(SMALLEST, *common)
    size = min((start + step * MEBI for step in range(RANGE + 1)), key=lambda c: _unused(common, c))
    packed: list[Chunk] = []
    open_chunk = Chunk(0, 0)
    for each in sizes:
        if each > size:
            packed.append(Chunk(each, each))
            continue
        if each > open_chunk.size - open_chunk.used:
            open_chunk = Chunk(size, 0)
            packed.append(open_chunk)
        open_chunk.used += each
    return packed


def _unused(sizes: Sequence[int], chunk: int) -> int:
    unused = left = 0
    for size in sizes:
        if size > left:
            unused += left
            left = chunk
        left -= size
    return unused + left
