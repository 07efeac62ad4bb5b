"""The flags of what is learned of a token, of coati sft and coati pretrain."""

from coati.cli.parser import Parser
from coati.cli.values import add_number
from coati.models.loss_registry import NLL, SFT_LOSSES


def add_token_loss_flags(parser: Parser) -> None:
    group = parser.add_argument_group("loss")
    about = "; ".join(f"{name}: {what}" for name, what in SFT_LOSSES.items())
    group.add_argument(
        "--sft_loss", choices=tuple(SFT_LOSSES), default=NLL, help=f"loss of a token. {about}"
    )
    add_number(
        group,
        "--neftune_alpha",
        unit="A",
        exclusive=True,
        help="add uniform noise of up to A / sqrt(tokens x width) to the embeddings of each row in "
        "training (NEFTune, arXiv 2310.05914; 5 to 15 is usual); default: none",
    )
