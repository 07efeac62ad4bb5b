"""Quantize a model and measure what it costs."""

import json
from pathlib import Path

from coati.cli.program_settings import QuantizeSettings
from coati.cli.quantize import parse_quantize, quantize_parser
from coati.cli.verb import Verb
from coati.utils.output_paths import with_folder
from coati.utils.phases import import_libraries

VERB = Verb(
    "models",
    quantize_parser,
    parse_quantize,
    "coati.recipes.verbs.quantize:main",
    subject="--model_path",
)


def measured(name: str, folder, args: QuantizeSettings, original=None) -> dict:
    """Size, perplexity and speed of the model of ``folder``; ``original``: the size that the ratio
    is against."""
    from coati.inference import load
    from coati.inference.export import measures
    from coati.models.loading import find_model
    from coati.models.positions import within_positions

    loaded = load(folder, trust_remote_code=args.trust_remote_code, beta_gen=0)
    longest = within_positions(loaded.model.config, args.max_length, hard_only=True)
    rows = measures.read_conversations(args.eval, loaded.conversation, longest)
    size = measures.size_of(find_model(folder, "actor"))
    return {
        "model": name,
        "bytes": size.embeddings + size.layers,
        "ratio": size.ratio(original or size),
        "perplexity": measures.perplexity(loaded.model, rows),
        "tokens_per_second": measures.speed_of(
            loaded, 1, new_tokens=args.new_tokens
        ).tokens_per_second,
    }


def show(one: dict, first: dict) -> None:
    """A row of the table, as soon as it is known."""
    if one is first:
        print(
            f"{'model':10} {'MiB':>8} {'x bf16, no embeddings':>22} {'perplexity':>11} "
            f"{'change':>8} {'tokens/s':>9}"
        )
    change = one["perplexity"] / first["perplexity"] - 1
    print(
        f"{one['model']:10} {one['bytes'] / 2**20:8.1f} {one['ratio']:22.3f} "
        f"{one['perplexity']:11.3f} {change:+8.2%} {one['tokens_per_second']:9.1f}",
        flush=True,
    )


def main(args: QuantizeSettings) -> None:
    import_libraries()
    from coati.inference.export import measures
    from coati.inference.export.quantization import quantize
    from coati.inference.model_loading import conversation_of
    from coati.models.loading import find_model
    from coati.models.positions import positions_in
    from coati.models.tokenizer import find_tokenizer, load_tokenizer

    original = find_model(args.model_path, "actor")
    calibration = []
    if args.calibration:
        conversation = conversation_of(
            original, load_tokenizer(find_tokenizer(original), args.trust_remote_code)
        )
        positions = positions_in(original, args.trust_remote_code)
        longest = min(args.max_length, positions.count) if positions else args.max_length
        calibration = measures.read_conversations(
            args.calibration, conversation, longest, args.calibration_rows
        )
    several = len(args.method) > 1
    folders = {
        method: Path(args.output_dir) / (method if several else "") for method in args.method
    }
    for method, folder in folders.items():
        quantize(
            args.model_path,
            folder,
            method,
            calibration=calibration,
            group_size=args.group_size,
            trust_remote_code=args.trust_remote_code,
        )
    size = measures.size_of(original)
    figures = []
    for name, place in {"original": Path(args.model_path), **folders}.items():
        figures.append(measured(name, place, args, size if name in folders else None))
        show(figures[-1], figures[0])
    if args.output:
        with_folder(args.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
