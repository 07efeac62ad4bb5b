"""What a policy responds to, turn after turn, and what that is worth."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]  # {role, content}, perhaps reasoning_content, tool_calls, name ...
Row = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What an environment says to a response. ``messages``: what the policy responds to next, of
    role tool or user; none where it is ``done``. ``reward``: added to the sample's."""

    messages: Sequence[Message] = ()
    reward: float = 0.0
    done: bool = False


class Environment(ABC):
    """One dialogue: each sample gets an instance of its own, made with the arguments of
    ``--environment_args``.

    A class that only has :meth:`reset` and :meth:`step` will do, too. What it says must follow from
    the row and the responses alone, so that a resumed run equals an undisturbed one: take chance
    from ``random.Random(row["seed"])``.

    Attributes:
        tools: schemas of the functions that the policy may call, as OpenAI's API has them.
        failed_calls: calls so far that did not work out, for the metrics.
    """

    tools: Sequence[dict[str, Any]] = ()
    failed_calls: int = 0

    @abstractmethod
    def reset(self, row: Row) -> list[Message]:
        """The messages that the policy responds to first, the same for all samples of a row.

        ``row``: ``messages`` and ``tools`` as the file has them, ``gt_answer``, and ``seed``, a
        number that each sample of each episode has of its own.
        """

    @abstractmethod
    def step(self, response: Message) -> Turn:
        """``response``: role assistant, ``content``, and where there are such
        ``reasoning_content`` and ``tool_calls``, [{"function": {"name", "arguments"}, "id"}] with
        the arguments as an object. Calls that cannot be read do not come here: the policy is told
        so."""
