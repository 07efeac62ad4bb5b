"""The least time that a step or a token can take on a machine, by arithmetic and by memory traffic;
what is counted is the mathematics of the work, not what an implementation does."""

from typing import Any, NamedTuple

from benchmarks import online_case, sft_case

FP32 = 4
# AdamW reads weight, gradient and both moments, and writes all but the gradient.
OPTIMIZER_PASSES = 7


class Work(NamedTuple):
    """Floating-point operations, and bytes that have to pass between memory and processor."""

    flops: float
    bytes: float

    def seconds(self, flop_rate: float, byte_rate: float) -> float:
        """The larger of both times: one can hide behind the other."""
        return max(self.flops / flop_rate, self.bytes / byte_rate)


def parameters(model: dict) -> int:
    """Numbers of all matrices; the vocabulary once where it is tied."""
    vocabulary = model["hidden_size"] * model["vocab_size"]
    return sft_case.block_weights(model) + vocabulary * (1 + (not model["tie_word_embeddings"]))


def step_bytes(model: dict, passes: int = 1) -> float:
    """Of a training step: the weights read forward and backward, their gradients written, and the
    optimizer. Activations are left out: they may stay in a cache."""
    return float(FP32 * parameters(model) * (3 * passes + OPTIMIZER_PASSES))


def sft(model: dict, lengths: list[int], supervised: int) -> Work:
    return Work(sft_case.flops(lengths, supervised, model), step_bytes(model))


def pairs_flops(model: dict, pairs: list[dict], *, head: bool, shared: bool) -> float:
    """Forward and backward over both sides of ``pairs``. ``shared``: the prompt of a pair counts
    once, and the answers attend to it. ``head``: the vocabulary is multiplied at the answers."""
    lengths = []
    answers = 0
    spared = 0.0
    for pair in pairs:
        prompt = len(pair["prompt_ids"])
        sides = [len(pair[f"{side}_ids"]) for side in ("chosen", "rejected")]
        lengths += [prompt + side for side in sides]
        answers += sum(sides)
        spared += sft_case.flops([prompt], 0, model)
    whole = sft_case.flops(lengths, answers if head else 0, model)
    return whole - spared if shared else whole


def pairs(model: dict, rows: list[dict], algorithm: str, shared: bool) -> Work:
    """A step of DPO (the reference's forward pass included) or of a reward model."""
    dpo = algorithm == "dpo"
    once = pairs_flops(model, rows, head=dpo, shared=shared)
    reference = FP32 * parameters(model)
    return Work(once * (4 / 3 if dpo else 1), step_bytes(model) + (reference if dpo else 0))


def token(model: dict, rows: int, context: float) -> Work:
    """One new token of each of ``rows`` rows whose key-value caches hold ``context`` tokens:
    every weight and the caches are read once."""
    hidden = model["hidden_size"]
    layers = model["num_hidden_layers"]
    kv = hidden * model["num_key_value_heads"] // model["num_attention_heads"]
    weights = sft_case.block_weights(model) + hidden * model["vocab_size"]
    cached = 2 * layers * kv * context * rows
    return Work(
        rows * (2.0 * weights + 4.0 * layers * hidden * context), FP32 * float(weights + cached)
    )


def episode(
    algorithm: str, size: online_case.Size, prompts: list[int], model: dict
) -> dict[str, list[Work]]:
    """Work of the phases of an episode, in pieces that come one after the other: every new token
    waits for the one before it."""
    flops = online_case.phase_flops(algorithm, size, prompts, model)
    mean = sum(prompts) / len(prompts)
    tokens = [token(model, size.answers, mean + index) for index in range(1, size.new)]
    # What is no token's is the prompts' pass, whose last position gives the first token.
    rest = flops["rollout"] - sum(each.flops for each in tokens)
    read = float(FP32 * parameters(model))
    updates = 2 if algorithm == "ppo" else 1
    update = Work(flops["update"], size.passes * updates * step_bytes(model))
    scoring = {"scoring": [Work(flops["scoring"], 3 * read)]} if flops["scoring"] else {}
    return {"rollout": [Work(rest, read), *tokens], **scoring, "update": [update]}


def seconds(pieces: list[Work], flop_rate: float, byte_rate: float) -> float:
    return sum(piece.seconds(flop_rate, byte_rate) for piece in pieces)


def as_json(work: list[Work], flop_rate: float, byte_rate: float) -> dict[str, Any]:
    return {
        "gflop": sum(each.flops for each in work) / 1e9,
        "gbyte": sum(each.bytes for each in work) / 1e9,
        "arithmetic_seconds": sum(each.flops for each in work) / flop_rate,
        "memory_seconds": sum(each.bytes for each in work) / byte_rate,
        "seconds": seconds(work, flop_rate, byte_rate),
    }
