"""Failures that a user can mend."""


class RunFailed(RuntimeError):
    """A failure that its message explains: programs end with that line instead of a traceback."""
