"""How a reward fails that asks something outside of this process."""


class RowFailed(ValueError):
    """What is wrong with one response of a batch; ``row``: which."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class Unreachable(ValueError):
    """Nothing answers there, or not in time: no response is to blame."""


class Rejected(ValueError):
    """There is an answer that cannot be used. ``row``: the response that it names; ``passing``:
    whether another try may do better."""

    def __init__(self, message: str, row: int | None = None, passing: bool = False) -> None:
        super().__init__(message)
        self.row = row
        self.passing = passing
