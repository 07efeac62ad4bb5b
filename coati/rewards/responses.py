"""What a reward function gets to see of a batch."""

from dataclasses import dataclass, field, fields


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

    def __post_init__(self) -> None:
        for name, filling in (("gt_answers", None), ("lengths", 0), ("stopped", True)):
            if not getattr(self, name):
                object.__setattr__(self, name, [filling] * len(self.responses))
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
        rows = {name: [values[index]] for name, values in self.columns().items()}
        return Responses(**rows, max_new_tokens=self.max_new_tokens, tags=self.tags)
