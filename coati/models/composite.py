"""Multimodal checkpoints for text training: the language model of a ``...ForConditionalGeneration``
is loaded alone, and the checkpoint is saved whole again around it."""

import copy
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coati.utils.json_io import load_json
from coati.utils.logging import get_logger
from coati.utils.transformers_compat import (
    body_name,
    config_dtype,
    disk_names,
    dtype_keyword,
    set_config_dtype,
    text_config,
)

logger = get_logger(__name__)

# Files beside the weights that a multimodal model is used with.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_MODALITIES = ("vision_config", "audio_config")


def is_composite(config: Any) -> bool:
    """Whether ``config`` is that of a multimodal model of transformers with a language model
    inside."""
    if not type(config).__module__.startswith("transformers.models."):
        return False  # code of the checkpoint's own
    has_more = any(getattr(config, name, None) is not None for name in _MODALITIES)
    return has_more and text_config(config) is not config


@dataclass(frozen=True)
class Composite:
    """The multimodal checkpoint around a language model.

    Attributes:
        path: its directory or hub name, as it was loaded.
        config: the whole model's configuration.
        model_class: the whole model's class.
        base: name of the language model's body in it; ``head``: that of the vocabulary head.
        text_base: name of that body in the language model (``model``); ``text_head``: its head's.
        tied: whether the vocabulary head shares the input embedding's weight.
    """

    path: str
    config: Any
    model_class: type
    base: str
    head: str
    text_base: str
    text_head: str
    tied: bool

    def __deepcopy__(self, memo: dict) -> "Composite":
        return self  # a model is copied with it

    def whole_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` of the language model by its names in memory, under the names that the whole
        model's ``save_pretrained`` writes."""
        return disk_names(self._skeleton, {self._whole_name(n): t for n, t in tensors.items()})

    def _whole_name(self, name: str) -> str:
        for inner, outer in ((self.text_base, self.base), (self.text_head, self.head)):
            if name.startswith(f"{inner}."):
                return outer + name[len(inner) :]
        raise ValueError(f"{name} is no weight of {self.model_class.__name__}'s language model")

    @cached_property
    def _skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return self.model_class(self.config)

    @cached_property
    def _text_names(self) -> set[str]:
        """Names on disk of the language model's weights."""
        mine = (f"{self.base}.", f"{self.head}.")
        tensors = {n: t for n, t in self._skeleton.state_dict().items() if n.startswith(mine)}
        return set(disk_names(self._skeleton, tensors))

    def config_around(self, text: Any) -> Any:
        """The whole model's configuration with ``text`` as that of its language model."""
        config = copy.deepcopy(self.config)
        config.text_config = copy.deepcopy(text)
        if text.tie_word_embeddings == self.tied:  # as it was loaded, so the two flags stay too
            config.text_config.tie_word_embeddings = self.config.text_config.tie_word_embeddings
        else:
            config.tie_word_embeddings = text.tie_word_embeddings
        if (dtype := config_dtype(text)) is not None:
            set_config_dtype(config, dtype)
        return config

    def is_there(self) -> bool:
        """Whether the checkpoint can still be read."""
        try:
            return bool(_file(self.path, "config.json"))
        except (OSError, ValueError):  # transformers 4 takes a missing directory for a hub name
            return False

    def others(self) -> Iterator[dict[str, Tensor]]:
        """The weights that are not the language model's, {name on disk: tensor} of each file of
        ``path``, bit for bit.

        Raises:
            OSError: if the checkpoint is no longer there.
        """
        from safetensors import safe_open

        files = _weight_files(self.path)
        names: set[str] = set()
        for file in files:
            with safe_open(file, "pt") as held:
                names |= set(held.keys())
        if not files or len(self._text_names - names) > 1:  # 1: a tied head is written nowhere
            yield from self._others_by_loading()
            return
        for file in files:
            with safe_open(file, "pt") as held:
                mine = [name for name in held.keys() if name not in self._text_names]
                if mine:
                    yield {name: held.get_tensor(name) for name in mine}

    def _others_by_loading(self) -> Iterator[dict[str, Tensor]]:
        """:meth:`others` of a checkpoint in pickled files or with the names of an older release."""
        model = _load_whole(self.model_class, self.path, {dtype_keyword(): "auto"})[0]
        tensors = disk_names(model, dict(model.state_dict()))
        kept = {name: tensor for name, tensor in tensors.items() if name not in self._text_names}
        yield {name: tensor.contiguous() for name, tensor in kept.items()}

    def copy_processor(self, folder: Path) -> None:
        """Copy what prepares images and sound for the model beside its weights."""
        for name in PROCESSOR_FILES:
            found = _file(self.path, name)
            if found and Path(found).resolve() != (folder / name).resolve():
                shutil.copyfile(found, folder / name)


_QUIET = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def _weight_files(path: str) -> list[str]:
    """The safetensors files of a directory or of a hub name."""
    if one := _file(path, "model.safetensors"):
        return [one]
    index = _file(path, "model.safetensors.index.json")
    parts = sorted(set(load_json(index)["weight_map"].values())) if index else []
    return [file for part in parts if (file := _file(path, part))]


def _file(path: str, name: str) -> str | None:
    """``name`` in a directory, or in the cache of a hub name; None where it is not."""
    from transformers.utils import cached_file

    return cached_file(path, name, **_QUIET)


def _load_whole(model_class: type, path: str | os.PathLike, options: dict[str, Any]):
    return model_class.from_pretrained(path, output_loading_info=True, **options)  # type: ignore


def classes_of(path: str | os.PathLike, config: Any) -> tuple[Any, Any]:
    """The classes of the language model and of the whole model of ``path``.

    Raises ValueError if transformers lacks one of them.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = text_config(config)
    text_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    named = (getattr(config, "architectures", None) or [""])[0]
    whole_class = getattr(transformers, named, None)
    if text_class is None or whole_class is None:
        missing = f"no model class {named!r}" if text_class else "no causal language model"
        raise ValueError(
            f"{path}: a {config.model_type} model whose text part is {text.model_type}; "
            f"transformers {transformers.__version__} has {missing} for it, so it cannot be "
            "trained on text; use a text model, or a multimodal one whose text part is one"
        )
    return text_class, whole_class


def load_text_part(path: str | os.PathLike, config: Any, options: dict[str, Any]):
    """The language model of the multimodal checkpoint ``path``, and the whole one's loading
    report.

    The model's ``composite`` says what it was taken from. ``options``: keywords of
    ``from_pretrained``. Raises as :func:`classes_of`.
    """
    text_class, whole_class = classes_of(path, config)
    whole, report = _load_whole(whole_class, path, options)
    base, body = _body_of(whole, text_config(config).model_type)
    if hasattr(body, "lm_head"):  # the language model with its head is inside as it is
        model = body
        head = f"{base}.lm_head"
        text_base = body_name(model)
        base = f"{base}.{text_base}"
    else:
        with torch.device("meta"):
            model = text_class(body.config)
        text_base = body_name(model)
        setattr(model, text_base, body)
        head = "lm_head"
        model.set_output_embeddings(whole.get_output_embeddings())
        model.generation_config = whole.generation_config
    vocabulary_head = model.get_output_embeddings()
    tied = vocabulary_head.weight is model.get_input_embeddings().weight
    text_head = _name_of(model, vocabulary_head)
    model.composite = Composite(
        str(path),
        copy.deepcopy(whole.config),
        type(whole),
        base,
        head,
        text_base,
        text_head,
        tied,
    )
    model.config.tie_word_embeddings = tied  # which the whole one's configuration decides
    model.name_or_path = model.config._name_or_path = str(path)
    logger.info(
        f"{path} is a {config.model_type} model for text and more; its language model "
        f"({type(model).__name__}) is trained, and saved together with the other weights, which "
        "stay as they are"
    )
    return model.eval(), report


def _body_of(whole: nn.Module, model_type: str) -> tuple[str, nn.Module]:
    """Name and module of the language model in ``whole``."""
    return next(
        (name, module)
        for name, module in whole.named_modules()
        if getattr(getattr(module, "config", None), "model_type", None) == model_type
    )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
