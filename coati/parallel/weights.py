"""Weights of any plugin as an ordinary Hugging Face directory: whole tensors, tied ones once,
safetensors."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from coati.models import ilql_heads
from coati.models.composite import Composite
from coati.models.generation_settings import mended, with_end_tokens
from coati.models.lora.lora import merged
from coati.parallel.atomic_dirs import make_folder, write_file
from coati.parallel.engine import Engine
from coati.utils.distributed import all_gather_object, is_rank_0
from coati.utils.json_io import save_json
from coati.utils.logging import get_logger
from coati.utils.output_paths import open_like_folder
from coati.utils.transformers_compat import disk_names, set_config_dtype

logger = get_logger(__name__)

MAX_SHARD = "5GB"
TEMPLATE_FILE = "conversation_template.json"


@dataclass
class ModelAssets:
    """What belongs to a model beside its weights.

    ``config`` is taken before boosting, which changes it; ``template`` is
    ``Conversation.to_config()`` or None; ``composite``: the multimodal checkpoint that a language
    model was taken from, which is saved whole again.
    """

    config: Any
    generation_config: Any = None
    tokenizer: Any = None
    template: dict | None = None
    composite: Composite | None = None

    @classmethod
    def of(
        cls, model: nn.Module, tokenizer: Any = None, template: dict | None = None
    ) -> "ModelAssets":
        """Those of ``model``; ``tokenizer`` and ``template`` (a chat template's JSON) are saved
        where they are given."""
        config = copy.deepcopy(model.config)
        config.use_cache = True
        # Written out, it would make transformers take eager attention for a choice when it loads
        # the directory.
        config._attn_implementation_autoset = False
        ilql_heads.name_in(config, ilql_heads.heads_of(model) is not None)
        composite = getattr(model, "composite", None)
        # Models of this library's loaders are mended already; others come from a Python caller.
        generation, _ = mended(getattr(model, "generation_config", None))
        end = getattr(tokenizer, "eos_token_id", None)
        if generation is not None and end is not None:
            generation = with_end_tokens(generation, [end])
        return cls(config, generation, tokenizer, template, composite)


def is_lora(engine: Engine) -> bool:
    """Whether the engine trains adapters instead of the weights."""
    return hasattr(engine.module, "coati_lora")


def gather(engine: Engine) -> dict[str, Tensor]:
    """Whole, unpadded CPU tensors by name: all of them on rank 0, or under a pipeline each stage's
    on its first rank; empty elsewhere. Every rank must call it."""
    if engine.mesh.sharded_forward:
        tensors: dict[str, Tensor] = {}
        for shard, _ in engine.model.state_dict_shard(max_shard_size=1024, only_rank_0=True):
            tensors.update({name: _plain(tensor) for name, tensor in shard.items()})
        return tensors if is_rank_0() else {}
    if hasattr(engine.model, "_force_wait_all_gather"):
        engine.model._force_wait_all_gather()
    writes = engine.mesh.dp_rank == 0 and engine.mesh.is_stage_writer
    mine = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        whole = _whole(tensor)
        if writes:
            mine[name] = _plain(whole)
    return mine


def merged_weights(engine: Engine) -> dict[str, Tensor]:
    """:func:`gather`, adapters merged into the weights that they adapt: the names and tensors of
    the plain model."""
    return _merged(engine)[0] if is_lora(engine) else gather(engine)


def published_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """:func:`merged_weights` one by one, gathered when the first is asked for; every rank must
    exhaust it, or none."""
    yield from merged_weights(engine).items()


def checkpoint_weights(engine: Engine, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of the plain model as a checkpoint of its family has them, which other programs
    read: a tied head left out, experts one by one, under the whole model's names where a language
    model was taken out of a multimodal one."""
    base = _base_of(engine.module)
    return _as_on_disk(base, dict(tensors), base.config, getattr(base, "composite", None))


def _base_of(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def _as_on_disk(
    base: Any, tensors: dict[str, Tensor], config: Any, composite: Composite | None
) -> dict[str, Tensor]:
    if getattr(config, "tie_word_embeddings", False):
        for name in getattr(base, "_tied_weights_keys", None) or []:
            tensors.pop(name, None)
    if composite is not None:
        return composite.whole_names(tensors)
    return disk_names(base, tensors) if hasattr(base, "base_model_prefix") else tensors


def _merged(engine: Engine) -> tuple[dict[str, Tensor], Any]:
    """The plain model's tensors of a model with adapters, and its configuration."""
    adapted: Any = engine.module
    with merged(adapted):
        config = ModelAssets.of(adapted.get_base_model()).config  # merging may untie the embeddings
        tensors = gather(engine)
    plain = {
        _plain_name(name): tensor
        for name, tensor in tensors.items()
        if ".lora_" not in name and ".pissa_" not in name
    }
    return plain, config


def _plain_name(name: str) -> str:
    return re.sub(r"(\.base_layer)+\.", ".", re.sub(r"^base_model\.model\.", "", name))


def _plain(tensor: Tensor) -> Tensor:
    # ColossalAI replaces .detach and .clone of gathered tensors by ones that keep their process
    # group.
    return Tensor.detach(tensor).as_subclass(Tensor).clone().cpu()


def _whole(tensor: Tensor) -> Tensor:
    from colossalai.checkpoint_io.utils import gather_distributed_param
    from colossalai.tensor.padded_tensor import is_padded_tensor, to_unpadded_tensor

    if isinstance(tensor, nn.Parameter):
        tensor = gather_distributed_param(tensor, keep_vars=False)
    return to_unpadded_tensor(tensor) if is_padded_tensor(tensor) else tensor


def save_model(
    engine: Engine, folder: Path, assets: ModelAssets, *, merge_lora: bool = False
) -> None:
    """Write ``folder`` so that transformers (or, with adapters and without ``merge_lora``, peft)
    loads it.

    Every rank must call it. Raises OSError on the rank whose disk is full.
    """
    make_folder(folder)
    config = assets.config
    adapter = is_lora(engine) and not merge_lora
    if is_lora(engine) and merge_lora:
        tensors, config = _merged(engine)
    else:
        tensors = gather(engine)
    tensors, values = ilql_heads.split(tensors)
    composite = None if adapter else _composite_of(assets)
    if not adapter:
        _save_weights(folder, tensors, config, engine.module, composite)
    if composite is not None:
        config = composite.config_around(config)
    if is_rank_0():
        if values:
            write_file(folder / ilql_heads.FILE, partial(save_shard, heads_state(engine, values)))
        if composite is not None:
            composite.copy_processor(folder)
        if adapter:
            from coati.models.lora.adapter_files import save_lora

            write_file(
                folder / "adapter_model.safetensors",
                lambda path: save_lora(engine.module, path.parent, tensors),
            )
        _save_assets(folder, assets, None if adapter else config)


def heads_state(engine: Engine, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is saved of ILQL's heads, whose gathered weights are ``values``."""
    heads = ilql_heads.heads_of(engine.module)
    assert heads is not None
    return ilql_heads.tensors_of(heads, values)


def _composite_of(assets: ModelAssets) -> Composite | None:
    """The multimodal checkpoint to save the model in; None where it has none, or no longer."""
    composite = assets.composite
    if composite is None or all(all_gather_object(composite.is_there())):
        return composite
    logger.error(
        f"{composite.path}, whose language model was trained, is no longer there: the language "
        "model is saved alone. Put the checkpoint back and save again to get the whole"
    )
    return None


def _save_weights(
    folder: Path,
    tensors: dict[str, Tensor],
    config: Any,
    module: nn.Module,
    composite: Composite | None = None,
) -> None:
    tensors = _as_on_disk(_base_of(module), tensors, config, composite)
    shards = (
        [
            {name: tensors[name].contiguous() for name in names}
            for names in split_torch_state_dict_into_shards(
                tensors, max_shard_size=MAX_SHARD
            ).filename_to_tensors.values()
        ]
        if tensors
        else []
    )
    if composite is not None and is_rank_0():
        shards += composite.others()
    everyone = all_gather_object(
        [[(name, t.numel() * t.element_size()) for name, t in s.items()] for s in shards]
    )
    total = sum(map(len, everyone))
    before = sum(map(len, everyone[: dist.get_rank()]))
    for index, shard in enumerate(shards):
        path = folder / _shard_name(before + index, total)
        write_file(path, partial(save_shard, shard))
    if is_rank_0() and total > 1:
        listed = [
            (names, _shard_name(i, total))
            for i, names in enumerate(n for rank in everyone for n in rank)
        ]
        weight_map = {name: file for names, file in listed for name, _ in names}
        size = sum(bytes_ for names, _ in listed for _, bytes_ in names)
        listing = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_file(folder / "model.safetensors.index.json", lambda path: save_json(listing, path))
    if tensors:
        floating = (t.dtype for t in tensors.values() if t.is_floating_point())
        set_config_dtype(config, next(floating, torch.float32))


def save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    """``tensors`` as a safetensors file that transformers and peft read."""
    save_file(tensors, path, metadata={"format": "pt"})
    open_like_folder(path)


def _shard_name(index: int, total: int) -> str:
    return (
        "model.safetensors" if total == 1 else f"model-{index + 1:05d}-of-{total:05d}.safetensors"
    )


def asset_writers(assets: ModelAssets, config: Any | None) -> dict[str, Callable[[Path], object]]:
    """{file: how it is written, given its path} of all that is saved beside the weights. ``config``
    None: an adapter, which has no configuration of a model."""
    writers: dict[str, Callable[[Path], object]] = {}
    if config is not None:
        writers["config.json"] = lambda path: config.save_pretrained(path.parent)
        if assets.generation_config is not None:
            settings = assets.generation_config
            writers["generation_config.json"] = lambda path: settings.save_pretrained(path.parent)
    if assets.tokenizer is not None:
        tokenizer = assets.tokenizer
        writers["tokenizer_config.json"] = lambda path: tokenizer.save_pretrained(path.parent)
    if assets.template is not None:
        writers[TEMPLATE_FILE] = lambda path: save_json(assets.template, path)
    return writers


def _save_assets(folder: Path, assets: ModelAssets, config: Any | None) -> None:
    for name, write in asset_writers(assets, config).items():
        write_file(folder / name, write)
