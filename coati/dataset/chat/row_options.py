"""What of a row is learned and what becomes of its thoughts: the settings of a preparation beside
the template's own. Imports nothing, for the parsers."""

from dataclasses import asdict, dataclass
from typing import Any

THOUGHTS = ("template", "keep", "drop", "refuse", "last")
EMPTY_THOUGHTS = ("mask", "supervise")
LEARNED_TURNS = ("all_turns", "last_turn")
LEARNED_ROLES = ("system", "user", "assistant", "tool")
ROLES_PREFIX = "roles:"


def check_learn(learn: str) -> str:
    """``learn`` itself. Raises ValueError for what is neither a choice of turns nor a list of
    roles."""
    roles = learn.removeprefix(ROLES_PREFIX).split(",")
    known = learn.startswith(ROLES_PREFIX) and set(roles) <= set(LEARNED_ROLES)
    if learn not in LEARNED_TURNS and not known:
        raise ValueError(
            f"expected {' or '.join(LEARNED_TURNS)}, or {ROLES_PREFIX} and some of "
            f"{', '.join(LEARNED_ROLES)} (roles:user,assistant), found {learn!r}"
        )
    return learn


@dataclass(frozen=True)
class RowOptions:
    """Raises ValueError for a value that is none of the choices.

    Attributes:
        thoughts: ``template``: what the template writes is learned, what it drops is counted;
            ``keep``: where it drops the thought of a response, that is written before the response;
            ``drop``: no thoughts; ``refuse``: rows whose thoughts would be dropped are left out;
            ``last``: as ``keep``, of the last response alone.
        empty_thoughts: whether the empty thoughts that some templates write before a response
            without one are learned.
        learn: ``all_turns`` or ``last_turn`` of the assistant, or the turns of ``roles:...``.
        for_environment: of prompts that an environment responds to: JSON of the schemas of its
            tools, which they are written with; such prompts keep their messages beside the ids.
        for_sources: of prompts that are rewarded by where they come from: JSON of the sources that
            have rewards; the category of such prompts is their source.
        for_groups: of prompts whose judged responses are trained on: how many of each row are; such
            prompts keep them beside the ids.
    """

    thoughts: str = THOUGHTS[0]
    empty_thoughts: str = EMPTY_THOUGHTS[0]
    learn: str = LEARNED_TURNS[0]
    for_environment: str | None = None
    for_sources: str | None = None
    for_groups: int = 0

    def __post_init__(self):
        for name, choices in (("thoughts", THOUGHTS), ("empty_thoughts", EMPTY_THOUGHTS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, found {getattr(self, name)!r}"
                )
        try:
            check_learn(self.learn)
        except ValueError as error:
            raise ValueError(f"learn: {error}") from error

    @property
    def roles(self) -> frozenset[str]:
        """The roles whose turns are learned."""
        if self.learn.startswith(ROLES_PREFIX):
            return frozenset(self.learn.removeprefix(ROLES_PREFIX).split(","))
        return frozenset(("assistant",))

    @property
    def last_only(self) -> bool:
        return self.learn == "last_turn"

    @property
    def keeps_thoughts(self) -> bool:
        """Whether a thought is written where the template drops it."""
        return self.thoughts in ("keep", "last")

    def named(self) -> dict[str, Any]:
        """The settings that differ from the default, by name."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value != getattr(RowOptions, name)
        }
