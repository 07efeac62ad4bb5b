"""The vocabulary head while sampling on a CPU: x W^T, as a linear layer has it, beside (W x^T)^T, which coati takes for
4 to 31 rows.

Each token that is sampled multiplies the head's V x H weights with one row for each living answer. Matrix libraries are
made for larger products, and one of the two ways can take twice the time of the other. Both are timed in turns; freed
memory stays with the process, as in training.

    python benchmarks/bench_head_rows.py [--rows 1 2 4 8 16 32 64] [--shape 49152x576] [--turns 20]
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--shape", nargs="+", default=["49152x384", "49152x576"], metavar="VxH")
    parser.add_argument("--turns", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    args = parse()
    import torch
    from torch.nn import functional as F

    from coati.parallel.cpu.heap import keep_freed_memory

    keep_freed_memory()

    def transposed(x, weight):
        return (weight @ x.t()).t().contiguous()

    def seconds(way) -> float:
        started = time.perf_counter()
        way()
        return time.perf_counter() - started

    print(f"{torch.get_num_threads()} threads, fp32; milliseconds of one product, medians of {args.turns}")
    print(f"{'V x H':>14} {'rows':>5} {'x W^T':>8} {'(W x^T)^T':>10} {'ratio':>6}")
    for shape in args.shape:
        vocabulary, hidden = map(int, shape.split("x"))
        weight = torch.randn(vocabulary, hidden)
        for rows in args.rows:
            x = torch.randn(rows, hidden)
            ways = partial(F.linear, x, weight), partial(transposed, x, weight)
            times = [tuple(map(seconds, ways)) for _ in range(args.turns + 2)][2:]
            usual, other = (1e3 * median(column) for column in zip(*times, strict=True))
            print(f"{shape:>14} {rows:>5} {usual:>8.1f} {other:>10.1f} {usual / other:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
