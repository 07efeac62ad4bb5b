"""From flags to what scores responses: a reward model, reward functions, or both."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from coati.cli.program_settings import CompareSettings
from coati.cli.response_flags import JudgeSettings
from coati.rewards.registry import file_and_function, is_file
from coati.utils.file_samples import sampled_hash

if TYPE_CHECKING:
    from coati.inference.evaluate.win_rate import Judge

T = TypeVar("T")


def named(flag: str, make: Callable[..., T], *words: Any, **keywords: Any) -> T:
    """What ``make`` gives; an error of it names ``flag``, unless it names one itself."""
    try:
        return make(*words, **keywords)
    except ValueError as error:
        if str(error).startswith("--"):
            raise
        raise ValueError(f"{flag} {error}") from error


def judge_of(
    settings: JudgeSettings | CompareSettings,
    tags: dict | None,
    batch_size: int,
    trust_remote_code: bool,
) -> "Judge":
    """The judge; ``tags``: response_format_tags of the template that responses are written in."""
    from coati.inference.evaluate.score_rows import load_reward_model
    from coati.inference.evaluate.win_rate import Judge
    from coati.rewards import Rewards

    model = rewards = None
    if settings.rm_path:
        code = trust_remote_code
        model = named("--rm_path", load_reward_model, settings.rm_path, trust_remote_code=code)
    if settings.reward_functions:
        rewards = Rewards(
            settings.reward_functions,
            settings.reward_weights,
            tags,
            settings.reward_timeout,
            options=settings.slow_rewards.options(),
        )
    return Judge(model, rewards, batch_size)


def judge_facts(settings: JudgeSettings) -> dict[str, Any]:
    """What decides its scores, as JSON."""
    from coati.inference.samples.samplers import fingerprint_of

    functions = {
        name: sampled_hash(file_and_function(name)[0]) if is_file(name) else ""
        for name in settings.reward_functions
    }
    options = asdict(settings.slow_rewards.options())
    del options["concurrency"]
    return {
        "rm_path": fingerprint_of(settings.rm_path) if settings.rm_path else None,
        "reward_functions": functions,
        "reward_weights": settings.reward_weights,
        "options": options,
    }
