"""Export a model for other engines, checked, with a model card."""

from coati.cli.export import export_parser, parse_export
from coati.cli.program_settings import ExportSettings
from coati.cli.verb import Verb
from coati.utils.phases import import_libraries

VERB = Verb(
    "models",
    export_parser,
    parse_export,
    "coati.recipes.verbs.export:main",
    subject="--model_path",
)


def main(args: ExportSettings) -> None:
    import_libraries()
    from coati.inference.export.hub_upload import check_hub, upload
    from coati.inference.export.model_card import model_card
    from coati.inference.export.model_dir import export

    if args.push_to_hub:
        check_hub(args.push_to_hub)

    def card(loaded, found) -> str:
        return model_card(
            args.model_path,
            f"Plain transformers loads this directory, and its greedy responses to {found.asked} "
            "questions are those of coati's own loader, token for token.",
        )

    found = export(
        args.model_path,
        args.output_dir,
        card,
        dtype=args.dtype,
        max_new_tokens=args.max_new_tokens,
        gguf=args.gguf,
        template=args.conversation_template_config,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"greedy responses equal to plain transformers': {found.same} of {found.asked}")
    if found.gguf:
        print(
            f"{found.gguf.file}: read back, its logits differ by at most "
            f"{found.gguf.difference:.2g}"
        )
    if args.push_to_hub:
        print(f"uploaded to {upload(args.output_dir, args.push_to_hub)}")
    print(f"the exported model and its card, README.md, are in {args.output_dir}")
