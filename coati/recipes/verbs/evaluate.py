"""Measure a model with intervals, and compare it with a baseline."""

from pathlib import Path

from coati.cli.evaluate import evaluate_parser, parse_evaluate
from coati.cli.program_settings import EvaluateSettings
from coati.cli.verb import Verb
from coati.utils.logging import get_logger
from coati.utils.phases import import_libraries

logger = get_logger(__name__)

VERB = Verb(
    "models",
    evaluate_parser,
    parse_evaluate,
    "coati.recipes.verbs.evaluate:main",
    subject="--model_path",
)


def main(args: EvaluateSettings) -> None:
    import_libraries()
    from coati.inference.evaluate import result_files as results
    from coati.inference.evaluate.measure_table import comparisons
    from coati.recipes import drawn_responses as drawing
    from coati.recipes.evaluation import baseline_of, measured, other_settings

    baseline, before = baseline_of(args.baseline)
    with drawing.locked(args.output_dir):
        found, more = measured(args)
        compared = comparisons(before, found)
        about = {"model": args.sampler.name, **more}
        if args.baseline:
            about["baseline"] = baseline.get("model", args.baseline)
            for difference in other_settings(baseline, about):
                logger.warning(f"--baseline {args.baseline} was made with {difference}")
        results.write_results(Path(args.output_dir), about, found, compared, before)
    print(results.aligned(results.HEADER, results.rows_of(found)))
    for each in compared:
        print(each)
    if args.baseline and not compared:
        raise ValueError(
            f"--baseline {args.baseline}: has no measure of the same name on the same rows"
        )
