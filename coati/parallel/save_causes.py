"""Why a directory could not be written, told apart by what the error says, and what to do."""

import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

REHEARSAL = ".rehearsal-"  # beginning of the name of a directory that is removed again
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
# torch.save and safetensors keep no errno: safetensors writes it into its message.
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


@dataclass(frozen=True)
class SaveCause:
    """``text``: the file and the error; ``remedy``: what to do, as a clause."""

    text: str
    remedy: str


def cause_of(error: BaseException, folder: Path, file: str = "") -> SaveCause:
    """Of ``error`` while ``file`` was written below ``folder``."""
    named = f"{file}: " if file and file not in str(error) else ""
    said = " ".join(str(error).split())
    return SaveCause(f"{named}{type(error).__name__}: {said}", _remedy(error, folder, file))


def _remedy(error: BaseException, folder: Path, file: str) -> str:
    place = existing_folder(folder)
    number = errno_of(error)
    free = shutil.disk_usage(place).free
    if number in _FULL or (number is None and _is_torch_writer(error) and free < 2**20):
        quota = ", of which your quota is used up" if number == errno.EDQUOT else ""
        return (
            f"{place} has {free / 2**30:.2f} GiB free{quota}; free space or choose another "
            "--save_dir"
        )
    if number == errno.EROFS:  # an ext4 that met an error turns read-only by itself
        return (
            f"the file system of {place} is read-only now; mount it writable again or choose "
            "another --save_dir"
        )
    if number in _FORBIDDEN:
        return f"{place} is not writable by this user; change that or choose another --save_dir"
    if number is not None:
        return (
            f"the file system of {place} refused it ({os.strerror(number)}); see that it is still "
            "there and mounted, or choose another --save_dir"
        )
    what = file or "what is saved"
    return (
        f"neither disk nor rights are at fault, but {what} itself, which cannot be written as it "
        "is; correct it where --pretrain (or --tokenizer_dir) has it"
    )


def errno_of(error: BaseException | None) -> int | None:
    """The system's error number of ``error`` or of what it came from; None without one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := _OS_ERROR.search(str(error)):
            return int(found[1] or found[2])
        error = error.__cause__ or error.__context__
    return None


def _is_torch_writer(error: BaseException) -> bool:
    """Whether ``torch.save`` failed while it wrote: it says "unexpected pos" for a full disk."""
    return "unexpected pos" in str(error) or "PytorchStreamWriter" in str(error)


def existing_folder(folder: Path) -> Path:
    """``folder``, or the nearest one above it that exists and stays: not one that is written under
    a temporary name."""
    folder = folder.absolute()
    for above in (folder, *folder.parents):
        if above.name.startswith(".") and above.name.endswith(".tmp"):
            folder = above.parent
    while not folder.exists():
        folder = folder.parent
    return folder
