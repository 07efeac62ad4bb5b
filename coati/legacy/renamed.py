"""Modules and public names of earlier releases, and what each is called today.

``coati/__init__.py`` and :func:`~coati.utils.lazy.lazy_exports` look here once a name is not found.
Imports nothing heavy.
"""

import warnings
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "coati.cli.build": "coati.recipes.build",
    "coati.cli.config": "coati.cli.parser",
    "coati.cli.data": "coati.recipes.data",
    "coati.cli.finish": "coati.recipes.finish",
    "coati.cli.machine": "coati.recipes.defaults",
    "coati.cli.online": "coati.recipes.rl",
    "coati.cli.legacy": "coati.legacy.flags",
    "coati.cli.legacy_ppo": "coati.legacy.flags_rl",
    "coati.cli.legacy_preferences": "coati.legacy.flags_preferences",
    "coati.cli.online_dry_run": "coati.recipes.dry_run",
    "coati.cli.preference_data": "coati.recipes.data_checks",
    "coati.cli.prompt_data": "coati.recipes.data_checks",
    "coati.cli.references": "coati.recipes.reference_model",
    "coati.cli.restart": "coati.recipes.resume",
    "coati.cli.rl_models": "coati.recipes.rl_models",
    "coati.cli.samples": "coati.recipes.eval_samples",
    "coati.dataset.cleaning": "coati.dataset.clean.cleaning",
    "coati.dataset.collator": "coati.dataset.load.collator",
    "coati.dataset.conversation": "coati.dataset.chat.conversation",
    "coati.dataset.encoding": "coati.dataset.chat.chat_encoder",
    "coati.dataset.file_kinds": "coati.dataset.rows.readers",
    "coati.dataset.json_array": "coati.dataset.rows.readers",
    "coati.dataset.kto_loader": "coati.dataset.load.loader",
    "coati.dataset.limits": "coati.dataset.prepare.validation",
    "coati.dataset.loader": "coati.dataset.load.loader",
    "coati.dataset.masked_text": "coati.dataset.chat.masked_text",
    "coati.dataset.messages": "coati.dataset.rows.messages",
    "coati.dataset.near": "coati.dataset.clean.minhash",
    "coati.dataset.normal": "coati.dataset.clean.text_normalization",
    "coati.dataset.order": "coati.dataset.load.epoch_order",
    "coati.dataset.outputs": "coati.dataset.prepare.staging",
    "coati.dataset.overlap": "coati.dataset.clean.overlap",
    "coati.dataset.packing": "coati.dataset.load.packing",
    "coati.dataset.pipeline": "coati.dataset.prepare.write_pass",
    "coati.dataset.plan": "coati.dataset.prepare.shard_plan",
    "coati.dataset.prompts": "coati.dataset.rows.prompt_sample",
    "coati.dataset.provenance": "coati.dataset.metadata",
    "coati.dataset.reasons": "coati.dataset.rows.row_errors",
    "coati.dataset.report_charts": "coati.dataset.report.charts",
    "coati.dataset.report_html": "coati.dataset.report.html",
    "coati.dataset.report_warnings": "coati.dataset.report.report_warnings",
    "coati.dataset.scripts": "coati.dataset.report.writing_systems",
    "coati.dataset.shapes": "coati.dataset.rows.formats",
    "coati.dataset.shards": "coati.dataset.prepare.shards",
    "coati.dataset.source_row": "coati.dataset.rows.source_row",
    "coati.dataset.sources": "coati.dataset.rows.input_files",
    "coati.dataset.survey": "coati.dataset.prepare.dedup_pass",
    "coati.dataset.tally": "coati.dataset.report.row_stats",
    "coati.dataset.template": "coati.dataset.chat.template",
    "coati.dataset.template_check": "coati.dataset.chat.template_probe",
    "coati.dataset.template_file": "coati.dataset.chat.template_file",
    "coati.dataset.template_lint": "coati.dataset.chat.template_lint",
    "coati.dataset.tokenization": "coati.dataset.rows.tokenization",
    "coati.dataset.words": "coati.dataset.chat.word_cache",
    "coati.dataset.workers": "coati.dataset.prepare.workers",
    "coati.experience_buffer.equation": "coati.experience_buffer.batch_sizes",
    "coati.experience_maker.batches": "coati.experience_maker.model_inputs",
    "coati.experience_maker.collected": "coati.experience_maker.rollout_batch",
    "coati.experience_maker.names": "coati.experience_maker.advantage_registry",
    "coati.experience_maker.running": "coati.experience_maker.running_moments",
    "coati.inference.answers": "coati.inference.evaluate.generate_responses",
    "coati.inference.batch": "coati.models.generation.decoder",
    "coati.inference.card": "coati.inference.export.model_card",
    "coati.inference.compare": "coati.inference.evaluate.win_rate",
    "coati.inference.cut": "coati.inference.serve.stop_strings",
    "coati.inference.gguf_file": "coati.inference.export.gguf",
    "coati.inference.loading": "coati.inference.model_loading",
    "coati.inference.measure": "coati.inference.export.measures",
    "coati.inference.metrics": "coati.inference.serve.server_metrics",
    "coati.inference.protocol": "coati.inference.serve.protocol",
    "coati.inference.quantisation": "coati.inference.quantized_loading",
    "coati.inference.quantise": "coati.inference.export.quantization",
    "coati.inference.scoring": "coati.inference.evaluate.score_rows",
    "coati.inference.service": "coati.inference.serve.inference_engine",
    "coati.inference.web": "coati.inference.serve.web",
    "coati.inference.web_edges": "coati.inference.serve.middleware",
    "coati.models.attention": "coati.models.sdpa",
    "coati.models.choice": "coati.models.generation.sampling",
    "coati.models.decoding": "coati.models.generation.decoder",
    "coati.models.kv_cache": "coati.models.generation.kv_cache",
    "coati.models.lora_files": "coati.models.lora.adapter_files",
    "coati.models.lora_layers": "coati.models.lora.layers",
    "coati.models.loss_names": "coati.models.loss_registry",
    "coati.models.noise": "coati.models.generation.row_noise",
    "coati.models.padding": "coati.models.logprobs",
    "coati.models.policy_names": "coati.models.policy_registry",
    "coati.models.prepack": "coati.models.generation.prepacked_linear",
    "coati.models.quant_names": "coati.models.quantization_registry",
    "coati.models.samples": "coati.models.generation.response_table",
    "coati.models.scalar": "coati.models.scalar_loading",
    "coati.models.utils": "coati.models.loading",
    "coati.models.varlen": "coati.models.padding_free",
    "coati.parallel.amp": "coati.parallel.compat.amp",
    "coati.parallel.cpu": "coati.parallel.compat.cpu",
    "coati.parallel.cpu.accelerator": "coati.parallel.compat.cpu.accelerator",
    "coati.parallel.cpu.adam": "coati.parallel.compat.cpu.adam",
    "coati.parallel.cpu.attention": "coati.parallel.compat.cpu.attention",
    "coati.parallel.cpu.collectives": "coati.parallel.compat.cpu.collectives",
    "coati.parallel.cpu.heap": "coati.parallel.compat.cpu.malloc",
    "coati.parallel.cpu.patches": "coati.parallel.compat.cpu.patches",
    "coati.parallel.files": "coati.parallel.atomic_dirs",
    "coati.parallel.mends": "coati.parallel.compat.fixes",
    "coati.parallel.patch": "coati.parallel.compat.patch",
    "coati.parallel.quiet": "coati.parallel.compat.import_colossalai",
    "coati.parallel.reference": "coati.parallel.inference_model",
    "coati.parallel.sampling": "coati.parallel.sharded_generation",
    "coati.parallel.schedule": "coati.parallel.optimizer",
    "coati.parallel.step": "coati.parallel.objective",
    "coati.rewards.legacy": "coati.legacy.token_rewards",
    "coati.rewards.names": "coati.rewards.registry",
    "coati.trainer.bar": "coati.trainer.progress",
    "coati.trainer.best": "coati.trainer.best_checkpoint",
    "coati.trainer.episode_history": "coati.trainer.monitor.episode_history",
    "coati.trainer.online_metrics": "coati.trainer.monitor.sample_table",
    "coati.trainer.online_record": "coati.trainer.monitor.rl_reporter",
    "coati.trainer.online_signs": "coati.trainer.monitor.rl_checks",
    "coati.trainer.policy": "coati.trainer.policy_objective",
    "coati.trainer.precompute": "coati.trainer.precompute_reference",
    "coati.trainer.rl": "coati.trainer",
    "coati.trainer.rl_parts": "coati.trainer.boosted_rl",
    "coati.trainer.signs": "coati.trainer.monitor.preference_diagnostics",
    "coati.trainer.strategies": "coati.legacy.strategies",
    "coati.trainer.verdict": "coati.trainer.monitor.reward_model_report",
    "coati.trainer.windows": "coati.trainer.global_batches",
    "coati.utils.columns": "coati.utils.text_table",
    "coati.utils.notice": "coati.utils.logging",
}

# package, or module of MODULES -> old public name -> (module, name) of today
NAMES: dict[str, dict[str, tuple[str, str]]] = {
    "coati.experience_buffer": {
        "windows_per_episode": ("coati.experience_buffer.batch_sizes", "optimizer_steps_per_pass"),
    },
    "coati.experience_maker": {
        "Collected": ("coati.experience_maker.rollout_batch", "RolloutBatch"),
        "RunningNormalisation": ("coati.experience_maker.running_moments", "RunningNormalization"),
    },
    "coati.experience_maker.running": {
        "KLController": ("coati.experience_maker.kl_controller", "KLController"),
        "RunningNormalisation": ("coati.experience_maker.running_moments", "RunningNormalization"),
    },
    "coati.models.utils": {
        "check_vocabulary": ("coati.models.tokenizer", "check_vocabulary"),
        "load_tokenizer": ("coati.models.tokenizer", "load_tokenizer"),
    },
    "coati.parallel.reference": {
        "Reference": ("coati.parallel.inference_model", "InferenceModel"),
        "freeze": ("coati.parallel.inference_model", "boost_for_inference"),
    },
    "coati.parallel.step": {"Part": ("coati.parallel.objective", "LossPart")},
    "coati.rewards": {"Scored": ("coati.rewards.scorer", "RewardResult")},
    "coati.trainer": {"Plan": ("coati.trainer.schedule", "RunSchedule")},
}


class _TodaysModule(Loader):
    """Gives the module of today itself; where some of the names have gone elsewhere, one that finds
    them there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        today = import_module(self.name)
        self.spec = today.__spec__
        if spec.name not in NAMES:
            return today
        module = ModuleType(spec.name, today.__doc__)

        def find(name: str) -> Any:
            elsewhere = name in NAMES[spec.name]
            return renamed_export(spec.name, name) if elsewhere else getattr(today, name)

        module.__getattr__ = find  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has been executed under its own name."""
        if module.__name__ == self.name:
            module.__spec__ = self.spec  # which importing it under the old name has replaced


def spec_of_renamed(old: str) -> ModuleSpec | None:
    """Where the module that was called ``old`` is found; None where there never was one. Warns with
    DeprecationWarning."""
    new = MODULES.get(old)
    if new is None:
        return None
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
    return ModuleSpec(old, _TodaysModule(new))


def renamed_export(package: str, old: str) -> Any:
    """What ``package`` exported as ``old``. Warns with DeprecationWarning.

    Raises AttributeError for a name that it never had.
    """
    if old not in NAMES.get(package, {}):
        raise AttributeError(f"module {package!r} has no attribute {old!r}")
    module, name = NAMES[package][old]
    warnings.warn(f"{package}.{old} is now {module}.{name}", DeprecationWarning, stacklevel=3)
    return getattr(import_module(module), name)
