"""The progress bar on rank 0."""

from tqdm import tqdm

from coati.utils.distributed import is_rank_0


class ProgressBar:
    """Steps (or episodes) done of all, with loss, learning rate and tokens per second; tqdm adds
    the time left."""

    def __init__(self, total: int, done: int, name: str, unit: str = "step") -> None:
        self.name = name
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=unit,
            disable=not is_rank_0(),
            dynamic_ncols=True,
        )

    def phase(self, text: str) -> None:
        """What is being done inside a step."""
        self._bar.set_description(f"{self.name} ({text})")

    def step(self, **shown: float) -> None:
        """One step is done; ``shown`` stands at the end of the bar."""
        self._bar.set_postfix(
            {name: f"{value:.4g}" for name, value in shown.items()}, refresh=False
        )
        self._bar.update()

    def write(self, text: str) -> None:
        """A line (or a table) above the bar, on rank 0."""
        if is_rank_0():
            self._bar.write(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
