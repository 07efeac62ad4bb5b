"""Distillation from a teacher, on the rows' responses and the student's own."""

from coati.cli.distilling import GKDSettings, gkd_parser, parse_gkd
from coati.cli.verb import Verb
from coati.recipes.extras import NO_EXTRAS, Extras

VERB = Verb("training", gkd_parser, parse_gkd, "coati.recipes.verbs.gkd:main", processes=True)


def main(settings: GKDSettings, extras: Extras = NO_EXTRAS) -> None:
    """Train as ``settings`` say, and save the model."""
    from coati.dataset import DataCollatorForSupervisedDataset
    from coati.recipes import build, offline
    from coati.recipes.run import start
    from coati.recipes.teacher_model import on_policy, teacher
    from coati.trainer import GKDTrainer

    run = start(settings, extras)
    rows = offline.load_data(run, "sft")
    taught_by = teacher(run, rows)
    model = offline.boosted(run, rows, build.policy(run))
    trainer = GKDTrainer(
        teacher=taught_by,
        on_policy=on_policy(run, model.engine, taught_by),
        beta=settings.loss.gkd_beta,
        sft_coef=settings.loss.sft_coef,
        **offline.trainer_keywords(run, rows, model),
    )
    offline.fit(run, trainer, rows, build.collator(run, DataCollatorForSupervisedDataset))
