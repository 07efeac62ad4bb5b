"""Sample answers shown at each evaluation: what the model says to the first questions of the
evaluation rows."""

from collections.abc import Callable
from os.path import commonprefix
from typing import Any

from coati.dataset.data_types import type_of_row
from coati.models.generation.loop import Sampling
from coati.models.generation.response_table import format_samples, left_pad, without_stop
from coati.parallel.engine import Engine
from coati.parallel.plugin_checks import cannot_generate, resolve_options
from coati.parallel.plugins import ParallelOptions
from coati.parallel.sharded_generation import sample
from coati.utils.logging import get_logger

logger = get_logger(__name__)

ROWS, NEW_TOKENS, PROMPT_TOKENS = 3, 40, 96


def table_of(
    evaluation: Any, tokenizer: Any, template: Any, options: ParallelOptions
) -> Callable[[Engine], str] | None:
    """A function that makes the table, or None where there is nothing to ask or the plugin cannot
    sample."""
    if evaluation is None or template is None:
        return None
    if reason := cannot_generate(resolve_options(options)[0]):
        logger.warning_once(f"no sample answers at evaluations. {reason}.")
        return None
    prompts = [_prompt(evaluation[index]) for index in range(min(ROWS, len(evaluation)))]
    return lambda engine: _table(engine, prompts, tokenizer, template.stop_ids)


def _prompt(row: dict[str, Any]) -> list[int]:
    """The tokens before the first supervised one, at most the last ``PROMPT_TOKENS``."""
    side = type_of_row(row).sides(row)[0]
    return side.prompt()[-PROMPT_TOKENS:] or side.ids[:1]


def what_differs(prompts: list[list[int]]) -> list[list[int]]:
    """The prompts without the tokens that all begin or end with (system message, role markers),
    which would fill a narrow column; whole where nothing else is left."""
    start = len(commonprefix(prompts))
    end = len(commonprefix([prompt[start:][::-1] for prompt in prompts]))
    return [prompt[start : len(prompt) - end] or prompt for prompt in prompts]


def _table(
    engine: Engine, prompts: list[list[int]], tokenizer: Any, stop_ids: list[list[int]]
) -> str:
    ids, mask = left_pad(prompts, tokenizer.pad_token_id or 0, engine.device)
    result = sample(
        engine,
        ids,
        mask,
        sampling=Sampling(do_sample=False),
        stop_sequences=stop_ids,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    answers = [
        tokenizer.decode(without_stop(answer, stop_ids), skip_special_tokens=True)
        for answer in result.responses()
    ]
    asked = [
        " ".join(tokenizer.decode(part, skip_special_tokens=True).split())
        for part in what_differs(prompts)
    ]
    return format_samples(list(zip(asked, answers, strict=True)))
