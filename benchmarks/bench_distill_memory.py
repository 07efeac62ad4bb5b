"""Peak memory of one forward + backward of the heads in distillation, beside full logits of both
models.

S 1024 positions, vocabulary 151,936 (Qwen2's), a teacher of twice the student's width, fp32, on a
CPU, the generalized Jensen-Shannon divergence at beta 0.5. What is printed, by PyTorch's own record
of every allocation and release (as in bench_head_memory.py):

  both logits   the bytes of the two (S, V) matrices, without anything made of them
  full logits   the peak of the textbook way: both matrices, their log-softmaxes, the mixture
  head          the peak of the library's head, which works on a chunk of positions at a time

The last two include the gradient of the student's vocabulary weight, which no way of computing it
avoids; beside it stands a frozen head, as under LoRA, without that gradient.

    python benchmarks/bench_distill_memory.py [--hidden 256 512] [--output results.json]
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.bench_head_memory import allocator_peak, case  # noqa: E402
from coati.models.distillation import WholeTeacher  # noqa: E402
from coati.models.head import Head, HeadRequest  # noqa: E402

POSITIONS = 1024
VOCABULARY = 151_936
BETA = 0.5


def teacher(hidden: int, positions: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(hidden states (S, 2 H), weight (V, 2 H)) of the teacher."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(positions, 2 * hidden, generator=generator)
    return states, torch.randn(vocabulary, 2 * hidden, generator=generator) / hidden


def full_logits(model: nn.Module, states: Tensor, labels: Tensor, wise: tuple) -> None:
    """The textbook way, by autograd."""
    with torch.no_grad():
        log_p = F.linear(*wise).log_softmax(-1)
    log_q = model(states)[0, :-1].log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log1p(-BETA))
    of_teacher = F.kl_div(log_m, log_p, reduction="sum", log_target=True)
    of_student = F.kl_div(log_m, log_q, reduction="sum", log_target=True)
    ((BETA * of_teacher + (1 - BETA) * of_student) / len(log_q)).backward()


def head(model: nn.Module, states: Tensor, labels: Tensor, wise: tuple) -> None:
    """The library's way."""
    hidden, weight = wise
    switch = Head.install(model)
    asked = WholeTeacher(hidden, lambda rows: F.linear(rows, weight), BETA)
    switch.set(labels, request=HeadRequest(teacher=asked))
    model(states)
    divergence = switch.take().divergence
    (divergence.sum() / divergence.numel()).backward()


WAYS: dict[str, Callable[[nn.Module, Tensor, Tensor, tuple], None]] = {
    "full_logits": full_logits,
    "head": head,
}


def compare(
    hidden: int, frozen: bool, positions: int = POSITIONS, vocabulary: int = VOCABULARY
) -> dict[str, float]:
    """Bytes of the peaks and of both logits, and the largest difference of a gradient, relative to
    the largest entry."""
    model, states, labels = case(hidden, positions, vocabulary, frozen)
    wise = teacher(hidden, positions, vocabulary)
    figures: dict[str, float] = {"both_logits": 2 * 4 * positions * vocabulary}
    gradients = []
    for name, way in WAYS.items():
        states.grad = model.lm_head.weight.grad = None
        figures[name] = allocator_peak(lambda way=way: way(model, states, labels, wise))
        gradients.append([states.grad, *([] if frozen else [model.lm_head.weight.grad])])
    figures["gradient_difference"] = max(
        float((one - other).abs().max() / one.abs().max())
        for one, other in zip(*gradients, strict=True)
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--output", help="write the figures as JSON")
    args = parser.parse_args()
    results = []
    print(f"forward + backward of the heads, S {POSITIONS}, vocabulary {VOCABULARY}, fp32; MiB")
    for hidden in args.hidden:
        for frozen in (False, True):
            found = compare(hidden, frozen)
            results.append({"hidden": hidden, "frozen": frozen, **found})
            peaks = "  ".join(
                f"{name} {found[name] / 2**20:.0f}" for name in ("both_logits", *WAYS)
            )
            shares = [found["head"] / found[name] for name in ("both_logits", "full_logits")]
            print(
                f"student {hidden}, head {'frozen' if frozen else 'trained'}: {peaks}; the head is "
                f"{shares[0]:.0%} of both logits, {shares[1]:.0%} of the textbook way; gradients "
                f"differ by {found['gradient_difference']:.1e}"
            )
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
