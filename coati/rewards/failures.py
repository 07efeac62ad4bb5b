"""How a reward fails that asks something outside of this process."""


class RowFailed(ValueError):
    """What is wrong with one response of a batch; ``row``: which."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class Unreachable(ValueError):
    """There is nothing that answers as it should, or not in time: no response is to blame.
    ``passing``: whether another try may do better."""

    def __init__(self, message: str, passing: bool = True) -> None:
        super().__init__(message)
        self.passing = passing


class Rejected(ValueError):
    """What was sent is refused, perhaps for one response. ``row``: the one that is named;
    ``passing``: whether another try may do better."""

    def __init__(self, message: str, row: int | None = None, passing: bool = False) -> None:
        super().__init__(message)
        self.row = row
        self.passing = passing
