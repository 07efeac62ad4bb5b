"""Model directories for other programs: adapters merged, generation compared with plain
transformers, a model card."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coati.inference.export.gguf import Written, check_programs, write_gguf
from coati.inference.export.model_card import run_files
from coati.inference.export.ollama import MODELFILE, modelfile
from coati.inference.model_loading import (
    TEMPLATE,
    Loaded,
    conversation_of,
    load,
)
from coati.models import ilql_heads
from coati.models.generation.detokenize import decode
from coati.models.generation.end_tokens import stop_sequences
from coati.models.generation.loop import generate
from coati.models.generation_settings import with_end_tokens
from coati.models.loading import DTYPES, adapted, adapter_base, find_model, load_causal_lm
from coati.models.lora.lora import merge_lora
from coati.models.tokenizer import find_tokenizer, load_tokenizer
from coati.parallel.atomic_dirs import attempt
from coati.parallel.compat.import_colossalai import silence_known_noise
from coati.utils.dir_lock import DirLock
from coati.utils.logging import get_logger
from coati.utils.output_paths import open_like_folder
from coati.utils.phases import phase
from coati.utils.transformers_compat import dtype_keyword

logger = get_logger(__name__)

PROBES = (
    "Hello, who are you?",
    "Name three colors.",
    "What is 12 + 30?",
    "Write one sentence about the sea.",
)


@dataclass(frozen=True)
class Merged:
    """``difference``: the largest between logits before and after merging; ``largest``: the largest
    logit."""

    difference: float
    largest: float

    @property
    def close(self) -> bool:
        """Whether the two are equal up to the rounding of fp32."""
        return self.difference <= 1e-4 * max(1.0, self.largest)


@contextmanager
def fresh_folder(final: str | os.PathLike) -> Iterator[Path]:
    """A folder that is renamed to ``final`` when the block ends without an error, and removed
    otherwise. One process at a time writes to ``final``.

    Raises ValueError when ``final`` exists already and is not an empty folder, and when another
    process writes there.
    """
    final = Path(final)
    _check_fresh(final)
    lock = DirLock(final, "the output", path=final.with_name(f".{final.name}.lock"))
    lock.acquire()
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        _check_fresh(final)  # another process may have ended meanwhile
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if final.exists():
            final.rmdir()
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock.release()


def _check_fresh(final: Path) -> None:
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{final}: exists already; name a new directory, or remove it")


@phase("writing the model")
def write_model(model: Any, tokenizer: Any, conversation: Any, folder: Path) -> None:
    """Save ``model`` as a Hugging Face directory: the template becomes the tokenizer's chat
    template, and the stop tokens go to generation_config.json, so that other programs stop where
    this library does."""
    write_beside(model, tokenizer, conversation, folder)
    model.save_pretrained(folder, safe_serialization=True, max_shard_size="5GB")
    for weights in folder.glob("*.safetensors"):
        open_like_folder(weights)


def copy_heads(directory: str | os.PathLike, folder: Path, config: Any) -> None:
    """ILQL's heads of ``directory``, which other programs do not decode by, into ``folder``, and
    their name into ``config``; neither where it has none."""
    own = adapter_base(directory) is None
    file = ilql_heads.saved_file(directory, config if own else None)
    ilql_heads.name_in(config, file is not None)
    if file is not None:
        shutil.copyfile(file, folder / ilql_heads.FILE)
        logger.warning_once(
            f"{ilql_heads.FILE} goes along, but coati alone decodes by it: other programs sample "
            "by the policy, as --beta_gen 0 does"
        )


def write_beside(model: Any, tokenizer: Any, conversation: Any, folder: Path) -> None:
    """What :func:`write_model` writes beside the weights; to be called before work that would be
    lost, too. Raises ValueError naming the file that cannot be written, and why."""
    model.config.use_cache = True
    stops = [
        stop[0]
        for stop in stop_sequences(conversation.stop_ids, tokenizer, model)
        if len(stop) == 1
    ]
    settings = with_end_tokens(model.generation_config, stops)
    settings.pad_token_id = tokenizer.pad_token_id
    model.generation_config = settings
    tokenizer.chat_template = conversation.portable_template
    writers: dict[str, Callable[[], object]] = {
        "config.json": lambda: model.config.save_pretrained(folder),
        "generation_config.json": lambda: settings.save_pretrained(folder),
        "tokenizer_config.json": lambda: tokenizer.save_pretrained(folder),
        TEMPLATE: lambda: conversation.save(folder / TEMPLATE),
    }
    for file, write in writers.items():
        if failed := attempt(write, folder, file):
            raise ValueError(f"nothing was written: {failed.text}; {failed.remedy}")


@phase("merging the adapter")
def merge(
    path: str | os.PathLike, output: str | os.PathLike, dtype: str = "fp32", **reading: Any
) -> Merged:
    """Write the adapter of ``path``, merged into its base, to ``output`` in ``dtype``, a key of
    DTYPES.

    The merging is done, and its logits compared, in fp32. What the run left about itself goes
    along, for a model card.
    ``reading``: template, trust_remote_code. Raises ValueError where ``path`` holds no adapter, or
    where merging changed the logits.
    """
    silence_known_noise()
    directory = find_model(path, "actor")
    base = adapter_base(directory)
    if base is None:
        raise ValueError(
            f"{path}: no LoRA adapter (adapter_config.json); a whole model needs no merging"
        )
    code = reading.get("trust_remote_code", False)
    tokenizer = load_tokenizer(find_tokenizer(directory), code)
    conversation = conversation_of(directory, tokenizer, reading.get("template"))
    with fresh_folder(output) as folder:
        model = adapted(
            load_causal_lm(base, dtype="fp32", strict=True, trust_remote_code=code), directory
        ).eval()
        copy_heads(directory, folder, model.get_base_model().config)
        write_beside(model.get_base_model(), tokenizer, conversation, folder)
        before = _logits(model, tokenizer, conversation)
        model = merge_lora(model).eval()
        after = _logits(model, tokenizer, conversation)
        found = Merged(float((before - after).abs().max()), float(before.abs().max()))
        if not found.close:
            raise ValueError(
                f"{path}: merging changed logits by up to {found.difference:.3g}; nothing was "
                "written"
            )
        if dtype != "auto":
            model = model.to(getattr(torch, DTYPES[dtype]))
        write_model(model, tokenizer, conversation, folder)
        for file in run_files(path):
            shutil.copyfile(file, folder / file.name)
    return found


@torch.no_grad()
def _logits(model: Any, tokenizer: Any, conversation: Any) -> Tensor:
    prompts = _prompts(conversation, PROBES)
    return torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in prompts])


def _prompts(conversation: Any, questions: Sequence[str]) -> list[list[int]]:
    return [
        conversation.encode_prompt([{"role": "user", "content": text}]).input_ids
        for text in questions
    ]


@dataclass(frozen=True)
class Checked:
    """Greedy responses of transformers and of this library to the same questions: ``same`` of
    ``asked`` are equal token for token."""

    asked: int
    same: int
    first: str | None = None  # the first difference
    gguf: Written | None = None


@phase("exporting the model")
def export(
    path: str | os.PathLike,
    output: str | os.PathLike,
    card: Callable[[Loaded, Checked], str],
    *,
    dtype: str = "auto",
    max_new_tokens: int = 32,
    questions: Sequence[str] = PROBES,
    gguf: str | None = None,
    **reading: Any,
) -> Checked:
    """Write the model of ``path`` to ``output``, adapters merged, and compare the responses of
    plain transformers with ours.

    ``card`` gives the text of README.md. ``gguf``: weight type of a GGUF file to be written beside
    (:mod:`coati.inference.export.gguf`). Raises ValueError when transformers cannot load the
    directory, or generates otherwise than this library; nothing is written then.
    """
    if gguf:
        check_programs(gguf)
    silence_known_noise()
    directory = find_model(path, "actor")
    code = reading.get("trust_remote_code", False)
    tokenizer = load_tokenizer(find_tokenizer(directory), code)
    conversation = conversation_of(directory, tokenizer, reading.get("template"))
    with fresh_folder(output) as folder:
        model = load_causal_lm(directory, dtype=dtype, strict=True, trust_remote_code=code)
        copy_heads(directory, folder, model.config)
        write_model(model, tokenizer, conversation, folder)
        del model
        ours = load(folder, device="cpu", trust_remote_code=code, beta_gen=0)
        found = check(folder, ours, questions, max_new_tokens, code)
        if found.same != found.asked:
            raise ValueError(
                f"{path}: plain transformers generates otherwise than this library ({found.first})"
            )
        if gguf:
            written = write_gguf(folder, gguf, ours.model, _prompts(ours.conversation, questions))
            found = replace(found, gguf=replace(written, file=Path(output) / written.file.name))
            text = modelfile(written.file.name, ours)
            (folder / MODELFILE).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(card(ours, found), encoding="utf-8")
    return found


def _greedy(model: Any, prompt: Tensor, max_new_tokens: int, **options: Any) -> list[int]:
    """The response of plain transformers."""
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        **options,
    )
    return generated[0, prompt.shape[1] :].tolist()


@phase("comparing with plain transformers")
def check(
    folder: Path,
    ours: Loaded,
    questions: Sequence[str],
    max_new_tokens: int,
    trust_remote_code: bool = False,
) -> Checked:
    """Compare greedy responses of ``ours`` with those of plain transformers on ``folder``: with its
    key-value cache, or else without one. The sliding caches of transformers 4.51 (Gemma 2, Gemma 3,
    Cohere 2) drop the first token one step before they are full."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers import __version__ as version

    theirs = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=trust_remote_code,
        **{dtype_keyword(): ours.model.dtype},
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # transformers knows end tokens alone, no sequences
    stops = [stop for stop in ours.stop_sequences() if len(stop) == 1]
    # Plain greedy decoding is compared, whatever penalties the publisher sets.
    ends = with_end_tokens(theirs.generation_config, [stop[0] for stop in stops]).eos_token_id
    pad = theirs.generation_config.pad_token_id
    theirs.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    stops = [[end] for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    same = 0
    first = None
    system = ours.conversation.system_message
    for question in questions:
        asked = [{"role": "user", "content": question}]
        messages = [{"role": "system", "content": system}, *asked] if system else asked
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        generated = _greedy(theirs, prompt, max_new_tokens)
        ids = torch.tensor(_prompts(ours.conversation, [question]))
        mine = generate(
            ours.model, ids, stop_sequences=stops, max_new_tokens=max_new_tokens, do_sample=False
        ).responses()[0]
        if generated != mine and _greedy(theirs, prompt, max_new_tokens, use_cache=False) == mine:
            logger.warning_once(
                f"plain transformers {version} generates otherwise with its own key-value cache "
                "than without one, as if it had lost a token; without one it responds as this "
                "library does, so the model is exported. Programs that generate with that release "
                "may get other responses from any model of this family"
            )
            generated = mine
        same += generated == mine
        if generated != mine and first is None:
            texts = (decode(tokenizer, ids, False) for ids in (generated, mine))
            first = "to {!r}: {!r}, here {!r}".format(question, *texts)
    return Checked(len(questions), same, first)
