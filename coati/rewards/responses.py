"""What a reward function gets to see of a batch."""

from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True)
class Responses:
    """B responses, one entry of each list per response.

    Args:
        prompts: text of the prompts, as the model got them.
        responses: text of the responses, without the stop sequence.
        gt_answers: ground truth of the rows, None where the data have none.
        lengths: tokens of each response, stop sequence included.
        stopped: whether a response ended by itself.
        max_new_tokens: the room that each response had.
        tags: response_format_tags of the conversation template.
        sources: where each row comes from; None where the run does not ask.
        num_generations: so many responses to each prompt lie together.
        numbers: which responses of a larger batch these are, for messages.

    Raises:
        ValueError: for lists of different length.
    """

    prompts: list[str]
    responses: list[str]
    gt_answers: list[str | None] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)
    max_new_tokens: int | None = None
    tags: dict | None = None
    sources: list[str | None] | None = None
    num_generations: int = 1
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, filling in (("gt_answers", None), ("lengths", 0), ("stopped", True)):
            if not getattr(self, name):
                object.__setattr__(self, name, [filling] * len(self.responses))
        if not self.numbers:
            object.__setattr__(self, "numbers", tuple(range(len(self.responses))))
        counts = {name: len(values) for name, values in self.columns().items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"a batch of responses needs as many of each: {counts}")

    def __len__(self) -> int:
        return len(self.responses)

    def columns(self) -> dict[str, list]:
        """The lists by name."""
        return {
            each.name: value
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), list)
        }

    def row(self, index: int) -> "Responses":
        """A batch of this one response."""
        return replace(self.select([index]), num_generations=1)

    def select(self, index: list[int]) -> "Responses":
        """A batch of these responses, whole groups of them where there are groups."""
        rows = {name: [values[i] for i in index] for name, values in self.columns().items()}
        return replace(self, **rows, numbers=tuple(self.numbers[i] for i in index))
