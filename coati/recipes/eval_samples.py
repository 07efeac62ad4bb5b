"""Sample responses shown at each evaluation, to the first prompts of the evaluation rows."""

from collections.abc import Callable
from os.path import commonprefix
from typing import Any

from coati.dataset.data_types import type_of_row
from coati.models.generation.detokenize import decode
from coati.models.generation.end_tokens import stop_sequences
from coati.models.generation.loop import Sampling
from coati.models.generation.response_table import left_pad, without_stop
from coati.models.positions import within_positions
from coati.parallel.engine import Engine
from coati.parallel.plugin_checks import cannot_generate, resolve_options
from coati.parallel.sharded_generation import sample
from coati.recipes.run import PreparedRows, Run
from coati.utils.logging import get_logger

logger = get_logger(__name__)

ROWS = 3
NEW_TOKENS = 40
PROMPT_TOKENS = 96
BEGINNING = 24  # tokens of a plain text, which is no answer to anything, that are continued


def sampler_of(
    run: Run, evaluation: PreparedRows | None
) -> Callable[[Engine], list[tuple[str, str]]] | None:
    """A function that samples ``(prompt, response)``, or None where there is nothing to ask or the
    plugin cannot sample."""
    if evaluation is None or not len(evaluation):
        return None
    stop_ids = _stop_ids(run, evaluation.rows[0])
    if stop_ids is None:
        return None
    if reason := cannot_generate(resolve_options(run.options)[0]):
        logger.warning_once(f"no sample responses at evaluations. {reason}.")
        return None
    rows = evaluation.rows
    prompts = [_prompt(rows[index]) for index in range(min(ROWS, len(rows)))]
    return lambda engine: _samples(engine, prompts, run.tokenizer, stop_ids)


def _stop_ids(run: Run, row: dict[str, Any]) -> list[list[int]] | None:
    """What ends a sample response: what the template says, of plain texts eos; None: unknown."""
    if run.template is not None:
        return run.template.stop_ids
    eos = run.tokenizer.eos_token_id
    return [[eos]] if eos is not None and _is_text(row) else None


def _is_text(row: dict[str, Any]) -> bool:
    """Whether all but the first token is learned."""
    side = type_of_row(row).sides(row)[0]
    return type_of_row(row).supervised and len(side.prompt()) < 2 < len(side.ids)


def _prompt(row: dict[str, Any]) -> list[int]:
    """The tokens before the first supervised one, at most the last ``PROMPT_TOKENS``; of a plain
    text its beginning."""
    side = type_of_row(row).sides(row)[0]
    if _is_text(row):
        return side.ids[: min(BEGINNING, len(side.ids) - 1)]
    return side.prompt()[-PROMPT_TOKENS:] or side.ids[:1]


def what_differs(prompts: list[list[int]]) -> list[list[int]]:
    """The prompts without the tokens that all begin or end with (system message, role markers),
    which would fill a narrow column; whole where nothing else is left."""
    start = len(commonprefix(prompts))
    end = len(commonprefix([prompt[start:][::-1] for prompt in prompts]))
    return [prompt[start : len(prompt) - end] or prompt for prompt in prompts]


def _samples(
    engine: Engine, prompts: list[list[int]], tokenizer: Any, stop_ids: list[list[int]]
) -> list[tuple[str, str]]:
    room = within_positions(engine.module.config, PROMPT_TOKENS + NEW_TOKENS)
    new_tokens = min(NEW_TOKENS, room // 2)
    prompts = [prompt[new_tokens - room :] for prompt in prompts]
    stops = stop_sequences(stop_ids, tokenizer, engine.model)
    ids, mask = left_pad(prompts, tokenizer.pad_token_id or 0, engine.device)
    result = sample(
        engine,
        ids,
        mask,
        sampling=Sampling(do_sample=False),
        stop_sequences=stops,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    answers = [decode(tokenizer, without_stop(answer, stops)) for answer in result.responses()]
    asked = [" ".join(decode(tokenizer, part).split()) for part in what_differs(prompts)]
    return list(zip(asked, answers, strict=True))
