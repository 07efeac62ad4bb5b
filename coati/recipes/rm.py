"""Reward model: a Bradley-Terry ranking loss on preference pairs."""

from coati.cli.settings import RMSettings
from coati.dataset import DataCollatorForPreferenceDataset
from coati.models import RewardModel
from coati.recipes import build, finish, offline
from coati.recipes.run import start
from coati.trainer import RewardModelTrainer
from coati.utils.logging import get_logger

logger = get_logger(__name__)


def main(settings: RMSettings) -> None:
    run = start(settings)
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
