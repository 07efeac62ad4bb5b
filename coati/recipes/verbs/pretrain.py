"""Continued pre-training on plain texts."""

from coati.cli.pretraining import parse_pretrain, pretrain_parser
from coati.cli.settings import SFTSettings
from coati.cli.verb import Verb
from coati.recipes.extras import NO_EXTRAS, Extras

VERB = Verb(
    "training",
    pretrain_parser,
    parse_pretrain,
    "coati.recipes.verbs.pretrain:main",
    processes=True,
)
USE = "fine-tune it: coati sft --pretrain {} --dataset FILE"


def main(settings: SFTSettings, extras: Extras = NO_EXTRAS) -> None:
    """Train as ``settings`` say, and save the model."""
    from coati.dataset import DataCollatorForSupervisedDataset
    from coati.recipes import build, offline, token_loss
    from coati.recipes.run import start
    from coati.trainer import PretrainTrainer

    loss = token_loss.chosen(settings, extras)
    try:
        run = start(settings, extras, needs_template=False)
        rows = offline.load_data(run, "text")
        model = offline.boosted(run, rows, build.causal_lm(run))
    except ValueError as error:
        if not str(error).startswith("--packing") or "packing" in settings.flags_written:
            raise
        default = "rows are packed by default here, --packing false trains on them one by one"
        raise ValueError(f"{error} ({default})") from error
    token_loss.add_noise(run, model.engine)
    trainer = PretrainTrainer(loss=loss, **offline.trainer_keywords(run, rows, model))
    collate = build.collator(run, DataCollatorForSupervisedDataset)
    offline.fit(run, trainer, rows, collate, use=USE)
