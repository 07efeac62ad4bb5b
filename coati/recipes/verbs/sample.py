"""Draw, score and select responses as rows to train on."""

import sys

from coati.cli.program_settings import SampleSettings
from coati.cli.sample import parse_sample, sample_parser
from coati.cli.verb import Verb
from coati.utils.phases import import_libraries

VERB = Verb(
    "models",
    sample_parser,
    parse_sample,
    "coati.recipes.verbs.sample:main",
    subject="--model_path",
)


def main(args: SampleSettings) -> None:
    import_libraries()
    from coati.recipes import drawn_responses as drawing
    from coati.recipes.selected_rows import best_of_lines, save_summary, write_rows

    with drawing.locked(args.output_dir):
        drawn = drawing.draw(
            args.sampler,
            args.responses,
            args.input,
            args.max_prompts,
            args.num_samples,
            args.output_dir,
            "coati sample",
        )
        if not args.judge.given:
            print(f"the responses are in {drawing.place_of(drawn)}; nothing judges them")
            return
        scored = drawing.score(drawn, args.judge, args.responses)
        groups = drawing.groups_of(drawn, scored)
        for line in write_rows(args, groups, drawn.folder):
            print(line, file=sys.stderr)
        save_summary(groups, drawn.folder, args.responses.seed)
        print("\n".join(best_of_lines(groups, args.responses.seed)))
