"""Draw a random sample of prompts from a data set."""

from coati.cli.program_settings import PromptSampleSettings
from coati.cli.prompts import parse_prompts, prompts_parser
from coati.cli.verb import Verb

VERB = Verb(
    "data",
    prompts_parser,
    parse_prompts,
    "coati.recipes.verbs.sample_prompts:main",
    subject="--dataset_path",
)


def main(args: PromptSampleSettings) -> None:
    from coati.dataset.rows.column_names import Layout, parse_columns
    from coati.dataset.rows.prompt_sample import sample_prompts
    from coati.utils.json_io import save_json

    layout = Layout(parse_columns(args.columns))
    prompts = sample_prompts(
        [args.dataset_path], args.sample_size, args.seed, layout, args.strict_columns
    )
    save_json(prompts, args.save_path)
    print(f"{len(prompts)} prompts are in {args.save_path}; prepare them with --type prompt")
