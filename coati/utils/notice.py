"""What the library tells its user outside metrics: one line on standard error, from rank 0 alone."""

import os
import sys

_said: set[str] = set()


def _speaks() -> bool:
    # The launcher's variable, not torch.distributed: notices are needed before a process group exists.
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print ``coati: text`` on standard error of rank 0."""
    if not _speaks():
        return
    # A bar that is being drawn would share its line with the notice.
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is not None:
        tqdm.write(f"coati: {text}", file=sys.stderr)
    else:
        print(f"coati: {text}", file=sys.stderr, flush=True)


def say_once(text: str) -> None:
    """:func:`say`, but the same text only once per process."""
    if text not in _said:
        _said.add(text)
        say(text)
