"""A random sample of the prompts of a data set, as a JSON array for prepare_dataset.py --type
prompt."""

import sys

from coati.cli.program_settings import PromptSampleSettings
from coati.cli.prompts import parse_prompts


def main(args: PromptSampleSettings) -> None:
    from coati.dataset.rows.prompt_sample import sample_prompts
    from coati.utils.json_io import save_json

    prompts = sample_prompts([args.dataset_path], args.sample_size, args.seed)
    save_json(prompts, args.save_path)
    print(f"{len(prompts)} prompts are in {args.save_path}; prepare them with --type prompt")


if __name__ == "__main__":
    arguments = parse_prompts()
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"generate_prompt_dataset.py: error: {error}")
