"""What is said of a failed save follows the error, not the place where it happened."""

import errno
import os

import pytest

from coati.parallel.save_causes import cause_of, errno_of


def wrapped(error: BaseException) -> BaseException:
    """As libraries pass an error of the system on: another class, the first as its cause."""
    try:
        try:
            raise error
        except OSError as inner:
            raise RuntimeError("could not write") from inner
    except RuntimeError as outer:
        return outer


def of(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error, said",
    [
        (of(errno.ENOSPC), "free space"),
        (wrapped(of(errno.ENOSPC)), "free space"),
        (of(errno.EDQUOT), "quota is used up"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "free space"),
        (PermissionError(errno.EACCES, "denied"), "not writable by this user"),
        (wrapped(of(errno.EROFS)), "is read-only now"),
        (of(errno.ESTALE), "still there and mounted"),
        (FileNotFoundError(errno.ENOENT, "gone"), "still there and mounted"),
        (TypeError("not JSON serializable"), "neither disk nor rights are at fault"),
        (ValueError("GenerationConfig is invalid"), "neither disk nor rights are at fault"),
    ],
)
def test_the_remedy_follows_the_cause(tmp_path, error, said):
    cause = cause_of(error, tmp_path / "not" / "yet", "tokenizer_config.json")
    assert said in cause.remedy and type(error).__name__ in cause.text
    assert cause.text.startswith("tokenizer_config.json: ")
    assert ("free space" in cause.remedy) == ("free space" in said or "quota" in said)
    assert "\n" not in cause.text


def test_a_number_is_found_through_causes_and_contexts_but_not_invented():
    assert errno_of(wrapped(of(errno.EROFS))) == errno.EROFS
    assert errno_of(RuntimeError("28 is a number")) is None
    loop = ValueError("a")
    loop.__cause__ = loop
    assert errno_of(loop) is None


def test_the_remedy_names_no_directory_that_is_removed_again(tmp_path):
    folder = tmp_path / "out" / ".epoch-0_step-3.tmp" / "modeling"
    folder.mkdir(parents=True)
    remedy = cause_of(of(errno.ENOSPC), folder, "model.safetensors").remedy
    assert remedy.startswith(f"{tmp_path / 'out'} has ")
