"""What the weights of a base take that adapters are trained on: whole, in 8 and in 4 bits, each
loaded in a fresh process, for a model of SmolLM2-135M's shape with random weights, whose tied
embedding is a fifth of it.

  held   resident memory of the process after loading, less what it had before
  peak   the highest on the way (VmHWM), likewise

    python benchmarks/bench_quantized_base.py [--stored bfloat16] [--output FILE]

Exit code 1 where 4 bits take more than 0.35 of the whole weights in fp32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bench_memory import GIVE_BACK, MODELS, Case, resident, write_model  # noqa: E402

SHAPE = "135M llama"
MOST = 0.35
KINDS = ("fp32", "int8", "nf4")


def worker(folder: Path, kind: str) -> None:
    """Print held and peak bytes."""
    from coati.models.loading import load_causal_lm
    from coati.parallel.compat.cpu.malloc import align_weights
    from tests.tiny import tiny_llama

    quantize = None if kind == "fp32" else kind
    with tempfile.TemporaryDirectory() as tiny:  # what loading any model imports
        tiny_llama().save_pretrained(tiny)
        load_causal_lm(tiny, dtype="fp32", quantize_base=quantize)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = load_causal_lm(folder, dtype="fp32", quantize_base=quantize)
    align_weights(model)
    for parameter in model.parameters():  # a mapped file is resident where it has been read
        parameter.data = parameter.data.clone()
    print(json.dumps({"held": resident("VmRSS") - before, "peak": resident("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stored", default="float32", help="type of the weights in the file")
    parser.add_argument("--output", help="write the figures as JSON")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.folder, args.worker)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, Case("sft", SHAPE, 1, 1, stored=args.stored))
        for kind in KINDS:
            call = [sys.executable, __file__, "--worker", kind, "--folder", str(folder)]
            run = subprocess.run(call, env=os.environ | GIVE_BACK, capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr)
            figures[kind] = json.loads(run.stdout.splitlines()[-1])
    print(f"{SHAPE}, vocabulary {MODELS[SHAPE]['vocab_size']}, stored in {args.stored}")
    print("| base | held MiB | of fp32 | peak MiB |\n| --- | --- | --- | --- |")
    for kind, found in figures.items():
        found["ratio"] = round(found["held"] / figures["fp32"]["held"], 3)
        print(
            f"| {kind} | {found['held'] / 2**20:.0f} | {found['ratio']:.3f} | "
            f"{found['peak'] / 2**20:.0f} |"
        )
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if figures["nf4"]["ratio"] > MOST:
        sys.exit(f"nf4 takes more than {MOST} of the weights in fp32")


if __name__ == "__main__":
    main()
