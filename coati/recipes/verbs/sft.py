"""Supervised fine-tuning."""

from coati.cli.arguments import parse_sft, sft_parser
from coati.cli.settings import SFTSettings
from coati.cli.verb import Verb
from coati.recipes.extras import NO_EXTRAS, Extras

VERB = Verb("training", sft_parser, parse_sft, "coati.recipes.verbs.sft:main", processes=True)


def main(settings: SFTSettings, extras: Extras = NO_EXTRAS) -> None:
    """Train as ``settings`` say, and save the model."""
    from coati.dataset import DataCollatorForSupervisedDataset
    from coati.recipes import build, offline, token_loss
    from coati.recipes.run import start
    from coati.trainer import SFTTrainer

    loss = token_loss.chosen(settings, extras)
    run = start(settings, extras)
    rows = offline.load_data(run, "sft")
    model = offline.boosted(run, rows, build.causal_lm(run))
    token_loss.add_noise(run, model.engine)
    trainer = SFTTrainer(loss=loss, **offline.trainer_keywords(run, rows, model))
    offline.fit(run, trainer, rows, build.collator(run, DataCollatorForSupervisedDataset))
