"""ILQL: offline reinforcement learning from conversations with scores."""

from coati.cli.offline_rl import ilql_parser, parse_ilql
from coati.cli.settings import ILQLSettings
from coati.cli.verb import Verb
from coati.recipes.extras import NO_EXTRAS, Extras

VERB = Verb("training", ilql_parser, parse_ilql, "coati.recipes.verbs.ilql:main", processes=True)


def main(settings: ILQLSettings, extras: Extras = NO_EXTRAS) -> None:
    """Train as ``settings`` say, and save the model and its heads."""
    from coati.dataset import DataCollatorForScoredDataset
    from coati.models.ilql_loss import ILQLLoss
    from coati.recipes import build, offline
    from coati.recipes.data_checks import check_ends, reward_moments
    from coati.recipes.run import start
    from coati.trainer import ILQLTrainer

    run = start(settings, extras)
    rows = offline.load_data(run, "scored")
    check_ends(run, rows.train)
    mean, std = reward_moments(rows.train.rows)
    model = offline.boosted(run, rows, build.policy_with_values(run))
    trainer = ILQLTrainer(
        loss=ILQLLoss(**vars(settings.loss)),
        mean=mean,
        std=std,
        alpha=settings.target_alpha,
        sync_every=settings.target_interval,
        **offline.trainer_keywords(run, rows, model),
    )
    offline.fit(run, trainer, rows, build.collator(run, DataCollatorForScoredDataset))
