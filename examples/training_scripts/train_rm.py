"""Stage 2: a reward model from pairs of answers. ``train_rm.py --help`` lists the flags,
docs/preferences.md explains them."""

from argparse import Namespace

from coati.cli.preferences import parse_rm


def main(args: Namespace) -> None:
    from functools import partial

    from coati.dataset import DataCollatorForPreferenceDataset
    from coati.models import RewardModel, load_scalar_model
    from coati.recipes import build, data, finish
    from coati.recipes import resume as restart
    from coati.trainer import RewardModelTrainer
    from coati.utils.logging import get_logger

    logger = get_logger(__name__)

    options = build.start(args)
    resume = restart.find_resume(args)
    restart.record_arguments(args)
    tokenizer, template = build.tokenizer_and_template(args)
    train = data.rows_of(args.dataset, args, tokenizer, template, type="preference")
    evaluation = data.evaluation_rows(args, tokenizer, template, "preference")
    state = restart.running_state(args, resume, train)
    plan = data.epoch_plan(args, train)
    data.check_rows(args, options, plan)
    model = build.reward_model(args, options, tokenizer, resume)
    assets = build.assets(model, tokenizer, template)
    engine = build.engine(args, options, model, plan, resume)
    collate = DataCollatorForPreferenceDataset(
        tokenizer, args.max_length, pad_to_multiple_of=options.sequence_multiple
    )
    windows, evaluation_batches = build.loaders(args, engine, train, evaluation, collate, plan)
    trainer = RewardModelTrainer(
        engine=engine,
        loss_fn=args.loss_fn,
        center_coef=args.center_coef,
        max_epochs=args.max_epochs,
        accumulation_steps=args.accumulation_steps,
        schedule=build.plan(args),
        state=state,
        assets=assets,
    )
    if args.dry_run:
        return finish.dry_run(args, trainer, windows, partial(load_scalar_model, RewardModel))
    trainer.fit(windows, evaluation_batches, args.log_dir, args.use_wandb)
    finish.save_final(args, trainer, finish.SCORE)
    for line in trainer.report():
        logger.info(line)


if __name__ == "__main__":
    arguments = parse_rm()
    from coati.recipes.finish import guarded

    guarded("train_rm.py", main, arguments)
