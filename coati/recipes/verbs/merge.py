"""Merge a LoRA adapter into its base model."""

from coati.cli.export import merging_parser, parse_merging
from coati.cli.program_settings import MergeSettings
from coati.cli.verb import Verb
from coati.utils.phases import import_libraries

VERB = Verb(
    "models",
    merging_parser,
    parse_merging,
    "coati.recipes.verbs.merge:main",
    subject="--model_path",
)


def main(args: MergeSettings) -> None:
    import_libraries()
    from coati.inference.export.model_dir import merge

    reading = {
        "template": args.conversation_template_config,
        "trust_remote_code": args.trust_remote_code,
    }
    merged = merge(args.model_path, args.output_dir, args.dtype, **reading)
    print(
        "logits with the adapter beside and inside the weights differ by at most "
        f"{merged.difference:.2g}"
    )
    print(f"the merged model is in {args.output_dir}")
