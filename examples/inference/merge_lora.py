"""A LoRA adapter and its base as one plain model. ``merge_lora.py --help`` lists the flags."""

import sys

from coati.cli.export import parse_merging
from coati.cli.program_settings import MergeSettings


def main(args: MergeSettings) -> None:
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


if __name__ == "__main__":
    arguments = parse_merging()
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"merge_lora.py: error: {error}")
