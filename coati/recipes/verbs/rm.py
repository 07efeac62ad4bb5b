"""Reward model: a Bradley-Terry ranking loss on preference pairs."""

from coati.cli.preferences import parse_rm, rm_parser
from coati.cli.settings import RMSettings
from coati.cli.verb import Verb
from coati.recipes.extras import NO_EXTRAS, Extras
from coati.utils.logging import get_logger

logger = get_logger(__name__)

VERB = Verb("training", rm_parser, parse_rm, "coati.recipes.verbs.rm:main", processes=True)


def main(settings: RMSettings, extras: Extras = NO_EXTRAS) -> None:
    """Train as ``settings`` say, and save the model."""
    from coati.dataset import DataCollatorForPreferenceDataset
    from coati.models import RewardModel
    from coati.recipes import build, finish, offline
    from coati.recipes.run import start
    from coati.trainer import RewardModelTrainer

    run = start(settings, extras)
    rows = offline.load_data(run, "preference")
    model = offline.boosted(run, rows, build.reward_model(run))
    trainer = RewardModelTrainer(
        loss_fn=settings.loss.loss_fn,
        center_coef=settings.loss.center_coef,
        **offline.trainer_keywords(run, rows, model, samples=False),
    )
    collate = build.collator(run, DataCollatorForPreferenceDataset)
    load = RewardModel.from_pretrained
    if offline.fit(run, trainer, rows, collate, load=load, use=finish.SCORE):
        for line in trainer.report():
            logger.info(line)
