"""Say which settings train a model in the memory of a GPU."""

from pathlib import Path
from typing import Any

from coati.cli.fit import fit_parser, parse_fit
from coati.cli.program_settings import FitSettings
from coati.cli.verb import Verb
from coati.models.quantization_registry import BASES
from coati.parallel.footprint.fitting import (
    Fit,
    at_batch,
    candidates,
    flags_of,
    memory_table,
    settings_that_fit,
)
from coati.parallel.footprint.model_shape import ModelShape, built_in_name, load_shape
from coati.utils.memory import in_units
from coati.utils.phases import phase

VERB = Verb("machine", fit_parser, parse_fit, "coati.recipes.verbs.fit:main", subject="--model")

SHOWN = 12
VERBS = {"lora": "sft", "online_dpo": "online-dpo"}
DATA = {
    "gkd": "--teacher TEACHER --dataset DATA",
    "ppo": "--prompt_dataset DATA --rm_pretrain REWARD_MODEL",
    "grpo": "--prompt_dataset DATA --reward_functions FUNCTION",
    "online-dpo": "--prompt_dataset DATA --reward_functions FUNCTION",
}


def main(settings: FitSettings) -> None:
    """Print the settings that fit, or with ``--table`` what the built-in models take.

    Raises ValueError where nothing fits, with what would help.
    """
    if settings.table:
        print(markdown(memory_table(settings.max_length, settings.lora_rank)))
        return
    assert settings.model is not None and settings.memory is not None
    shape = load_shape(settings.model)
    fits = _search(shape, settings)
    if not fits:
        raise ValueError(_what_helps(shape, settings))
    print(_title(shape, settings))
    print(_table(fits[:SHOWN]))
    print("\nthe first of them:\n" + command(settings, fits[0]))


@phase("looking for settings that fit")
def _search(shape: ModelShape, settings: FitSettings, **changes: Any) -> list[Fit]:
    asked = _asked(settings)
    assert settings.memory is not None
    teacher = _teacher(shape, settings)
    return settings_that_fit(
        shape, settings.method, settings.memory, teacher=teacher, **(asked | changes)
    )


def _teacher(shape: ModelShape, settings: FitSettings) -> ModelShape | None:
    """What is distilled from: by default a model of the same size."""
    if settings.method != "gkd":
        return None
    return shape if settings.teacher is None else load_shape(settings.teacher)


def _asked(settings: FitSettings) -> dict[str, Any]:
    """What every candidate has."""
    return {
        "gpus": settings.gpus,
        "length": settings.max_length,
        "rank": settings.lora_rank,
        "base": settings.quantize_base,
        "optim": settings.optim,
        "offload_activations": settings.offload_activations,
        "tokens_per_batch": settings.tokens_per_batch,
    }


def _title(shape: ModelShape, settings: FitSettings) -> str:
    gpus = "one GPU" if settings.gpus == 1 else f"each of {settings.gpus} GPUs"
    return (
        f"{settings.model}: {shape.parameters():,} parameters, {settings.method}, rows of "
        f"{settings.max_length} tokens, {in_units(settings.memory or 0)} on {gpus}. Best first; "
        "estimates (docs/resources.md): try the one you take with --dry_run.\n"
    )


def _table(fits: list[Fit]) -> str:
    from coati.utils.text_table import table

    header = ["weights", "plugin", "precision", "recompute", "batch", "GPU", "host"]
    rows = [_row(fit) for fit in fits]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return table(header, rows, widths, [False] * 4 + [True] * 3)


def _row(fit: Fit) -> list[str]:
    plan = fit.plan
    host = fit.estimate.host
    split = f" --tp {plan.options.tp}" if plan.options.tp > 1 else ""
    kept = "frozen models" if plan.offload_inference else ""
    return [
        f"LoRA {plan.lora_rank} {plan.quantize_base or ''}".strip() if plan.lora_rank else "all",
        plan.options.plugin + split,
        str(plan.options.precision),
        "yes" if plan.options.grad_checkpoint else "no",
        str(plan.batch_size),
        in_units(fit.peak),
        " + ".join(filter(None, [in_units(host) if host else "", kept])),
    ]


def command(settings: FitSettings, fit: Fit) -> str:
    """The line to paste, with the name of a model as a loader takes it."""
    model = settings.model or ""
    short = "/" not in model and not Path(model).exists()
    pretrain = (built_in_name(model) if short else None) or model
    verb = VERBS.get(settings.method, settings.method)
    data = DATA.get(verb, "--dataset DATA").replace("TEACHER", settings.teacher or "TEACHER")
    return f"coati {verb} --pretrain {pretrain} {data} {' '.join(flags_of(fit))}"


def _what_helps(shape: ModelShape, settings: FitSettings) -> str:
    teacher = _teacher(shape, settings)
    plans = list(candidates(settings.method, teacher=teacher, **_asked(settings)))
    least = min((at_batch(shape, plan, 1) for plan in plans), key=lambda fit: fit.peak)
    asked = f"--memory {in_units(settings.memory or 0)}: {settings.method} of {settings.model}"
    flags = " ".join(flags_of(least))
    lines = [f"{asked} does not fit; the least is {in_units(least.peak)}, with {flags}."]
    lengths = [settings.max_length // part for part in (2, 4, 8)]
    shorter = next((n for n in lengths if n > 1 and _search(shape, settings, length=n)), None)
    more = next(
        (n for n in (2, 4, 8) if n > settings.gpus and _search(shape, settings, gpus=n)), None
    )
    lines += [f"It fits with --max_length {shorter}."] if shorter else []
    lines += [f"It fits with --gpus {more}."] if more else []
    fewer = None if settings.quantize_base else next(iter(BASES))
    fewer = fewer if fewer and _search(shape, settings, base=fewer) else None
    lines += [f"It fits with --quantize_base {fewer}."] if fewer else []
    if not (shorter or more or fewer):
        lines.append("Take a smaller model: coati fit --table says what each takes.")
    return " ".join(lines)


def markdown(rows: list[list[str]]) -> str:
    """Header and rows as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join(["---"] * len(rows[0])) + " |", *lines[1:]])
