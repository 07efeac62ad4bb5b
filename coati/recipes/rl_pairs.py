"""Online DPO: rollouts, scores, the best and the worst response to each prompt, DPO on them."""

from contextlib import closing
from typing import Any

from coati.cli.online_settings import OnlineDPOSettings
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.models.generation.end_tokens import stop_sequences
from coati.models.loss_registry import needs_reference
from coati.recipes import rl
from coati.recipes.extras import NO_EXTRAS, Extras
from coati.recipes.reference_model import reference
from coati.recipes.reward_sets import pass_at, reward_functions
from coati.recipes.rl_models import load_actor, load_reward_model
from coati.recipes.run import Run, start
from coati.recipes.run_dir import refuse_shorter
from coati.trainer.monitor.pair_checks import PairChecks
from coati.trainer.online_dpo import OnlineDPOTrainer, PairLossSettings, assemble_online_dpo


def main(settings: OnlineDPOSettings, extras: Extras = NO_EXTRAS) -> None:
    """Train as ``settings`` say, and save the model."""
    run: Run[Any] = start(settings, extras)
    functions = reward_functions(run)
    rows = rl.load_data(run, functions)
    episodes = rl.episodes_of(settings)
    buffer_state = rl.buffer_state_of(run)
    inside = rl.inside_episode(buffer_state, rows.state, settings)
    total_steps = episodes.total_steps_from(rows.state, inside)
    refuse_shorter(settings.output, episodes.num_episodes, "episode")
    actor = load_actor(run, total_steps)
    stops = stop_sequences(run.template.stop_ids, run.tokenizer, actor.engine.model)
    reward_model = load_reward_model(run, actor)
    ref = settings.reference
    wanted = needs_reference(settings.loss.loss_type) and not ref.disable_reference_model
    offload = settings.rollout.offload_inference_models
    rollout = rl.rollout_of(run, actor, stops)
    parts = assemble_online_dpo(
        _experience(run, stops),
        PairLossSettings(loss=extras.loss, **vars(settings.loss)),
        actor=actor.engine,
        reference=reference(run, actor.engine, ref.ref_tp, offload) if wanted else None,
        rollout=rollout,
        scorer=rl.scorer_of(run, reward_model, functions),
        tokenizer=run.tokenizer,
        micro_batch_size=settings.update.train_batch_size,
        episodes=episodes,
        ptx_coef=settings.ptx.ptx_coef,
    )
    trainer = OnlineDPOTrainer(
        **parts,
        schedule=settings.schedule,
        state=rows.state,
        assets={"actor": actor.assets},
        buffer_state=buffer_state,
        rollouts=rl.rollouts_ahead_of(run),
        checks=_checks(run),
        pass_at=pass_at(run, functions),
        settings=run.flags,
        callbacks=() if settings.output.dry_run else extras.callbacks,
    )
    with closing(rollout):
        rl.train(run, trainer, {"actor": actor}, rows)


def _experience(run: Run[OnlineDPOSettings], stops: list[list[int]]) -> ExperienceSettings:
    settings = run.settings
    rollout = settings.rollout
    return ExperienceSettings(
        max_new_tokens=rollout.max_seq_len,
        stop_sequences=stops,
        num_generations=rollout.num_generations,
        kl_in="loss",  # the reference's log-probs are kept with the pairs
        reward_clip=None,
        missing_eos_penalty=settings.reward.missing_eos_penalty,
        rollout_batch_size=rollout.inference_batch_size,
        forward_batch_size=rollout.logits_forward_batch_size,
        seed=settings.seed,
    )


def _checks(run: Run[OnlineDPOSettings]) -> PairChecks:
    settings = run.settings
    sampling = settings.sampling
    return PairChecks(
        top_k=sampling.top_k or None,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        ptx_coef=settings.ptx.ptx_coef,
        reward_clip=None,
        max_new_tokens=settings.rollout.max_seq_len,
        rollouts_ahead=settings.rollout.rollouts_ahead,
        fp32=run.options.precision == "fp32",
    )
