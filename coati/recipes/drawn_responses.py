"""From flags to several responses to each prompt and their scores, kept on disk as they come: what
coati sample and coati evaluate share."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.cli.response_flags import JudgeSettings, ResponseSettings
from coati.cli.sampler_flags import SamplerSettings
from coati.dataset.chat.template_file import open_config
from coati.inference.evaluate.generate_responses import (
    Prompt,
    SamplingConfig,
    read_prompts,
    skipped_summary,
)
from coati.inference.model_loading import Loaded, conversation_of, load
from coati.inference.samples.api_sampler import ApiSampler
from coati.inference.samples.sample_journal import RESPONSES, digest_of, draw_all
from coati.inference.samples.samplers import (
    Configurations,
    Drawn,
    ModelSampler,
    Sampler,
    ServerSampler,
    VllmSampler,
    fingerprint_of,
)
from coati.inference.samples.score_samples import Scored, score_all
from coati.inference.samples.select_samples import Group
from coati.models.generation.sampling import Sampling
from coati.models.ilql_heads import saved_file
from coati.models.loading import find_model
from coati.models.tokenizer import find_tokenizer, load_tokenizer
from coati.recipes.judging import judge_facts, judge_of, named
from coati.utils.dir_lock import DirLock
from coati.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Responses:
    """``drawn``: responses to each of ``prompts``, by the prompt's number; ``texts``: of the
    prompts, as the model was given them; ``tags``: response_format_tags of the template."""

    prompts: list[Prompt]
    drawn: Mapping[int, Sequence[Drawn]]
    texts: Mapping[int, str]
    tags: dict | None
    folder: Path
    settings: dict[str, Any]
    trust_remote_code: bool


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """One process at a time works on ``folder``, which is made. Raises ValueError naming another
    one that does."""
    lock = DirLock(Path(folder), "--output_dir")
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def draw(
    engine: SamplerSettings,
    responses: ResponseSettings,
    inputs: Sequence[str],
    max_prompts: int | None,
    count: int,
    folder: str,
    program: str,
    loaded: Loaded | None = None,
) -> Responses:
    """``count`` responses to each prompt of ``inputs``, those in ``folder`` among them; prompts
    that cannot be asked are named on standard error. ``loaded``: the model, where it is in memory
    already.

    Raises ValueError where there is no prompt.
    """
    prompts, unreadable = named("--input", read_prompts, inputs, max_prompts, responses.seed)
    config = sampling_config(responses)
    sampler = sampler_of(engine, config, loaded)
    ready, skipped = sampler.ready(prompts)
    for line in skipped_summary([*unreadable, *skipped]):
        print(f"{program}: {line}", file=sys.stderr)
    if not ready:
        raise ValueError(f"--input {' '.join(inputs)}: no prompt could be asked")
    settings = _settings(engine, responses, sampler) | {"prompts": digest_of(prompts)}
    drawn = draw_all(sampler, ready, count, Path(folder), settings)
    return Responses(
        ready,
        drawn,
        {prompt.number: sampler.prompt_text(prompt) for prompt in ready},
        sampler.tags,
        Path(folder),
        settings,
        engine.trust_remote_code,
    )


def sampling_config(responses: ResponseSettings) -> SamplingConfig:
    """The flags as the samplers take them."""
    sampling = Sampling.at(
        responses.temperature, responses.top_k, responses.top_p, responses.repetition_penalty
    )
    return SamplingConfig(
        sampling,
        responses.max_new_tokens,
        responses.max_length,
        responses.batch_size,
        responses.seed,
    )


def load_model(engine: SamplerSettings) -> Loaded:
    """The model in this process."""
    return named(
        "--model_path",
        load,
        engine.model_path,
        tokenizer_path=engine.tokenizer_path,
        template=engine.conversation_template_config,
        template_args=engine.template_args,
        trust_remote_code=engine.trust_remote_code,
        quant=engine.quant,
        beta_gen=engine.beta_gen,
    )


def sampler_of(
    engine: SamplerSettings, config: SamplingConfig, loaded: Loaded | None = None
) -> Sampler:
    """The engine that the flags name. Raises ValueError where it cannot work."""
    if engine.api_url is not None:
        tags = _tags(engine.conversation_template_config)
        return ApiSampler(
            engine.api_url, engine.api_model or "", config, tags, engine.rollout_timeout
        )
    if engine.rollout_url:
        parts = _parts(engine)
        return ServerSampler(
            engine.rollout_url, parts, config, engine.token, engine.rollout_timeout
        )
    if engine.rollout_engine == "vllm":
        share = engine.vllm_memory_share
        path = engine.model_path or ""
        return VllmSampler(path, _parts(engine), config, share, engine.trust_remote_code)
    return ModelSampler(loaded or load_model(engine), config)


def _parts(engine: SamplerSettings) -> Loaded:
    """Tokenizer, template and configurations of a model that is in memory elsewhere."""
    path = engine.model_path or ""
    directory = find_model(path, "actor")
    if saved_file(directory) is not None:
        logger.warning_once(
            f"{path} has the values of ILQL, which only the model in this process decodes by: "
            "responses are the policy's"
        )
    place = engine.tokenizer_path or find_tokenizer(directory)
    tokenizer = load_tokenizer(place, engine.trust_remote_code)
    conversation = conversation_of(
        directory, tokenizer, engine.conversation_template_config, engine.template_args
    )
    model: Any = Configurations(path, engine.trust_remote_code)
    return Loaded(model, tokenizer, conversation)


def _tags(template: str | None) -> dict | None:
    """response_format_tags of a template whose model is elsewhere."""
    return None if template is None else open_config(template)[0].get("response_format_tags")


def _settings(
    engine: SamplerSettings, responses: ResponseSettings, sampler: Sampler
) -> dict[str, Any]:
    """What decides the responses, as JSON. How many are drawn and at a time is not among it."""
    decoding = {name: value for name, value in vars(responses).items() if name != "batch_size"}
    found: dict[str, Any] = {**decoding, **sampler.facts, "tags": sampler.tags}
    if engine.model_path is None:
        return found
    own = "servers" if engine.rollout_url else engine.rollout_engine
    conversation = getattr(sampler, "conversation", None)
    template = json.dumps(conversation.to_config() if conversation else None, sort_keys=True)
    digest = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    facts = {name: getattr(engine, name) for name in ("quant", "beta_gen")}
    model = fingerprint_of(engine.model_path)
    return found | facts | {"engine": own, "model": model, "template": digest}


def score(
    responses: Responses, judge: JudgeSettings, decoding: ResponseSettings
) -> dict[int, list[Scored]]:
    """The responses with their scores, by the prompt's number."""
    made = judge_of(judge, responses.tags, decoding.batch_size, responses.trust_remote_code)
    settings = {"responses": responses.settings, "judge": judge_facts(judge)}
    return score_all(
        made,
        responses.prompts,
        responses.drawn,
        responses.texts,
        responses.folder,
        settings,
        decoding.max_new_tokens,
    )


def groups_of(responses: Responses, scored: Mapping[int, Sequence[Scored]]) -> list[Group]:
    """Each prompt with its responses that have a score."""
    return [Group.of(prompt, scored[prompt.number]) for prompt in responses.prompts]


def place_of(responses: Responses) -> Path:
    """The file of the responses."""
    return responses.folder / RESPONSES
