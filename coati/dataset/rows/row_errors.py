"""Names of the data side that need no import: roles, template modes, and why a row is not used."""

# Spelling in data files -> the library's own roles. The first five are those of a dialogue that is
# put together by hand.
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
ROW_ROLES = ROLES | {
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
}
# Roles of turns that are calls: the assistant's, whose content is JSON.
CALL_ROLES = ("function_call", "tool_call", "tool_calls")
# What to do about a template that rewrites earlier assistant turns.
TEMPLATE_MODES = ("per_turn", "refuse")
# What of a .txt file is a document; for types that read documents.
DOCUMENTS = ("file", "paragraph", "line")
# Share of malformed rows at which a preparation ends.
DEFAULT_BAD_RATIO = 0.01
# Words in a row that two texts must share to overlap: Brown et al. 2020 (GPT-3), appendix C.
DEFAULT_OVERLAP_WORDS = 13

# What the author of the file has to fix ...
MALFORMED_REASONS = {
    "bad_json": "the line is not JSON",
    "bad_text": "the .txt file is not UTF-8 text",
    "bad_csv": "the record does not match the header of its csv file",
    "wrong_keys": "no known row format has these keys",
    "wrong_type": "the row has the format of another --type",
    "unknown_role": "a role other than user, assistant, system, tool and their other spellings",
    "unsupported_role": "a turn of a tool, a call or a weight that cannot be prepared",
    "roles_not_alternating": "user and assistant do not take turns, or a call has no result",
    "content_not_text": "the content of a message is not a string",
    "messages_as_text": "a text that is itself JSON or Python of messages",
    "two_thoughts": "a response with two different thoughts",
    "bad_tool_call": "a call of a tool that cannot be read",
    "bad_tools": "tools that are not a list of function schemas",
    "bad_weight": "the weight of a message is not a number from 0 to 1",
    "bad_tree": "single messages that make no tree: a parent in no row, an id twice, a circle",
    "bad_scores": "scores, votes or choices that cannot be read",
    "no_score": "nothing says how good the conversation is",
    "empty_conversation": "there is no message",
    "no_assistant_turn": "nothing to learn: no assistant turn",
    "no_question": "no prompt to respond to: the context does not end with a user turn",
    "empty_answer": "an assistant turn without text",
    "bad_label": "the label is neither true nor false",
    "bad_margin": "the margin is not a number",
    "bad_pair_weight": "the weight of a pair is not a number of 0 or more",
    "bad_gt_answer": "the gt_answer is no text, number, list or object",
}
# ... what cleaning was asked to leave out ...
CLEANING_REASONS = {
    "duplicate": "the same text as an earlier row (--deduplicate)",
    "near_duplicate": "nearly the text of an earlier row (--near_duplicates)",
    "eval_overlap": "consecutive words in common with an evaluation row (--drop_eval_overlap)",
    "benchmark_overlap": "consecutive words in common with a benchmark (--benchmark_files)",
    "answer_too_short": "fewer characters than --min_answer_chars",
    "answer_too_long": "more characters than --max_answer_chars",
    "blank_answer": "a response without a visible character (--drop_trivial_answers)",
    "answer_repeats_prompt": "the response repeats the prompt (--drop_trivial_answers)",
}
# ... and what max_length or the template decides.
REASONS = (
    MALFORMED_REASONS
    | {
        "same_answers": "chosen and rejected are the same",
        "no_preference": "scores or votes hold no response better than another",
        "judged_bad": "a column of the row says that its response is a bad one",
        "too_long": "the row, or its first response, does not fit into max_length",
        "same_rendering": "chosen and rejected become the same under the chat template",
        "template_refused": "the chat template refuses this conversation",
        "template_rewrites": "the chat template changes an earlier turn of this conversation",
        "no_end_marker": "end_of_assistant does not follow a response",
        "tools_unsupported": "the chat template does not write what the row has of tools",
        "thought_dropped": "the chat template drops a thought (--thoughts refuse)",
        "no_reward_for_source": "no reward is named for where the row comes from",
        "nothing_learned": "every turn has weight 0 or is left out by --learn",
        "marker_in_text": (
            "a message holds a control marker that cannot be encoded as ordinary text"
        ),
    }
    | CLEANING_REASONS
)
MALFORMED = frozenset(MALFORMED_REASONS)


class RowError(ValueError):
    """One row cannot be used. ``reason`` is a key of :data:`REASONS`; the text says what was found,
    ``role`` whose turn is in the way."""

    def __init__(self, reason: str, detail: str, role: str | None = None):
        super().__init__(reason, detail, role)
        self.reason = reason
        self.detail = detail
        self.role = role

    def __str__(self) -> str:
        return f"{REASONS[self.reason]}: {self.detail}"
