"""Names of the data side that need no import: roles, template modes, and why a row is not used."""

# Spelling in data files -> the library's own roles.
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
# What to do about a template that rewrites earlier assistant turns.
TEMPLATE_MODES = ("per_turn", "refuse")

REASONS = {
    "bad_json": "the line is not JSON",
    "wrong_keys": "no known row shape has these keys",
    "unknown_role": "a role other than user, human, assistant, gpt, system",
    "roles_not_alternating": "user and assistant do not take turns",
    "content_not_text": "the content of a message is not a string",
    "empty_conversation": "there is no message",
    "no_assistant_turn": "nothing to learn: no assistant turn",
    "empty_answer": "an assistant turn without text",
    "too_long": "the first answer does not fit into max_length",
    "template_refused": "the chat template refuses this conversation",
    "template_rewrites": "the chat template changes an earlier turn of this conversation",
    "no_end_marker": "end_of_assistant does not follow an answer",
    "marker_in_text": "a message holds a control marker that cannot be encoded as ordinary text",
}
# What the file's author has to mend, as against what max_length or the template decides.
MALFORMED = frozenset(list(REASONS)[:8])


class RowError(ValueError):
    """One row cannot be used. ``reason`` is a key of :data:`REASONS`; the text says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{REASONS[self.reason]}: {self.detail}"
