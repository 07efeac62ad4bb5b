"""Conversations as text, token ids and loss mask: the only place that knows chat templates.

dialogue.py finds the characters of each turn; the text is tokenized once and spans become token
ranges through character offsets.
"""

import copy
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jinja2

from coati.dataset.chat.chat_encoder import ChatEncoder, Span
from coati.dataset.chat.dialogue import ONLY_SFT, Dialogue
from coati.dataset.chat.encoded import Encoded
from coati.dataset.chat.message_forms import Message, Messages, Tools
from coati.dataset.chat.row_options import RowOptions
from coati.dataset.chat.template import (
    check_template_args,
    compile_template,
    render_template,
    special_tokens,
    with_defaults,
)
from coati.dataset.chat.template_abilities import Abilities
from coati.dataset.chat.template_examination import examine
from coati.dataset.chat.template_file import (
    FIELDS,
    OPTIONAL_FIELDS,
    open_config,
    own_template,
    read_fields,
)
from coati.dataset.chat.template_probe import abilities_of
from coati.dataset.chat.training_rows import training_rows
from coati.dataset.rows.row_errors import ROLES, TEMPLATE_MODES, RowError
from coati.utils.json_io import save_json
from coati.utils.logging import get_logger
from coati.utils.resources import template_path

logger = get_logger(__name__)


@dataclass
class Conversation:
    """A chat template with its end markers, and the messages of one conversation.

    ``stop_ids`` are alternatives, each a token sequence. Making one checks the template on a probe
    dialogue, derives what is None or empty (then named in ``derived``) and sets
    ``tokenizer.chat_template``. ``template_args`` are further variables of the template;
    ``options`` say what of a row is learned. Raises ValueError with the rendered text when the
    template cannot be trained on.
    """

    tokenizer: Any
    system_message: str | None
    chat_template: str
    stop_ids: list[list[int]] = field(default_factory=list)
    end_of_assistant: str | None = None
    template_mode: str = "per_turn"
    response_format_tags: dict | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    options: RowOptions = field(default_factory=RowOptions)

    roles: ClassVar[list[str]] = ["user", "assistant"]

    def __post_init__(self):
        if self.template_mode not in TEMPLATE_MODES:
            raise ValueError(
                f"template_mode must be one of {', '.join(TEMPLATE_MODES)}, found "
                f"{self.template_mode!r}"
            )
        compile_template(self.chat_template)
        check_template_args(self.chat_template, self.template_args)
        self.messages: Messages = []
        self.derived: dict[str, Any] = {}
        self.header = ""
        self.starts_at_content = False
        self.rewrites = False
        self.end_added = ""  # what of the next turn ends a response, which the template leaves out
        self.abilities = Abilities()
        self._special_tokens = special_tokens(self.tokenizer)
        self._bos = self.tokenizer.bos_token_id
        self._own_template = own_template(self.tokenizer)
        self.encoder = ChatEncoder(self.tokenizer, self.end_of_assistant or "")
        examine(self)
        if "end_of_assistant" in self.derived:
            self.encoder = ChatEncoder(self.tokenizer, self.end_of_assistant)
        system = [{"role": "system", "content": self.system_message or ""}]
        if self.encoder.hide(system)[2] is not None:
            logger.warning_once(
                "system_message holds control markers; they are encoded as text, control tokens "
                "belong in chat_template"
            )
        self.tokenizer.chat_template = self.chat_template

    @classmethod
    def from_config(
        cls,
        tokenizer,
        config: dict,
        template_mode: str = "per_turn",
        source: str = "conversation template",
        folder: str | os.PathLike = ".",
        options: RowOptions | None = None,
    ) -> "Conversation":
        """From the fields of a template file, any of which may be missing (``{}``: the tokenizer's
        own template).

        ``source`` names that file in what a ValueError says.
        """
        fields = read_fields(config, tokenizer, source, Path(folder))
        options = options or RowOptions()
        try:
            return cls(tokenizer, template_mode=template_mode, options=options, **fields)
        except ValueError as error:
            raise ValueError(
                f"{source}: {str(error).removeprefix('conversation template: ')}"
            ) from error

    @property
    def is_own_template(self) -> bool:
        """Whether the template is the tokenizer's."""
        return self._own_template == self.chat_template

    @cached_property
    def way_to_tools(self) -> str:
        """What to do where this template writes no tools."""
        own = self._own_template
        if own and not self.is_own_template and abilities_of(self.tokenizer, own).tools:
            return "the tokenizer's own does: leave --conversation_template_config out"
        return "take one that does (--conversation_template_config)"

    def clear(self) -> None:
        self.messages = []

    def copy(self) -> "Conversation":
        """The same template with messages of its own."""
        twin = copy.copy(self)
        twin.messages = [dict(message) for message in self.messages]
        return twin

    def learning_all(self) -> "Conversation":
        """The same template with the default options: every response is learned."""
        twin = copy.copy(self)
        twin.options = RowOptions()
        return twin

    def append_message(self, role: str, text: str) -> None:
        """Add a turn. Raises ValueError for an unknown role."""
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}; known roles: {', '.join(ROLES)}")
        self.messages.append({"role": ROLES[role], "content": text})

    def get_prompt(self, length: int | None = None, add_generation_prompt: bool = False) -> str:
        """The text of the system message and the first ``length`` messages (None: all)."""
        return self.render(self.messages[:length], add_generation_prompt)

    def save_prompt(self) -> str:
        return self.get_prompt()

    def get_conversation_template_keys(self) -> list[str]:
        return ["system_message", "chat_template"]

    def to_config(self) -> dict[str, Any]:
        """The template file's fields, complete; :meth:`from_config` gives the same conversation
        again."""
        return {
            name: getattr(self, name)
            for name in FIELDS
            if name not in OPTIONAL_FIELDS or getattr(self, name)
        }

    @property
    def portable_template(self) -> str:
        """The template for programs that know neither this class nor ``template_args``."""
        return with_defaults(self.chat_template, self.template_args)

    def save(self, path: str | os.PathLike) -> None:
        save_json(self.to_config(), path)

    def __str__(self) -> str:
        return json.dumps(self.to_config(), ensure_ascii=False, indent=4)

    def render(
        self, messages: Messages, add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> str:
        """The text of ``messages``, {role, content} each and perhaps ``reasoning_content``,
        ``tool_calls``, ``name``, ``tool_call_id``, as the template writes it. Raises RowError when
        the template refuses them."""
        forms = self.abilities.forms
        given = forms.spelled(self.with_system(messages))
        text = self.render_given(
            given, add_generation_prompt, {forms.tools_name: tools} if tools else None
        )
        return text + self.header if add_generation_prompt else text

    def render_given(
        self, messages: Messages, generation: bool, variables: dict[str, Any] | None = None
    ) -> str:
        """The template's own text of messages in the form that it reads. Raises RowError."""
        if self.template_args:
            variables = self.template_args | (variables or {})
        try:
            return render_template(
                self.chat_template, messages, self._special_tokens, generation, variables
            )
        except jinja2.TemplateError as error:
            raise RowError("template_refused", str(error)) from error

    def with_system(self, messages: Messages) -> Messages:
        """``messages`` after the template's system message, unless they have one."""
        if not self.system_message or (messages and messages[0]["role"] == "system"):
            return messages
        return [{"role": "system", "content": self.system_message}, *messages]

    def added_end(self, calls: bool) -> str:
        """What is put behind a last response that the template leaves open: the token of the next
        turn that ends it, by which a model stops."""
        if calls:
            return self.abilities.call_end or "" if self.abilities.call_end_added else ""
        return self.end_added

    def encode(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        max_length: int | None = None,
        tools: Tools | None = None,
    ) -> Encoded:
        """Token ids and loss mask of ``messages`` (as :meth:`render` takes them, contents as the
        user typed them), every response of the assistant supervised.

        With ``max_length`` only the first complete rounds that fit are kept. Raises RowError when
        the conversation cannot be encoded or nothing fits.
        """
        row = Dialogue(self, messages, tools)
        text = row.prompt(len(row.messages)) if add_generation_prompt else row.text()
        spans = [row.span(text, k) for k in row.turns]
        return self.encoded(text, spans, row.key, max_length)

    def encode_prompt(
        self, messages: Messages, begun: str = "", tools: Tools | None = None
    ) -> Encoded:
        """What generation is given for ``messages``, which end with the user or a tool: no spans.
        ``begun``: the first words of the response, which generation continues. Raises RowError."""
        response = {"role": "assistant", "content": begun}
        row = Dialogue(self, [*messages, response], tools, begun=True)
        last = len(row.messages) - 1
        text = row.prompt(last)
        answers = list(row.answers_in(text, row.turns[:-1]))
        if begun:
            start = len(text)
            text += row.messages[last]["content"]
            answers.append((start, start))  # no token reaches over the border
        return self.encoded(text, [], row.key, None, answers)

    def encode_around(
        self, question: str, turn: Message, after: Messages, tools: Tools | None = None
    ) -> tuple[list[int], list[int]]:
        """The ids of ``turn``, the assistant's to ``question``, and those that stand between it and
        the response to ``after``. Raises RowError."""
        asked = {"role": "user", "content": question}
        row = Dialogue(self, [asked, turn, *after], tools)
        k = row.turns[0]
        text = row.prompt(len(row.messages))
        encoded = self.encoded(text, [row.span_before(text, k)], row.key, None)
        start, end = encoded.spans[0]
        return encoded.input_ids[start:end], encoded.input_ids[end:]

    def encode_response(
        self, messages: Messages, max_length: int | None = None, tools: Tools | None = None
    ) -> Encoded:
        """``messages`` with the last response alone supervised, and nothing after it; never cut.

        Works with templates that rewrite earlier turns. Raises RowError when it cannot be encoded
        or is too long.
        """
        row = Dialogue(self, messages, tools)
        last = len(row.messages) - 1
        text, span = row.alone(last)
        row.count(text, span, last)
        if not row.plain:
            row.count_system(text)
        if any("spans" in one or one.get("weight", 1) != 1 for one in row.messages):
            row.notes.add(ONLY_SFT)
        earlier = list(row.answers_in(text, row.turns[:-1]))
        encoded = self.encoded(text, [span], row.key, max_length, earlier)
        end = encoded.spans[0][1]
        notes = frozenset(row.notes)
        return Encoded(
            encoded.input_ids[:end],
            encoded.text,
            encoded.spans,
            notes=notes,
            written=encoded.written,
        )

    def encode_text(self, text: str) -> tuple[list[int], int]:
        """``(ids, tokens before the text)`` of a text that no template surrounds: bos if there is
        one, text, eos.

        Raises ValueError when the tokenizer has no eos token.
        """
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos token, with which a plain text must end; set eos_token"
            )
        shown, _, key = self.encoder.hide([{"role": "user", "content": text}])
        ids = self.encoded(shown[0]["content"], [], key, None).input_ids
        return [*ids, self.tokenizer.eos_token_id], int(self._bos is not None)

    def encode_turns(
        self, messages: Messages, max_length: int | None = None, tools: Tools | None = None
    ) -> list[Encoded]:
        """The training rows of ``messages``, of which ``options`` say what is learned: one, or one
        per round if the template rewrites earlier turns."""
        return training_rows(Dialogue(self, messages, tools), max_length)

    def encoded(
        self,
        text: str,
        spans: list[Span],
        key: str | None,
        max_length: int | None,
        others: list[Span] | None = None,
        weights: list[tuple[Span, float]] | None = None,
    ) -> Encoded:
        """``text`` as token ids behind the begin token, see :meth:`ChatEncoder.encode`. Raises
        RowError."""
        weighed = None
        written = None
        if weights:
            text, ids, ranges, weighed = self.encoder.encode_weighted(
                text, spans, key, others or [], weights
            )
        else:
            text, ids, ranges = self.encoder.encode(text, spans, key, others or [])
            if key is None and spans and self.encoder.spells(text):
                written = spans
        if self._bos is not None and ids[:1] != [self._bos]:
            ids, ranges = [self._bos, *ids], [(start + 1, end + 1) for start, end in ranges]
            weighed = weighed and [0.0, *weighed]
            written = None
        encoded = Encoded(ids, text, ranges, weights=weighed, written=written)
        return encoded if max_length is None else encoded.cut(max_length)


def setup_conversation_template(
    tokenizer,
    chat_template_config: dict | str | os.PathLike | None = None,
    save_path: str | os.PathLike | None = None,
    template_mode: str = "per_turn",
    template_args: dict[str, Any] | None = None,
    options: RowOptions | None = None,
) -> Conversation:
    """A checked Conversation from a template file, the name of a template that comes with coati,
    a dict of its fields, or (None, ``{}``) the tokenizer's template.

    A path at which nothing is, ending in .json, gets the resolved template. ``save_path`` gets it
    when the configuration was a dict or lacked something; a file that exists is never changed.
    ``template_args`` take the place of the configuration's own. Raises ValueError naming the field
    that is wrong.
    """
    path = None
    if isinstance(chat_template_config, str | os.PathLike):
        path = template_path(chat_template_config, may_be_new=True)
    config, source, folder = open_config(chat_template_config)
    if not config and getattr(tokenizer, "name_or_path", None):
        source = f"{tokenizer.name_or_path}: chat template"
    if template_args is not None:
        config = {**config, "template_args": template_args}
    conversation = Conversation.from_config(
        tokenizer, config, template_mode, source, folder, options
    )
    missing_file = path is not None and not os.path.exists(path)
    if missing_file or conversation.derived or path is None:
        target = path if missing_file else save_path
        if target is not None and not os.path.exists(target) and os.environ.get("RANK", "0") == "0":
            conversation.save(target)
            logger.info(f"conversation template stored at {target}")
    return conversation
