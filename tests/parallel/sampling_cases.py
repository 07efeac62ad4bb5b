"""What the ranks of test_sampling.py do: sample with a boosted model, and look at every logit it
was sampled from."""

from typing import Any

import torch

from tests.parallel.engine_cases import Case, _engine, _join, build_model, with_adapters

ROWS, STEPS, TEMPERATURE = 6, 14, 1.3
PROMPTS = [
    [5, 117, 200, 42, 9, 11],
    [57, 58],
    [101, 202, 203, 150],
    [77],
    [61, 62, 63, 64, 65, 66, 67],
    [57, 58],
]
STOPS = [[token] for token in range(40)] + [
    [50, 51],
    *([token, token + 1] for token in range(60, 90)),
]


def request(rows: list[int]) -> dict[str, Any]:
    """The prompts of ``rows`` of the global batch, padded on the left, and the rows' noise."""
    from coati.models.generation.response_table import left_pad
    from coati.models.generation.row_noise import row_noise

    ids, mask = left_pad([PROMPTS[row] for row in rows], pad=2)
    return {"input_ids": ids, "attention_mask": mask, "noise": row_noise(3, 1, rows, STEPS)}


SETTINGS = {
    "stop_sequences": STOPS,
    "max_new_tokens": STEPS,
    "pad_token_id": 2,
    "return_logprobs": True,
}


class Watch:
    """What the model is fed, and the logits that tokens are chosen from, by (row of this rank,
    step)."""

    def __init__(self, decoders: type, embedding) -> None:
        self.widths: list[int] = []
        self.logits: dict[tuple[int, int], torch.Tensor] = {}
        self.decoders, self.original = decoders, decoders._sample

        def choose(decoder, logits):
            rows = zip(
                decoder.row_ids.tolist(), decoder.num_generated.tolist(), logits, strict=True
            )
            for row, step, values in rows:
                self.logits[row, step] = values.clone()
            return self.original(decoder, logits)

        decoders._sample = choose
        self.hook = embedding.register_forward_pre_hook(
            lambda _, args: self.widths.append(args[0].shape[1])
        )

    def end(self) -> None:
        self.decoders._sample = self.original
        self.hook.remove()


def sample_all(cases: list[Case]) -> list[dict[str, Any]]:
    _join()
    return [_sample(case) for case in cases]


def _sample(case: Case) -> dict[str, Any]:
    from coati.models.generation.decoder import Decoder
    from coati.models.generation.loop import Sampling
    from coati.parallel.sharded_generation import sample

    model = build_model(case)
    engine = _engine(case, with_adapters(model, case) if case.lora else model)
    rows = list(range(engine.mesh.dp_rank, ROWS, engine.mesh.dp_size))
    watch = Watch(Decoder, engine.module.get_input_embeddings())
    found = sample(engine, **request(rows), sampling=Sampling(temperature=TEMPERATURE), **SETTINGS)
    watch.end()
    answers = found.responses()
    batch = _whole(rows, answers)
    with torch.no_grad():
        engine.model.eval()
        full = engine.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
    full = full.logits.as_subclass(torch.Tensor).float()
    starts = [len(PROMPTS[row]) - 1 for row in rows]
    pairs = [
        (values, full[row, starts[row] + step]) for (row, step), values in watch.logits.items()
    ]
    return {
        "rows": rows,
        "answers": answers,
        "logprobs": [
            values[: len(a)].tolist() for values, a in zip(found.logprobs, answers, strict=True)
        ],
        "widths": watch.widths,
        "seen": len(watch.logits),
        "logits_differ": max(float((one - other).abs().max()) for one, other in pairs),
        "logits_size": float(full.abs().max()),
        "update_logprobs": _logprobs(engine, batch),
    }


def _whole(rows: list[int], answers: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts and answers, padded on the right; the answers are supervised."""
    whole = [PROMPTS[row] + answer for row, answer in zip(rows, answers, strict=True)]
    width = max(map(len, whole))
    ids = torch.tensor([row + [7] * (width - len(row)) for row in whole])
    mask = (torch.arange(width) < torch.tensor([[len(row)] for row in whole])).long()
    prompts = torch.tensor([[len(PROMPTS[row])] for row in rows])
    labels = ids.masked_fill((mask == 0) | (torch.arange(width) < prompts), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _logprobs(engine, batch: dict[str, torch.Tensor]) -> list[float]:
    """As an update reads them: the vocabulary head's, row by row."""
    engine.temperature = TEMPERATURE
    return engine.forward_only(batch, lambda logps, _: logps).tolist()
