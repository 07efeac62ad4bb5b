"""Win rate of a trained model against its start. ``compare.py --help`` lists the flags."""

import json
import sys
from argparse import Namespace

from coati.cli.compare import parse_compare


def named(flag: str, make, *words, **keywords):
    """What ``make`` gives; an error of it names ``flag``."""
    try:
        return make(*words, **keywords)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


def judges(args: Namespace, tags: dict | None):
    from coati.inference.evaluate.reward_scores import load_reward_model
    from coati.inference.evaluate.win_rate import Judge
    from coati.rewards import Rewards

    model = rewards = None
    if args.rm_path:
        model = named(
            "--rm_path", load_reward_model, args.rm_path, trust_remote_code=args.trust_remote_code
        )
    if args.reward_functions:
        rewards = Rewards(args.reward_functions, args.reward_weights, tags, args.reward_timeout)
    return Judge(model, rewards, args.batch_size)


def answered(args: Namespace, prompts: list) -> tuple[list[dict], list, dict | None]:
    """Both models' answers, one model in memory at a time; the prompts left out; the trained one's
    tags."""
    from coati.inference.evaluate import generate_responses as answers
    from coati.inference.evaluate import win_rate as compare
    from coati.models.generation.loop import Sampling

    drawn = {name: getattr(args, name) for name in ("top_k", "top_p", "repetition_penalty")}
    sampling = Sampling(args.temperature > 0, args.temperature or 1.0, **drawn)
    asking = answers.SamplingConfig(
        sampling, args.max_new_tokens, args.max_length, args.batch_size, args.seed
    )
    loading = {
        "template": args.conversation_template_config,
        "trust_remote_code": args.trust_remote_code,
    }
    found, left_out, conversation = [], [], None
    start = args.start_path or named("--model_path", compare.start_of, args.model_path)
    for flag, path in (("--start_path", start), ("--model_path", args.model_path)):
        side, out, conversation = named(flag, answers.answers_of, path, prompts, asking, **loading)
        answers.release()
        found.append(side)
        left_out += out
    return found, left_out, conversation.response_format_tags


def main(args: Namespace) -> None:
    from coati.inference.evaluate import generate_responses as answers
    from coati.inference.evaluate import win_rate as compare

    prompts, left_out = named(
        "--input", answers.read_prompts, args.input, args.max_prompts, args.seed
    )
    (start, trained), out, tags = answered(args, prompts)
    rows, unscored = compare.compare(
        prompts, start, trained, judges(args, tags), args.max_new_tokens, args.tie_margin
    )
    for line in answers.told([*left_out, *out, *unscored]):
        print(f"compare.py: {line}", file=sys.stderr)
    if not rows:
        raise ValueError(f"--input {' '.join(args.input)}: no prompt could be compared")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as output:
            output.writelines(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows)
    if args.show and (shown := compare.extremes(rows, args.show)):
        print(shown)
    print("\n".join(compare.summary(rows)))


if __name__ == "__main__":
    arguments = parse_compare()
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"compare.py: error: {error}")
