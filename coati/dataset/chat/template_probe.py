"""What a chat template does, learned from a probe dialogue: where answers begin and end, and whether
it can be trained.

:func:`examine` completes a Conversation (end_of_assistant, stop_ids, the header before answers) and
refuses, with the rendered text, a template on which masks would be wrong.
"""

from os.path import commonprefix

from coati.dataset.chat.masked_text import segments, show_mask
from coati.dataset.rows.row_errors import RowError
from coati.utils.logging import get_logger

logger = get_logger(__name__)

QUESTIONS = ("Probe question number one", "Probe question number two")
ANSWERS = ("Probe answer number one", "Probe answer number two")


def dialogue(answers: tuple[str, str] = ANSWERS) -> list[dict[str, str]]:
    """Two rounds of user and assistant."""
    turns = [text for pair in zip(QUESTIONS, answers, strict=True) for text in pair]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def refuse(conversation, problem: str, remedy: str, text: str | None = None) -> None:
    """Raise ValueError with the problem, what to do, and what the template renders for the probe
    dialogue."""
    shown = "" if text is None else f"\nThe template renders a probe dialogue as:\n---\n{text}\n---"
    raise ValueError(f"conversation template: {problem}; {remedy}{shown}")


def examine(conversation) -> None:
    """Set ``header``, ``starts_at_content``, ``rewrites``, and missing ``end_of_assistant`` and
    ``stop_ids``."""
    messages = dialogue()
    finished = _render_probe(conversation, messages)
    _find_start(conversation, messages, finished)
    _find_end(conversation, finished)
    conversation.rewrites = _rewrites(conversation, messages) or _rewrites(
        conversation,
        dialogue(tuple(f"<think>\nProbe thought\n</think>\n\n{answer}" for answer in ANSWERS)),
    )
    if conversation.rewrites and conversation.template_mode == "refuse":
        refuse(
            conversation,
            "it renders an earlier assistant turn otherwise once the dialogue goes on",
            "use template_mode per_turn (one row per assistant turn) or another chat_template",
            finished[1],
        )
    if conversation.rewrites:
        logger.warning_once(
            "the chat template rewrites earlier assistant turns: one training row is made per "
            "assistant turn"
        )
    _check_masks(conversation, messages, finished)


def _render_probe(conversation, messages: list[dict]) -> tuple[str, str]:
    """The probe after its first and after its second answer."""
    try:
        finished = conversation.render(messages[:2]), conversation.render(messages)
    except RowError as error:
        if conversation.system_message:
            _try_without_system(conversation, messages, error)
        refuse(
            conversation,
            f"the template refuses an ordinary dialogue ({error.detail})",
            "mend chat_template",
        )
    for content in (QUESTIONS[1], *ANSWERS):
        if finished[1].count(content) != 1:
            refuse(
                conversation,
                f"{content!r} should occur once in the rendered text",
                "mend chat_template",
                finished[1],
            )
    return finished


def _try_without_system(conversation, messages: list[dict], error: RowError) -> None:
    system, conversation.system_message = conversation.system_message, None
    try:
        conversation.render(messages)
    except RowError:
        return
    finally:
        conversation.system_message = system
    refuse(
        conversation, f"it refuses a system message ({error.detail})", "set system_message to null"
    )


def _find_start(conversation, messages: list[dict], finished: tuple[str, str]) -> None:
    """Does the generation prompt lead to each answer? Without one, the header is taken from before
    the answers."""
    headers = set()
    for turn, whole in zip((1, 3), finished, strict=True):
        plain = conversation.render(messages[:turn])
        prompt = conversation.render(messages[:turn], add_generation_prompt=True)
        answer = whole.index(ANSWERS[turn // 2])
        if not whole.startswith(prompt) or len(prompt) > answer:
            headers.add(None)
        else:
            headers.add(whole[len(plain) : answer].rstrip(" ") if prompt == plain else "")
    if len(headers) == 1 and None not in headers:
        conversation.header = headers.pop()
        if not conversation.header.strip():
            conversation.header = ""
        return
    conversation.starts_at_content = True
    logger.warning_once(
        "the chat template's generation prompt is not what precedes a finished answer (some "
        "templates open a thought "
        "in the one and drop it in the other): answers are trained from their first character on"
    )


def tails(finished: tuple[str, str]) -> list[str]:
    """What follows an answer: at the end of a dialogue, in its middle, at the end again."""
    first, both = finished
    after = both.index(ANSWERS[0]) + len(ANSWERS[0])
    return [
        first[first.index(ANSWERS[0]) + len(ANSWERS[0]) :],
        both[after : both.index(QUESTIONS[1])],
        both[both.index(ANSWERS[1]) + len(ANSWERS[1]) :],
    ]


def _derived_end(conversation, finished: tuple[str, str]) -> str | None:
    common = commonprefix(tails(finished))
    controls = [marker for marker in conversation.encoder.markers if marker in common]
    return (
        min(controls, key=lambda marker: (common.index(marker), -len(marker)))
        if controls
        else common.strip() or None
    )


def _find_end(conversation, finished: tuple[str, str]) -> None:
    found = _derived_end(conversation, finished)
    given = conversation.end_of_assistant
    if given is None and found is None:
        refuse(
            conversation,
            "no text follows every answer, so its end cannot be told",
            "set end_of_assistant, and let chat_template write it after every assistant turn, the "
            "last one included",
            finished[1],
        )
    if given is None:
        conversation.end_of_assistant = conversation.derived["end_of_assistant"] = found
        logger.info(f"conversation template: end_of_assistant was derived: {found!r}")
    elif not all(given in tail for tail in tails(finished)):
        hint = f", here {found!r} would do" if found else ""
        refuse(
            conversation,
            f"end_of_assistant {given!r} does not follow every answer",
            f"set end_of_assistant to what does{hint}, or leave it out to have it derived",
            finished[1],
        )


def _rewrites(conversation, messages: list[dict]) -> bool:
    """True when the text up to the end of the first answer changes once a second round follows."""
    first, both = conversation.render(messages[:2]), conversation.render(messages)
    end = first.rindex(conversation.end_of_assistant) + len(conversation.end_of_assistant)
    return not both.startswith(first[:end])


def _check_masks(conversation, messages: list[dict], finished: tuple[str, str]) -> None:
    for row, answers in [(row, row.answers()) for row in conversation.encode_turns(messages)]:
        ids, bos = row.input_ids, conversation.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            refuse(
                conversation,
                f"the text begins with two begin-of-sequence tokens (id {bos})",
                "let chat_template write bos_token once, or not at all",
                finished[1],
            )
        texts = [conversation.encoder.decode(answer) for answer in answers]
        for text in texts:
            if not any(a in text for a in ANSWERS) or any(q in text for q in QUESTIONS):
                refuse(
                    conversation,
                    f"the loss mask does not cover exactly an answer: {text!r}",
                    "mend chat_template or end_of_assistant",
                    finished[1],
                )
    _complete_stop_ids(conversation, finished[1], answers[-1])


def _complete_stop_ids(conversation, text: str, answer: list[int]) -> None:
    """Generation must stop on what answers are trained to end with."""
    vocabulary = len(conversation.tokenizer)
    outside = [ids for ids in conversation.stop_ids if any(not 0 <= i < vocabulary for i in ids)]
    if outside:
        logger.warning_once(
            f"stop_ids {outside} lie outside the tokenizer's vocabulary of {vocabulary} and are "
            "left out"
        )
        conversation.stop_ids = [ids for ids in conversation.stop_ids if ids not in outside]
    if any(answer[-len(ids) :] == ids for ids in conversation.stop_ids):
        return
    start = text.index(conversation.end_of_assistant, text.index(ANSWERS[1]))
    _, ids, [(first, last)] = conversation.encoder.encode(
        text, [(start, start + len(conversation.end_of_assistant))]
    )
    marker, eos = ids[first:last], conversation.tokenizer.eos_token_id
    if conversation.stop_ids:
        logger.warning_once(
            f"no stop_ids {conversation.stop_ids} ends a trained answer: {marker} "
            "(end_of_assistant) was added"
        )
        conversation.stop_ids = [marker, *conversation.stop_ids]
    else:
        conversation.stop_ids = [marker] if eos is None or marker[-1:] == [eos] else [marker, [eos]]
        logger.info(f"conversation template: stop_ids was derived: {conversation.stop_ids}")
    conversation.derived["stop_ids"] = conversation.stop_ids


def render_masked_probe(conversation, color: bool) -> str:
    """The probe dialogue as the template writes it, its supervised text marked; end markers and
    stop ids below."""
    rows = []
    for row in conversation.encode_turns(dialogue()):
        rows.append(
            show_mask(segments(row.input_ids, row.loss_mask, conversation.encoder.decode), color)
        )
    rows.append(
        f"end_of_assistant {conversation.end_of_assistant!r}, stop_ids {conversation.stop_ids}"
    )
    return "\n---\n".join(rows)
