"""Linear layers while sampling on a CPU: x W^T as the layer has it, beside the same with weights
arranged beforehand, as coati does for 3 to 128 rows (coati/models/generation/mkl_prepack.py).

Each token that is sampled multiplies every weight with one row for each living answer. Both ways
are timed in turns, on the vocabulary's layer and a smaller one; *arranging* is done once for all
tokens of a batch.

    python benchmarks/bench_prepack.py [--rows 1 2 4 8 16 32 64] [--shape 49152x576 1536x576]
    [--turns 20]
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument(
        "--shape", nargs="+", default=["49152x384", "49152x576", "1536x576"], metavar="OUTxIN"
    )
    parser.add_argument("--turns", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    args = parse()
    import torch
    from torch.nn import functional as F

    from coati.models.generation.mkl_prepack import available
    from coati.parallel.compat.cpu.malloc import keep_freed_memory

    if not available():
        raise SystemExit(
            "this PyTorch comes without MKL: coati arranges nothing with it, there is nothing to "
            "compare"
        )
    keep_freed_memory()
    arrange = torch.ops.mkl._mkl_reorder_linear_weight
    product = torch.ops.mkl._mkl_linear

    def seconds(way) -> float:
        started = time.perf_counter()
        way()
        return time.perf_counter() - started

    print(f"{torch.get_num_threads()} threads, fp32; milliseconds, medians of {args.turns}")
    print(
        f"{'out x in':>14} {'rows':>5} {'layer':>8} {'arranged':>9} {'ratio':>6} {'arranging':>10}"
    )
    for shape in args.shape:
        weight = torch.randn(*map(int, shape.split("x")))
        for rows in args.rows:
            x = torch.randn(rows, weight.shape[1])
            packed = arrange(weight, rows)
            ways = (
                partial(F.linear, x, weight),
                partial(product, x, packed, weight, None, rows),
                partial(arrange, weight, rows),
            )
            times = [tuple(map(seconds, ways)) for _ in range(args.turns + 2)][2:]
            usual, other, once = (1e3 * median(column) for column in zip(*times, strict=True))
            print(
                f"{shape:>14} {rows:>5} {usual:>8.2f} {other:>9.2f} {usual / other:>6.2f} "
                f"{once:>10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
