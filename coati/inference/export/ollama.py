"""The Modelfile of an exported GGUF file, for Ollama: the chat template in its own language, stop
texts and decoding settings, as far as they can be said there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.dataset.rows.row_errors import RowError
from coati.inference.model_loading import Loaded
from coati.models.generation.detokenize import decode
from coati.models.positions import positions_of
from coati.utils.logging import get_logger

logger = get_logger(__name__)

MODELFILE = "Modelfile"
MOST_CONTEXT = 8192  # tokens that are asked for by default: Ollama makes room for all of them
ROLES = ("system", "user", "assistant")
# generation_config.json -> PARAMETER
PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_PROBES = {role: f"probe{role}content" for role in ROLES}
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Turns:
    """A template that writes each message between two texts of its role. ``begin``: before the
    first; ``prompt``: with which a response begins."""

    around: Mapping[str, tuple[str, str]]
    begin: str
    prompt: str

    def render(self, messages: Messages) -> str:
        """What the model is given."""
        turns = (
            f"{self.around[one['role']][0]}{one['content']}{self.around[one['role']][1]}"
            for one in messages
        )
        return self.begin + "".join(turns) + self.prompt

    def in_go(self) -> str:
        """In the language of Ollama's templates (Go's text/template)."""
        branches = []
        for number, (role, (before, after)) in enumerate(self.around.items()):
            test = f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}'
            branches.append(f"{test}{_go(before)}{{{{ .Content }}}}{_go(after)}")
        turns = "".join(branches)
        loop = f"{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}"
        return f"{_go(self.begin)}{loop}{_go(self.prompt)}"


def _go(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def turns_of(conversation: Conversation) -> Turns | None:
    """The template as :class:`Turns`; None where it writes dialogues otherwise: trims contents,
    say, or treats the last turn in another way."""
    asked = {"role": "user", "content": _PROBES["user"]}
    answered = {"role": "assistant", "content": _PROBES["assistant"]}
    system = {"role": "system", "content": _PROBES["system"]}
    try:
        whole = conversation.render([system, asked, answered, asked], True)
        bare = conversation.render([system, asked, answered, asked], False)
        one = conversation.render([system, asked], False)
    except RowError:
        return None
    if not (whole.startswith(bare) and bare.startswith(one)):
        return None
    prompt = whole[len(bare) :]
    answer = bare[len(one) : bare.rfind(_PROBES["user"])]
    before, found, rest = answer.partition(_PROBES["assistant"])
    first = one.split(_PROBES["system"])
    if not found or len(first) != 2 or first[1].count(_PROBES["user"]) != 1:
        return None
    between, after_user = first[1].split(_PROBES["user"])
    alone = "" if conversation.system_message else _before_user(conversation, asked)
    # What stands between two turns: the end of the first and the beginning of the second.
    for cut in range(len(rest) + 1):
        user = rest[cut:]
        if not between.endswith(user) or (alone and not alone.endswith(user)):
            continue
        begin = alone[: len(alone) - len(user)] if alone else ""
        if not first[0].startswith(begin):
            continue
        around = {
            "system": (first[0][len(begin) :], between[: len(between) - len(user)]),
            "user": (user, after_user),
            "assistant": (before, rest[:cut]),
        }
        turns = Turns(around, begin, prompt)
        if _is_right(turns, conversation):
            return turns
    return None


def _before_user(conversation: Conversation, asked: Mapping[str, str]) -> str:
    """What stands before the question of a dialogue without a system message."""
    try:
        return conversation.render([dict(asked)], False).partition(_PROBES["user"])[0]
    except RowError:
        return ""


def _is_right(turns: Turns, conversation: Conversation) -> bool:
    """Whether dialogues of several forms come out as the template writes them."""
    texts = ("hello", "a b\n\nc", "{{ x }} <b>")
    dialogues = []
    for rounds in (1, 2, 3):
        talk = []
        for number in range(rounds):
            talk.append({"role": "user", "content": f"{texts[number]} {number}"})
            talk.append({"role": "assistant", "content": f"{number} {texts[-number]}"})
        dialogues += [talk[:-1], [{"role": "system", "content": "be brief"}, *talk[:-1]]]
    own = conversation.system_message
    for talk in dialogues:
        given = [{"role": "system", "content": own}, *talk] if own else talk
        shown = talk if talk[0]["role"] == "system" else given
        try:
            if turns.render(shown) != conversation.render(talk, True):
                return False
        except RowError:
            return False
    return True


def modelfile(gguf: str, loaded: Loaded) -> str:
    """The text of the Modelfile beside ``gguf``. A template that cannot be said is left to Ollama,
    which knows many by the one inside the GGUF file; that is logged."""
    conversation = loaded.conversation
    tokenizer = loaded.tokenizer
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{gguf}"]
    turns = turns_of(conversation)
    text = None if turns is None else _without_bos(turns, tokenizer).in_go()
    if text is None or '"""' in text:
        lines.append("# The chat template is the one inside the GGUF file, where Ollama knows it.")
        logger.warning(
            f"{MODELFILE}: the chat template cannot be written in Ollama's language; Ollama takes "
            "its own for the one inside the GGUF file, if it knows that: compare a response before "
            "you use it"
        )
    else:
        lines.append(f'TEMPLATE """{text}"""')
    if conversation.system_message and '"""' not in conversation.system_message:
        lines.append(f'SYSTEM """{conversation.system_message}"""')
    for stop in loaded.stop_sequences():
        written = decode(tokenizer, stop, skip_special_tokens=False)
        if written.strip():
            lines.append(f"PARAMETER stop {_quoted(written)}")
    positions = positions_of(loaded.model.config)
    if positions is not None:
        lines.append(f"PARAMETER num_ctx {min(positions.count, MOST_CONTEXT)}")
    settings = loaded.model.generation_config
    for name, parameter in PARAMETERS.items():
        value = getattr(settings, name, None)
        if settings.do_sample and isinstance(value, int | float):
            lines.append(f"PARAMETER {parameter} {value:g}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if "\n" not in escaped else f'"""{escaped}"""'


def _without_bos(turns: Turns, tokenizer: Any) -> Turns:
    """llama.cpp puts the beginning of a sequence before every prompt where the tokenizer does; one
    more in the text would be a second."""
    bos = tokenizer.bos_token
    if not bos or tokenizer("", add_special_tokens=True)["input_ids"][:1] != [
        tokenizer.bos_token_id
    ]:
        return turns
    begin = turns.begin
    return Turns(turns.around, begin.removeprefix(bos), turns.prompt)
