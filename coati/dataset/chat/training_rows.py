"""The training rows of a conversation: one, or one per round where the template writes earlier
turns otherwise once the dialogue goes on; and which turns of them are learned, and how much."""

from collections.abc import Iterator, Sequence

from coati.dataset.chat.dialogue import UNUSED_WEIGHT, Dialogue
from coati.dataset.chat.encoded import Encoded
from coati.dataset.chat.row_options import LEARNED_TURNS
from coati.dataset.chat.word_cache import Span
from coati.dataset.rows.row_errors import RowError

Turns = list[tuple[int, Span]]  # the index of a message, and its characters


def training_rows(dialogue: Dialogue, max_length: int | None) -> list[Encoded]:
    """The rows of ``dialogue``, cut to the complete rounds that fit into ``max_length`` tokens.
    Raises RowError when nothing can be learned of it or nothing fits."""
    template = dialogue.template
    if dialogue.plain and not template.rewrites and template.options.learn == LEARNED_TURNS[0]:
        text = dialogue.text()
        try:
            spans = [dialogue.span(text, k) for k in dialogue.turns]
        except RowError as error:
            if error.reason != "template_rewrites":
                raise
        else:
            encoded = template.encoded(text, spans, dialogue.key, max_length)
            encoded.notes = frozenset(dialogue.notes)
            return [encoded]
    learned = _learned(dialogue)
    if not template.rewrites:
        try:
            return [_whole(dialogue, learned, max_length)]
        except RowError as error:
            strict = template.template_mode == "refuse" and len(dialogue.turns) > 1
            if error.reason != "template_rewrites" or strict:
                raise
    return _by_round(dialogue, learned, max_length)


def _learned(dialogue: Dialogue) -> set[int]:
    """The indices of the messages that are learned."""
    options = dialogue.template.options
    if dialogue.plain and not options.learn.startswith("roles:"):
        learned = dialogue.turns[-1:] if options.last_only else dialogue.turns
        return set(learned)
    roles = options.roles
    chosen = [k for k, message in enumerate(dialogue.messages) if message["role"] in roles]
    if options.last_only:
        chosen = chosen[-1:]
    for message in dialogue.messages:
        if message["role"] not in {*roles, "assistant"} and message.get("weight", 0) > 0:
            dialogue.notes.add(UNUSED_WEIGHT)
    learned = {k for k in chosen if _counts(dialogue, k)}
    if not learned:
        raise RowError(
            "nothing_learned",
            f"of {len(dialogue.turns)} turns of the assistant all have weight 0 or are left out by "
            f"--learn {options.learn}",
        )
    return learned


def _counts(dialogue: Dialogue, k: int) -> bool:
    message = dialogue.messages[k]
    parts = (weight for _, _, weight in message.get("spans") or ())
    return message.get("weight", 1) > 0 or any(weight > 0 for weight in parts)


def _whole(dialogue: Dialogue, learned: set[int], max_length: int | None) -> Encoded:
    text = dialogue.text()
    turns = [(k, dialogue.span(text, k)) for k in dialogue.turns]
    trained = [(k, span) for k, span in turns if k in learned]
    if dialogue.lost_thoughts(text, trained):
        raise RowError("template_rewrites", "the thought of an earlier turn is dropped")
    return _row(dialogue, text, turns, range(len(dialogue.messages)), learned, max_length)


def _row(
    dialogue: Dialogue,
    text: str,
    turns: Turns,
    messages: Sequence[int],
    learned: set[int],
    max_length: int | None,
    others: Sequence[Span] = (),
) -> Encoded:
    """The row of ``text``; ``turns`` are the assistant's in it, ``messages`` those that no earlier
    row holds, ``others`` further responses."""
    trained = [(k, span) for k, span in turns if k in learned]
    for k, span in trained:
        dialogue.count(text, span, k)
    spoken = {k for k in learned.intersection(messages) if k not in dialogue.turns}
    trained += [(k, dialogue.spoken(text, k)) for k in spoken]
    trained.sort(key=lambda turn: turn[1])
    context = [*others, *(span for k, span in turns if k not in learned)]
    weights: list[tuple[Span, float]] = []
    if not dialogue.plain:
        dialogue.count_system(text)
        for k, span in trained:
            weights += dialogue.weights(text, span, k)
        if weights:
            weights = [*((span, 1.0) for _, span in trained), *weights]
    spans = [span for _, span in trained]
    encoded = dialogue.template.encoded(text, spans, dialogue.key, max_length, context, weights)
    encoded.notes = frozenset(dialogue.notes)
    return encoded


def _by_round(dialogue: Dialogue, learned: set[int], max_length: int | None) -> list[Encoded]:
    """A row per round, or per turn where a round's turns are rewritten too; ends with the first
    that does not fit."""
    rows: list[Encoded] = []
    begins = 0
    for round in _rounds(dialogue):
        messages = range(begins, round[-1] + 1)
        begins = round[-1] + 1
        if learned.isdisjoint(messages):
            continue
        last = next((k for k in round if k >= max(learned)), round[-1])
        needed = [k for k in round if k <= last]
        for text, turns in _texts(dialogue, needed, learned):
            earlier = [k for k in dialogue.turns if k < turns[0][0]]
            others = list(dialogue.answers_in(text, earlier))
            try:
                row = _row(dialogue, text, turns, messages, learned, max_length, others)
            except RowError as error:
                if not rows or error.reason != "too_long":
                    raise
                rows[-1].truncated = True
                return rows
            rows.append(row)
            messages = range(0)  # what others say is learned once
    return rows


def _rounds(dialogue: Dialogue) -> Iterator[list[int]]:
    """The turns of the assistant between two of the user."""
    round: list[int] = []
    for k, message in enumerate(dialogue.messages):
        if message["role"] == "assistant":
            round.append(k)
        elif message["role"] == "user" and round:
            yield round
            round = []
    if round:
        yield round


def _texts(dialogue: Dialogue, round: list[int], learned: set[int]) -> Iterator[tuple[str, Turns]]:
    """``(text, turns of the round)`` of each row that the round needs."""
    alone = [(k, *dialogue.alone(k)) for k in round]
    last = alone[-1][1]
    if learned.isdisjoint(round) or all(
        last.startswith(text[: span[1]]) for _, text, span in alone
    ):
        yield last, [(k, span) for k, _, span in alone]
        return
    for k, text, span in alone:
        if k in learned:
            yield text, [(k, span)]
