"""Several ranks in one process: a thread each, and a sum over them for what takes its collective as
an argument."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from torch import Tensor


def on_ranks(work: Callable, parts: list) -> list:
    """``work(part, reduce_sum)`` of every part at once; fails when the ranks do not call
    ``reduce_sum`` equally often."""
    barrier = Barrier(len(parts), timeout=30)
    box: list[Tensor | None] = [None] * len(parts)

    def rank(number: int):
        def reduce_sum(mine: Tensor) -> Tensor:
            box[number] = mine.clone()
            barrier.wait()
            total = sum(box[1:], start=box[0])
            barrier.wait()  # nobody overwrites what another still reads
            return total

        try:
            result = work(parts[number], reduce_sum)
            barrier.wait()  # a rank that is asked for one more sum than this one breaks here
            return result
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(rank, range(len(parts))))
