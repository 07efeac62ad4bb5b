"""GRPO and its kin: several answers to each prompt are compared with each other. ``train_grpo.py
--help`` lists the flags, docs/rlhf.md explains them."""

from argparse import Namespace

from coati.cli.rollouts import parse_grpo


def main(args: Namespace) -> None:
    from coati.recipes import build, data, finish, rl_models
    from coati.recipes import resume as restart
    from coati.recipes import rl as online
    from coati.recipes import rl_dry_run as online_dry_run
    from coati.trainer import OLTrainer

    options = build.start(args)
    resume = restart.find_resume(args)
    restart.record_arguments(args)
    tokenizer, template = build.tokenizer_and_template(args)
    functions = online.rewards(args, template)
    prompts, evaluation, ptx = online.rows(args, options, tokenizer, template, functions)
    state = restart.running_state(args, resume, prompts)
    plan = data.epoch_plan(args, prompts)
    episodes = online.episodes(args)
    models = args, options, tokenizer, resume, episodes.total_steps, template
    actor, actor_assets = rl_models.actor_engine(*models)
    trainer = OLTrainer(
        **online.parts(args, options, tokenizer, template, functions, episodes, actor),
        **online.progress(args, resume, state),
        assets={"actor": actor_assets},
    )
    windows, asked, supervised = online.loaders(
        args, actor, tokenizer, prompts, evaluation, ptx, plan
    )
    if args.dry_run:
        return online_dry_run.dry_run(args, trainer, windows, supervised)
    trainer.run(windows, asked, supervised, args.log_dir, args.use_wandb)
    finish.save_models_of(args, trainer)


if __name__ == "__main__":
    arguments = parse_grpo()
    from coati.recipes.finish import guarded

    guarded("train_grpo.py", main, arguments)
