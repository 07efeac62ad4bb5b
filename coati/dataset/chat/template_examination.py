"""Completes a Conversation with what a probe of its template found (end_of_assistant, stop_ids, the
header before responses), and refuses, with the rendered text, a template on which masks would be
wrong."""

from typing import TYPE_CHECKING

from coati.dataset.chat.dialogue import Dialogue
from coati.dataset.chat.template_probe import ANSWERS, QUESTIONS, TemplateProbe, dialogue
from coati.dataset.chat.training_rows import training_rows
from coati.utils.logging import get_logger

if TYPE_CHECKING:
    from coati.dataset.chat.conversation import Conversation

logger = get_logger(__name__)


def refuse(problem: str, remedy: str, text: str = "") -> None:
    """Raise ValueError with the problem, what to do, and what the template renders for the probe
    dialogue."""
    shown = f"\nThe template renders a probe dialogue as:\n---\n{text}\n---" if text else ""
    raise ValueError(f"conversation template: {problem}; {remedy}{shown}")


def examine(conversation: "Conversation") -> None:
    """Set ``header``, ``starts_at_content``, ``rewrites``, and missing ``end_of_assistant`` and
    ``stop_ids``. Raises ValueError with the first finding for which no row may be made."""
    probe = TemplateProbe(
        conversation.tokenizer,
        conversation.chat_template,
        conversation.system_message,
        conversation.end_of_assistant,
        conversation.template_mode,
        conversation.encoder,
        conversation.template_args,
    )
    for finding in probe.findings():
        if finding.refused:
            refuse(finding.problem, finding.remedy, probe.text)
        if finding.said and not conversation.is_own_template:
            logger.warning_once(f"conversation template: {finding}")
    conversation.header = probe.header or ""
    conversation.starts_at_content = probe.header is None
    if conversation.starts_at_content:
        logger.warning_once(
            "the chat template's generation prompt is not what precedes a finished response (some "
            "templates open a thought in the one and drop it in the other): responses are trained "
            "from their first character on"
        )
    if conversation.end_of_assistant is None:
        conversation.end_of_assistant = conversation.derived["end_of_assistant"] = probe.end
        logger.info(f"conversation template: end_of_assistant was derived: {probe.end!r}")
    conversation.end_added = probe.end_added
    conversation.abilities = probe.abilities
    moved = bool(conversation.system_message) and probe.moves_system
    conversation.rewrites = probe.rewritten is not None or moved
    if conversation.rewrites:
        logger.warning_once(
            "the chat template rewrites earlier assistant turns: one training row is made per "
            "assistant turn"
        )
    _complete_stop_ids(conversation, *_check_masks(conversation, probe.text))


def _check_masks(conversation: "Conversation", text: str) -> tuple[str, list[int]]:
    """``(text, supervised ids)`` of the last response."""
    rows = training_rows(Dialogue(conversation.learning_all(), dialogue()), None)
    responses = [response for row in rows for response in row.responses()]
    for response in map(conversation.encoder.decode, responses):
        if not any(a in response for a in ANSWERS) or any(q in response for q in QUESTIONS):
            refuse(
                f"the loss mask does not cover exactly a response: {response!r}",
                "fix chat_template or end_of_assistant",
                text,
            )
    return rows[-1].text, responses[-1]


def _complete_stop_ids(conversation: "Conversation", text: str, response: list[int]) -> None:
    """Generation must stop on what responses are trained to end with."""
    vocabulary = len(conversation.tokenizer)
    outside = [ids for ids in conversation.stop_ids if any(not 0 <= i < vocabulary for i in ids)]
    if outside:
        logger.warning_once(
            f"stop_ids {outside} lie outside the tokenizer's vocabulary of {vocabulary} and are "
            "left out"
        )
        conversation.stop_ids = [ids for ids in conversation.stop_ids if ids not in outside]
    _add_stop_of_response(conversation, text, response)
    _leave_out_call_marks(conversation)
    call_end = conversation.abilities.call_end
    if call_end is not None and call_end != conversation.end_of_assistant:
        stop = [conversation.tokenizer.convert_tokens_to_ids(call_end)]
        if stop not in conversation.stop_ids:
            conversation.stop_ids = [*conversation.stop_ids, stop]
            conversation.derived["stop_ids"] = conversation.stop_ids
            logger.info(f"conversation template: calls of tools end with {call_end!r}, a stop too")


def _leave_out_call_marks(conversation: "Conversation") -> None:
    """No stop may stand between two calls of one turn: nothing would come after the first."""
    tokenizer = conversation.tokenizer
    marks = [[tokenizer.convert_tokens_to_ids(m)] for m in conversation.abilities.call_marks]
    wrong = [ids for ids in conversation.stop_ids if ids in marks]
    if wrong:
        logger.warning_once(
            f"stop_ids {wrong} stand between two calls of one turn, where generation must go on, "
            "and are left out"
        )
        conversation.stop_ids = [ids for ids in conversation.stop_ids if ids not in wrong]
        conversation.derived["stop_ids"] = conversation.stop_ids


def _add_stop_of_response(conversation: "Conversation", text: str, response: list[int]) -> None:
    if any(response[-len(ids) :] == ids for ids in conversation.stop_ids):
        return
    start = text.index(conversation.end_of_assistant, text.index(ANSWERS[1]))
    _, ids, [(first, last)] = conversation.encoder.encode(
        text, [(start, start + len(conversation.end_of_assistant))]
    )
    marker = ids[first:last]
    eos = conversation.tokenizer.eos_token_id
    if conversation.stop_ids:
        logger.warning_once(
            f"no stop_ids {conversation.stop_ids} ends a trained response: {marker} "
            "(end_of_assistant) was added"
        )
        conversation.stop_ids = [marker, *_without_ordinary(conversation)]
    else:
        conversation.stop_ids = [marker] if eos is None or marker[-1:] == [eos] else [marker, [eos]]
        logger.info(f"conversation template: stop_ids was derived: {conversation.stop_ids}")
    conversation.derived["stop_ids"] = conversation.stop_ids


def _without_ordinary(conversation: "Conversation") -> list[list[int]]:
    """The stop ids but for single ordinary tokens, which those of another tokenizer may be here."""
    controls = conversation.encoder.controls
    ordinary = [ids for ids in conversation.stop_ids if len(ids) == 1 and ids[0] not in controls]
    if ordinary:
        named = ", ".join(f"{ids[0]} ({conversation.encoder.decode(ids)!r})" for ids in ordinary)
        logger.warning_once(
            f"stop_ids of ordinary tokens of this tokenizer, {named}, are left out: generation "
            "would stop within a text"
        )
    return [ids for ids in conversation.stop_ids if ids not in ordinary]
