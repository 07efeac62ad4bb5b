"""Linear layers while sampling on a CPU: x W^T as the layer has it, beside the same with weights
packed beforehand by oneDNN and by MKL (coati/models/generation/prepacked_linear.py), of which coati
takes what is fastest on the machine.

Each token that is sampled multiplies every weight with one row for each living answer. The ways are
timed in turns, on the vocabulary's layer and a smaller one; *packing* is done once for all tokens
of a batch. *int8* is what 8-bit weights would take, the rows quantized at each call; coati does not
sample with them.

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


def int8(weight):
    """The product with ``weight`` in int8, one scale for each output: input -> output."""
    import torch

    scales = weight.abs().amax(dim=1).double() / 127
    zeros = torch.zeros(len(weight), dtype=torch.long)
    quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    # Without reduced range, products of pairs of 8 bits may overflow their 16 (AVX2).
    return partial(torch.ops.quantized.linear_dynamic, W_prepack=packed, reduce_range=True)


def main() -> None:
    args = parse()
    import torch
    from torch.nn import functional as F

    from coati.models.generation.layout_choice import processor
    from coati.models.generation.prepacked_linear import LAYOUTS
    from coati.parallel.compat.cpu.malloc import keep_freed_memory

    keep_freed_memory()
    layouts = {name: each for name, each in LAYOUTS.items() if each.available()}

    def seconds(way) -> float:
        started = time.perf_counter()
        way()
        return time.perf_counter() - started

    print(
        f"{processor()}, {torch.get_num_threads()} threads, fp32; milliseconds, medians of "
        f"{args.turns}"
    )
    columns = ["layer", *layouts, "int8", *(f"packing {name}" for name in layouts)]
    print(f"{'out x in':>14} {'rows':>5} " + " ".join(f"{name:>14}" for name in columns))
    for shape in args.shape:
        weight = torch.randn(*map(int, shape.split("x")))
        for rows in args.rows:
            x = torch.randn(rows, weight.shape[1])
            ways = {"layer": partial(F.linear, x, weight), "int8": partial(int8(weight), x)}
            for name, layout in layouts.items():
                packed = layout.pack(weight, rows)
                ways[name] = partial(layout.product, x, packed, weight, None, rows)
                ways[f"packing {name}"] = partial(layout.pack, weight, rows)
            times: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(args.turns + 2):
                for name, way in ways.items():
                    took = seconds(way)
                    if turn >= 2:
                        times[name].append(took)
            found = " ".join(f"{1e3 * median(times[name]):>14.2f}" for name in columns)
            print(f"{shape:>14} {rows:>5} {found}", flush=True)


if __name__ == "__main__":
    main()
