"""Uploading a finished model directory to the Hugging Face hub: what a model consists of, and
nothing else."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from coati.models.ilql_heads import FILE as HEADS
from coati.models.loading import LORA_SETTINGS
from coati.utils.logging import get_logger
from coati.utils.phases import phase

logger = get_logger(__name__)

# What other programs load, and what people read. A run's own files (arguments.json, metrics.jsonl,
# environment.json, logs, checkpoints) name paths and machines: they stay here.
UPLOADED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model", "chat_template.*"),
    *("conversation_template.json", "preprocessor_config.json", "processor_config.json"),
    *("*.gguf", "Modelfile", "README.md", "LICENSE*", "configuration_*.py", "modeling_*.py"),
    *("tokenization_*.py", HEADS, LORA_SETTINGS),  # the last says how the base was quantized
)
# What somebody has put there by mistake.
PRIVATE = ("*.pem", "*.key", "id_rsa*", "id_ed25519*", ".env*", "*.env", "*credential*", "*secret*")
_SECRET = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{30,}|\bAKIA[0-9A-Z]{16}\b|\bghp_[A-Za-z0-9]{36}|"
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
READ = 2**22  # bytes of a file that is looked through for secrets; texts are smaller
TEXTS = (".json", ".jinja", ".md", ".txt", ".py", "")


@dataclass(frozen=True)
class Upload:
    """What of ``folder`` goes up, and what stays."""

    folder: Path
    files: list[Path]
    left: list[str]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.stat().st_size for file in self.files)


def files_to_upload(folder: str | os.PathLike) -> Upload:
    """The files of a model directory that :data:`UPLOADED` names, and the others.

    Raises ValueError for a file with a private name, one that holds what looks like a secret, a
    link that leads out of the folder, and a folder without a model.
    """
    place = Path(folder)
    files = []
    left = []
    for file in sorted(place.iterdir()):
        name = file.name
        if any(fnmatch(name.lower(), pattern) for pattern in PRIVATE):
            raise ValueError(f"--push_to_hub: {file} looks private; take it out of the directory")
        if not file.is_file() or not any(fnmatch(name, pattern) for pattern in UPLOADED):
            left.append(name)
            continue
        if not file.resolve().is_relative_to(place.resolve()):
            raise ValueError(
                f"--push_to_hub: {file} leads out of the directory, to {file.resolve()}; put the "
                "file itself there"
            )
        if file.suffix in TEXTS and _SECRET.search(file.read_bytes()[:READ]):
            raise ValueError(
                f"--push_to_hub: {file} holds what looks like a token or a private key; remove it "
                "there (nothing was uploaded)"
            )
        files.append(file)
    if not any(file.suffix in (".safetensors", ".gguf") for file in files):
        raise ValueError(f"--push_to_hub: {folder} holds no weights to upload")
    return Upload(place, files, left)


def check_hub(repository: str) -> None:
    """Whether the hub can be written to, asked before work that would wait for it.

    Raises ValueError, saying what to do: offline, without a token, with one that may not write.
    """
    if problem := _problem(lambda api: api.whoami(), repository):
        raise ValueError(problem)


@phase("uploading to the hub")
def upload(folder: str | os.PathLike, repository: str) -> str:
    """Upload the model in ``folder``; returns its address. A repository that is not there is made,
    private. What is uploaded is said first.

    Raises ValueError for what :func:`files_to_upload` refuses and where the hub does; the folder is
    as it was.
    """
    found = files_to_upload(folder)
    logger.info(
        f"--push_to_hub: uploading {len(found.files)} files, {found.size / 1e6:,.1f} MB, to "
        f"{_endpoint()}/{repository} (private, if it is new): "
        f"{', '.join(file.name for file in found.files)}"
        + (f"; not uploaded: {', '.join(found.left)}" if found.left else "")
    )
    names = [file.name for file in found.files]

    def send(api: Any) -> None:
        # One that is there stays public or private as it is.
        if not api.repo_exists(repository):
            api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(found.folder),
            allow_patterns=_literally(names),
            commit_message="Upload by coati",
        )

    if problem := _problem(send, repository):
        raise ValueError(f"{problem}. The model is whole in {folder}: {again(folder, repository)}")
    return f"{_endpoint()}/{repository}"


def again(folder: str | os.PathLike, repository: str) -> str:
    """How to upload it by hand."""
    return f"hf upload {repository} {folder}"


def _literally(names: Sequence[str]) -> list[str]:
    """``names`` as patterns that match just these."""
    return [re.sub(r"([*?[])", r"[\1]", name) for name in names]


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _problem(work: Any, repository: str) -> str | None:
    """Do ``work`` with the hub's interface; what is wrong in one sentence, None for nothing."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return (
            f"--push_to_hub {repository}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset "
            "it, or leave the flag out and upload later"
        )
    try:
        work(HfApi())
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        what = " ".join(str(error.server_message or error).split())[:300]
        told = f"--push_to_hub {repository}: the hub answers {status}: {what}"
        if status in (401, 403):
            told += "; log in with a token that may write (hf auth login, or HF_TOKEN)"
        return told
    except Exception as error:  # of whichever HTTP library the release of the hub uses
        name = type(error).__name__
        if name == "LocalTokenNotFoundError":
            return (
                f"--push_to_hub {repository}: no token is known; log in (hf auth login), or set "
                "HF_TOKEN"
            )
        what = " ".join(str(error).split())[:300]
        return (
            f"--push_to_hub {repository}: nothing could be sent to {_endpoint()} ({name}: {what})"
        )
    return None
