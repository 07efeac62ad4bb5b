"""Score rows with a reward model."""

import json
import sys
from contextlib import nullcontext

from coati.cli.program_settings import ScoreSettings
from coati.cli.row_flags import template_args
from coati.cli.score import parse_score, score_parser
from coati.cli.verb import Verb
from coati.utils.output_paths import with_folder
from coati.utils.phases import import_libraries

VERB = Verb(
    "models",
    score_parser,
    parse_score,
    "coati.recipes.verbs.score:main",
    subject="--model_path",
)


def main(args: ScoreSettings) -> None:
    import_libraries()
    from coati.inference.evaluate import score_rows as scoring
    from coati.models.positions import within_positions

    model, tokenizer, conversation = scoring.load_reward_model(
        args.model_path,
        args.conversation_template_config,
        trust_remote_code=args.trust_remote_code,
        template_args=template_args(args.template_args),
    )
    longest = within_positions(model.config, args.max_length, hard_only=True)
    found = list(scoring.rows_to_score(args.input, conversation, longest))
    rows = [row for row in found if isinstance(row, scoring.ScoredRow)]
    for place, reason in (row for row in found if not isinstance(row, scoring.ScoredRow)):
        print(f"coati score: {place} is left out ({reason})", file=sys.stderr)
    if not rows:
        raise ValueError(f"--input {' '.join(args.input)}: no row could be scored")
    scoring.score(model, rows, tokenizer.pad_token_id, args.batch_size)
    with (
        open(with_folder(args.output), "w", encoding="utf-8")
        if args.output
        else nullcontext(sys.stdout) as output
    ):
        for row in rows:
            print(json.dumps(row.as_dict()), file=output)
    for line in scoring.summary(rows):
        print(line, file=sys.stderr)
    if args.histogram:
        print(
            f"histogram: {scoring.write_histogram(scoring.groups_of(rows), args.histogram)}",
            file=sys.stderr,
        )
