"""From the flags of coati evaluate to its measures."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coati.cli.program_settings import EvaluateSettings
from coati.inference.evaluate.answer_measures import (
    answer_measures,
    majority_measure,
    rights,
    score_measure,
    unique_keys,
)
from coati.inference.evaluate.document_loss import loss_rows, row_loss
from coati.inference.evaluate.generate_responses import Prompt, skipped_summary
from coati.inference.evaluate.lm_eval_tasks import task_measures
from coati.inference.evaluate.measure_table import Measure, perplexity_measure
from coati.inference.evaluate.result_files import read_results
from coati.inference.model_loading import Loaded
from coati.inference.samples.sample_journal import prompt_key
from coati.inference.samples.score_samples import Scored
from coati.models.positions import within_positions
from coati.recipes import drawn_responses as drawing
from coati.recipes.judging import named
from coati.utils.phases import phase

PROGRAM = "coati evaluate"
# Settings in which a model and its baseline differ by what they are.
OF_MODEL = ("model", "api_url", "api_model", "served", "files")


def baseline_of(path: str | None) -> tuple[dict[str, Any], list[Measure]]:
    """What another evaluation wrote, and its measures; nothing for None."""
    return ({}, []) if path is None else named("--baseline", read_results, path)


def other_settings(baseline: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """By what an evaluation differs from its baseline besides the model: "stride 8 where it is 16
    here"."""
    for part in ("responses", "perplexity"):
        before = baseline.get(part)
        now = here.get(part)
        if not isinstance(before, Mapping) or not isinstance(now, Mapping):
            continue
        for name in [name for name in now if name in before and name not in OF_MODEL]:
            if before[name] != now[name]:
                yield f"{part}: {name} {before[name]} where it is {now[name]} here"


def measured(args: EvaluateSettings) -> tuple[list[Measure], dict[str, Any]]:
    """All measures that ``args`` ask for, in their order, and what else the results are to say."""
    engine = args.sampler
    here = not (engine.api_url or engine.rollout_url or engine.rollout_engine == "vllm")
    # Values choose responses; all else is the policy's.
    loading = engine if args.input else replace(engine, beta_gen=0.0)
    loaded = drawing.load_model(loading) if here else None
    found: list[Measure] = []
    about: dict[str, Any] = {}
    if args.input:
        measures, settings = _of_prompts(args, loaded)
        found += measures
        about["responses"] = settings
    if args.perplexity and loaded is not None:
        found.append(_perplexity(args, loaded))
        about["perplexity"] = {
            "files": args.perplexity,
            "max_length": args.responses.max_length,
            "stride": args.stride,
        }
    if args.lm_eval and loaded is not None:
        measures, about["lm_eval"] = task_measures(
            loaded,
            args.lm_eval,
            folder=args.lm_eval_path,
            limit=args.lm_eval_limit,
            few_shot=args.few_shot,
            chat=args.lm_eval_chat,
            batch_size=args.responses.batch_size,
            max_length=within_positions(loaded.model.config, args.responses.max_length),
            seed=args.responses.seed,
        )
        found += measures
    return found, about


def _of_prompts(
    args: EvaluateSettings, loaded: Loaded | None
) -> tuple[list[Measure], dict[str, Any]]:
    responses = drawing.draw(
        args.sampler,
        args.responses,
        args.input,
        args.max_prompts,
        args.num_samples,
        args.output_dir,
        PROGRAM,
        loaded,
    )
    prompts = responses.prompts
    seed = args.responses.seed
    names = unique_keys([prompt_key(prompt) for prompt in prompts])
    keys = {prompt.number: name for prompt, name in zip(prompts, names, strict=True)}
    scored = drawing.score(responses, args.judge, args.responses) if args.judge.given else None
    texts = {number: [each.text for each in drawn] for number, drawn in responses.drawn.items()}
    right = _rights(args, prompts, texts, responses.tags, scored)
    found = answer_measures(prompts, keys, right, args.pass_at, seed) if right else []
    answered = [prompt for prompt in prompts if prompt.gt_answer is not None]
    if args.num_samples > 1 and answered and args.right_from is None:
        found.append(majority_measure(answered, keys, texts, responses.tags, seed))
    if scored is not None and (mean := score_measure(prompts, keys, scored, seed)):
        found.append(mean)
    if not found:
        raise ValueError(
            f"--input {' '.join(args.input)}: no row has a gt_answer, and nothing judges the "
            "responses (--rm_path, --reward_functions)"
        )
    return found, responses.settings


def _rights(
    args: EvaluateSettings,
    prompts: Sequence[Prompt],
    texts: Mapping[int, Sequence[str]],
    tags: dict | None,
    scored: Mapping[int, Sequence[Scored]] | None,
) -> dict[int, list[bool]]:
    """Which responses are right, of the prompts of which that is known."""
    if scored is not None and args.right_from is not None:
        least = args.right_from
        return {
            number: [each.score is not None and each.score >= least for each in found]
            for number, found in scored.items()
        }
    known = [prompt for prompt in prompts if prompt.gt_answer is not None]
    without = len(prompts) - len(known)
    if known and without:
        print(f"{PROGRAM}: left out: {without} prompts without a gt_answer", file=sys.stderr)
    return {
        prompt.number: rights(texts[prompt.number], str(prompt.gt_answer), tags) for prompt in known
    }


@phase("measuring perplexity")
def _perplexity(args: EvaluateSettings, loaded: Loaded) -> Measure:
    rows, skipped = loss_rows(args.perplexity, loaded.conversation, args.documents or "file")
    for line in skipped_summary(skipped):
        print(f"{PROGRAM}: {line}", file=sys.stderr)
    most = within_positions(loaded.model.config, args.responses.max_length)
    stride = min(args.stride or most // 2, most - 1)
    keys = unique_keys([f"{Path(row.place).name}" for row in rows])
    losses = {}
    tokens = {}
    for key, row in zip(keys, rows, strict=True):
        total, count = row_loss(loaded.model, row.ids, row.labels, most, stride)
        if count:
            losses[key] = total / count
            tokens[key] = float(count)
    if not losses:
        raise ValueError(f"--perplexity {' '.join(args.perplexity)}: no row has a token to measure")
    names = ", ".join(Path(each).name for each in args.perplexity)
    return perplexity_measure(f"perplexity of {names}", losses, tokens, args.responses.seed)
