"""Win rate of a trained model against the one it started from."""

import json
import sys

from coati.cli.compare import compare_parser, parse_compare
from coati.cli.program_settings import CompareSettings
from coati.cli.row_flags import template_args
from coati.cli.verb import Verb
from coati.utils.output_paths import with_folder
from coati.utils.phases import import_libraries

VERB = Verb(
    "models",
    compare_parser,
    parse_compare,
    "coati.recipes.verbs.compare:main",
    subject="--model_path",
)


def generated(args: CompareSettings, prompts: list) -> tuple[list[dict], list, dict | None]:
    """Both models' responses, one model in memory at a time; the prompts left out; the policy's
    tags."""
    from coati.inference.evaluate import generate_responses as generating
    from coati.inference.evaluate.win_rate import reference_of
    from coati.models.generation.sampling import Sampling
    from coati.recipes.judging import named

    sampling = Sampling.at(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    config = generating.SamplingConfig(
        sampling, args.max_new_tokens, args.max_length, args.batch_size, args.seed
    )
    template = args.conversation_template_config
    code = args.trust_remote_code
    loading = {
        "template": template,
        "template_args": template_args(args.template_args),
        "trust_remote_code": code,
    }
    reference = args.start_path or named("--model_path", reference_of, args.model_path)
    found = []
    skipped = []
    conversation = None
    sides = (
        ("--start_path", reference, None),
        ("--model_path", args.model_path, args.beta_gen),
    )
    for flag, path, beta_gen in sides:
        loading |= {"beta_gen": beta_gen}
        side, out, conversation = named(
            flag, generating.responses_of, path, prompts, config, **loading
        )
        found.append(side)
        skipped += out
    return found, skipped, conversation.response_format_tags


def main(args: CompareSettings) -> None:
    import_libraries()
    from coati.inference.evaluate import generate_responses as generating
    from coati.inference.evaluate.win_rate import compare, extremes, summary
    from coati.recipes.judging import judge_of, named

    prompts, unreadable = named(
        "--input", generating.read_prompts, args.input, args.max_prompts, args.seed
    )
    (reference, policy), too_long, tags = generated(args, prompts)
    judge = judge_of(args, tags, args.batch_size, args.trust_remote_code)
    rows, unscored = compare(
        prompts, reference, policy, judge, args.max_new_tokens, args.tie_margin
    )
    for line in generating.skipped_summary([*unreadable, *too_long, *unscored]):
        print(f"coati compare: {line}", file=sys.stderr)
    if not rows:
        raise ValueError(f"--input {' '.join(args.input)}: no prompt could be compared")
    if args.output:
        with open(with_folder(args.output), "w", encoding="utf-8") as output:
            output.writelines(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows)
    if args.show and (shown := extremes(rows, args.show)):
        print(shown)
    print("\n".join(summary(rows)))
