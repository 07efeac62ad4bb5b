"""The time of a token beside its floor: the weights read once from memory, or their arithmetic,
whichever takes longer, at the bandwidth and matrix rate that this machine shows.

    python benchmarks/decode_floor.py [--model DIR] [--rows 1 8 16 32] [--tokens 40]
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine_rates import MachineRates, bandwidth  # noqa: E402
from benchmarks.work_floors import FP32, Work  # noqa: E402

PROMPT = 100  # tokens; those that are timed come after it
SAMPLES = 10  # of the machine's rates


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model directory instead of random weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=40)
    return parser.parse_args()


def token_seconds(model, rows: int, tokens: int, sampled: bool) -> float:
    """Seconds of a token of each of ``rows`` rows, the median of ``tokens``; log-probs returned."""
    import torch

    from coati.models.generation.decoder import Decoder
    from coati.models.generation.prepacked_linear import Prepacked
    from coati.models.generation.row_noise import row_noise
    from coati.models.generation.sampling import Sampling

    torch.manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (rows, PROMPT))
    decoder = Decoder(
        model,
        ids,
        torch.ones_like(ids),
        Sampling(sampled),
        [[stop] for stop in range(1000, 2000)],
        noise=row_noise(0, 0, range(rows), tokens + 8),
        return_logprobs=True,
        max_columns=PROMPT + tokens + 8,
    )
    times = []
    with torch.no_grad(), Prepacked(model) as prepacked:
        decoder.prepacked = prepacked
        decoder.step()
        for _ in range(tokens + 4):
            prepacked.use(rows)
            started = time.perf_counter()
            decoder.step()
            times.append(time.perf_counter() - started)
    return median(times[4:])


def main() -> None:
    args = parse()
    import torch

    from benchmarks.rollout_ways import make_model
    from coati.models.generation.layout_choice import processor
    from coati.parallel.compat.cpu.malloc import keep_freed_memory

    keep_freed_memory()
    model = make_model(args.model).eval()
    weights = sum(
        each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Linear)
    )
    rates = MachineRates()
    for _ in range(SAMPLES):
        rates.measure()
    byte_rate = bandwidth(rates.medians())
    flop_rate = rates.medians()["matmul"]
    print(
        f"{processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}: "
        f"{byte_rate / 1e9:.0f} GB/s read, {flop_rate / 1e9:.0f} GFLOP/s fp32; "
        f"{weights / 1e6:.1f} million weights multiplied for a token"
    )
    print(
        f"{'rows':>5} {'floor':>8} {'':>10} {'greedy':>8} {'share':>6} {'sampled':>8} {'share':>6}"
    )
    for rows in args.rows:
        work = Work(2.0 * rows * weights, float(FP32 * weights))
        floor = work.seconds(flop_rate, byte_rate)
        kind = "arithmetic" if floor == work.flops / flop_rate else "memory"
        times = [token_seconds(model, rows, args.tokens, sampled) for sampled in (False, True)]
        found = " ".join(f"{1e3 * s:>8.2f} {floor / s:>6.0%}" for s in times)
        print(f"{rows:>5} {1e3 * floor:>8.2f} {kind:>10} {found}  ms", flush=True)


if __name__ == "__main__":
    main()
