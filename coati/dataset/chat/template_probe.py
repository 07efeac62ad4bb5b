"""What a chat template does, learned from a probe dialogue: where responses begin and end, and
whether it can be trained.

:class:`TemplateProbe` finds what is wrong or remarkable; template_examination.py completes a
Conversation with it, template_lint.py reports all findings at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

import jinja2

from coati.dataset.chat.chat_encoder import ChatEncoder
from coati.dataset.chat.message_forms import Messages
from coati.dataset.chat.template import render_template, special_tokens
from coati.dataset.chat.template_abilities import Abilities, AbilityProbe, tool_dialogue
from coati.dataset.chat.tokenizer_fit import cut_markers, given_back

QUESTIONS = ("Probe question number one", "Probe question number two")
ANSWERS = ("Probe answer number one", "Probe answer number two")
SYSTEM = "Probe system message"
THOUGHT = "<think>\nProbe thought\n</think>\n\n"
# Where the end of a response is written: after each by itself, after the last alone, by the turn
# that follows.
OWN = "own"
LAST = "last"
NEXT = "next"


def dialogue(responses: tuple[str, str] = ANSWERS) -> list[dict[str, str]]:
    """Two rounds of user and assistant."""
    turns = [text for pair in zip(QUESTIONS, responses, strict=True) for text in pair]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


@dataclass(frozen=True)
class Finding:
    """What was found and what to do about it. With an error training would be wrong; one that is
    ``refused`` is so in any case, and no row is made with the template. A warning that is ``said``
    is so by every run with another template than the tokenizer's own."""

    kind: str  # "error" or "warning"
    problem: str
    remedy: str = ""
    refused: bool = False
    said: bool = False

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


def _refused(problem: str, remedy: str) -> Finding:
    return Finding("error", problem, remedy, refused=True)


def _warning(problem: str, remedy: str = "") -> Finding:
    return Finding("warning", problem, remedy)


class TemplateProbe:
    """The probe dialogue under one template; :meth:`findings` runs every check that still makes
    sense.

    ``system`` is the system message, None once the template has refused it; ``text`` the rendered
    dialogue, empty where all is refused.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str,
        system_message: str | None,
        end_of_assistant: str | None,
        template_mode: str,
        encoder: ChatEncoder | None = None,
        template_args: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.system = self.given_system = system_message
        self.given_end = end_of_assistant
        self.template_mode = template_mode
        self.encoder = encoder or ChatEncoder(tokenizer, end_of_assistant or "")
        self._names = special_tokens(tokenizer)
        self._args = template_args or {}
        self.text = ""

    def render(
        self,
        messages: list[dict],
        generation: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        given = self._args | (variables or {})
        return render_template(
            self.chat_template, [*system, *messages], self._names, generation, given
        )

    def findings(self) -> Iterator[Finding]:
        """Everything found, what makes the most of the rest meaningless first."""
        yield from self._refusals()
        if not self.text:
            return
        yield from self._lost()
        yield from self._tokenizer_lost()
        checks: tuple[Callable[[], Iterator[Finding]], ...] = (
            self._missing_markers,
            self._system_messages,
            self._doubled_bos,
            self._endings,
            self._rewriting,
            self._generation_prompt,
        )
        for check in checks:
            try:
                yield from check()
            except (jinja2.TemplateError, ValueError) as error:  # a content is elsewhere
                name = check.__name__.strip("_").replace("_", " ")
                yield _refused(f"{name} cannot be examined: {error}", "fix chat_template")

    def _refusals(self) -> Iterator[Finding]:
        errors = []
        for system in dict.fromkeys((self.system, None)):
            self.system = system
            try:
                self.text = self.render(dialogue())
                break
            except jinja2.TemplateError as error:
                errors.append(error)
        if errors and self.text:
            yield _refused(
                f"the template refuses a system message ({errors[0]})",
                "set system_message to null",
            )
        elif errors:
            yield _refused(
                f"the template refuses an ordinary dialogue ({errors[-1]})", "fix chat_template"
            )
        if self.system and self.moves_system:
            self.system = None  # it is not in the text of finished responses
            self.text = self.render(dialogue())

    def _lost(self) -> Iterator[Finding]:
        for content in (*QUESTIONS, *ANSWERS):
            if (count := self.text.count(content)) != 1:
                yield Finding(
                    "error",
                    f"the message {content!r} is in the rendered text {count} times",
                    "fix chat_template: each should occur once in the rendered text",
                    refused=content != QUESTIONS[0],
                )

    def _tokenizer_lost(self) -> Iterator[Finding]:
        """A tokenizer that does not give back what it was given, whatever the template."""
        if (found := given_back(self.tokenizer, ANSWERS[0])) != ANSWERS[0]:
            yield _refused(
                f"the tokenizer makes {found!r} of {ANSWERS[0]!r}",
                "its files are damaged, or its tokenizer_class is that of another kind of "
                "tokenizer: correct it, or take another tokenizer",
            )

    def _missing_markers(self) -> Iterator[Finding]:
        """Markers that this tokenizer has no token for, but cuts into ordinary text."""
        texts = self.text + self.render(dialogue()[:1], generation=True)
        if self.abilities.calls:
            messages, tools = tool_dialogue()
            forms = self.abilities.forms
            texts += self.render(forms.spelled(messages), variables={forms.tools_name: tools})
        if cut := cut_markers(self.tokenizer, texts):
            yield Finding(
                "warning",
                f"the tokenizer has no token for {cut}",
                "a model sees ordinary text there: is the template that of another model?",
                said=True,
            )

    @cached_property
    def moves_system(self) -> bool:
        """Whether a system message stands before the last question alone, and only until that is
        responded to."""
        kept = self.system
        self.system = SYSTEM
        try:
            asked = self.render(dialogue()[:1], generation=True)
            return SYSTEM in asked and SYSTEM not in self.render(dialogue()[:2])
        except jinja2.TemplateError:
            return False
        finally:
            self.system = kept

    def _system_messages(self) -> Iterator[Finding]:
        if self.moves_system:
            yield _warning(
                "a system message stands before the last question, and only until that is "
                "responded to: rows that have one become one training row per response, each as "
                "generation sees it"
            )
            return
        kept = self.system
        self.system = SYSTEM
        try:
            if SYSTEM not in self.render(dialogue()):
                yield _warning(
                    "a system message is dropped: rows that have one are trained without it"
                    + (", and system_message does nothing" if kept else "")
                )
        except jinja2.TemplateError as error:
            yield _warning(
                f"a system message is refused ({error}): rows that have one are dropped and counted"
            )
        finally:
            self.system = kept

    def _doubled_bos(self) -> Iterator[Finding]:
        bos = self.tokenizer.bos_token_id
        if bos is not None and self.encoder.encode(self.text, [])[1][:2] == [bos, bos]:
            yield _refused(
                "the text begins with two begin-of-sequence tokens "
                f"({self.tokenizer.bos_token!r}, id {bos})",
                "let chat_template write bos_token once, or not at all",
            )

    @cached_property
    def finished(self) -> tuple[str, str]:
        """The dialogue after its first and after its second response."""
        return self.render(dialogue()[:2]), self.text

    def tails(self) -> list[str]:
        """What follows a response: at the end of a dialogue, in its middle, at the end again."""
        first, both = self.finished
        after = both.index(ANSWERS[0]) + len(ANSWERS[0])
        return [
            first[first.index(ANSWERS[0]) + len(ANSWERS[0]) :],
            both[after : both.index(QUESTIONS[1])],
            both[both.index(ANSWERS[1]) + len(ANSWERS[1]) :],
        ]

    @cached_property
    def _derived(self) -> tuple[str | None, str]:
        """``(what ends responses, where it is written)``: of what follows every response (OWN) the
        first control token, or all of it; else that of a finished dialogue alone (LAST); else the
        token that the next turn begins with (NEXT)."""
        tails = self.tails()
        common = self._whole_tokens(commonprefix(tails), tails)
        if common.strip():
            return self._first_control(common) or common.strip(), OWN
        finished = [tails[0], tails[2]]
        closing = self._first_control(self._whole_tokens(commonprefix(finished), finished))
        if closing:
            return closing, LAST
        following = tails[1].lstrip()
        begun = [c for c in self.controls if following.startswith(c)]
        if begun and not any(tail.strip() for tail in finished):
            return begun[0], NEXT
        return None, OWN

    @cached_property
    def controls(self) -> list[str]:
        """The texts of the control tokens but the one that begins a text, the longest first."""
        return [marker for marker in self.encoder.markers if marker != self.tokenizer.bos_token]

    def _first_control(self, text: str) -> str | None:
        found = [marker for marker in self.encoder.markers if marker in text]
        return min(found, key=lambda one: (text.index(one), -len(one)), default=None)

    def _whole_tokens(self, common: str, tails: list[str]) -> str:
        """``common``, which all ``tails`` begin with, up to the last border of a control token."""
        cut = len(common)
        for tail in tails:
            for marker in self.encoder.markers:
                place = tail.find(marker, max(0, len(common) - len(marker) + 1))
                if 0 <= place < len(common) < place + len(marker):
                    cut = min(cut, place)
        return common[:cut]

    @property
    def derived_end(self) -> str | None:
        return self._derived[0]

    @cached_property
    def end_written(self) -> str:
        """Where :attr:`end` is written: OWN, LAST or NEXT; "" nowhere."""
        if self.given_end is None:
            return self._derived[1]
        if all(self.given_end in tail for tail in self.tails()):
            return OWN
        return self._derived[1] if self.given_end == self.derived_end else ""

    @property
    def end_added(self) -> str:
        """What ends a last response and the template leaves to the next turn."""
        if self.end_written != NEXT or not self.end:
            return ""
        last, middle, _ = self.tails()
        added = middle[: middle.index(self.end) + len(self.end)]
        return added.removeprefix(last)

    @cached_property
    def abilities(self) -> Abilities:
        """What the template does with thoughts and tools."""

        def render(messages: Messages, generation: bool, variables: dict[str, Any]) -> str:
            return self.render(messages, generation, variables)

        probe = AbilityProbe(
            render, self.controls, self.end or "", self.header or "", self.chat_template
        )
        return probe.abilities()

    @property
    def end(self) -> str | None:
        """end_of_assistant as given, or else derived."""
        return self.derived_end if self.given_end is None else self.given_end

    def _endings(self) -> Iterator[Finding]:
        tails = self.tails()
        derived = self.derived_end
        given = self.given_end
        if not given and not derived:
            yield _refused(
                "no text follows every response, so its end is unknown and a model cannot learn "
                "to stop",
                "set end_of_assistant, and let chat_template write it after every assistant turn, "
                "the last one included",
            )
            return
        if given and not self.end_written:
            hint = f"here {derived!r} would do: " if derived else ""
            yield _refused(
                f"end_of_assistant {given!r} does not follow every response",
                f"{hint}set end_of_assistant to what does, or leave it out to have it derived",
            )
            given = None
        # What follows the end marker of a finished dialogue is never trained.
        yield from self._after_the_end(given or derived or "", tails[2])

    def _after_the_end(self, marker: str, tail: str) -> Iterator[Finding]:
        after = tail.partition(marker)[2] if marker else tail
        control = set(self.encoder.controls.values()) - {self.tokenizer.unk_token}
        outside = [token for token in control if token and token in after]
        if outside:
            first = min(outside, key=after.index)
            if any(token in marker for token in control if token):
                yield _warning(
                    f"a finished dialogue gets one more token, {first!r}, after the end of its "
                    f"last response, {marker!r}: that is a control token of its own, which a model "
                    "is trained to write and generation stops at"
                )
                return
            yield Finding(
                "error",
                f"the end token {first!r} stands after end_of_assistant {marker!r}, outside the "
                "mask: a model is not trained to write it",
                f"set end_of_assistant to {first!r}",
            )
        eos = self.tokenizer.eos_token
        if eos is None:
            yield _warning(
                "the tokenizer has no end-of-sequence token: generation stops at stop_ids alone"
            )
        elif eos not in marker and eos not in outside:
            yield _warning(
                f"responses end with {marker!r}; the tokenizer's end-of-sequence token {eos!r} is "
                "never written, so programs that stop at it alone do not stop: give them stop_ids"
            )

    def rewrites(self, thought: str) -> bool:
        """Whether the text up to the end of the first response, which begins with ``thought``,
        changes once a second round follows."""
        turns = dialogue(tuple(thought + response for response in ANSWERS))
        first = self.render(turns[:2])
        both = self.render(turns)
        marker = self.end if self.end and self.end in first else ANSWERS[0]
        end = first.rindex(marker) + len(marker)
        return not both.startswith(first[:end])

    @cached_property
    def rewritten(self) -> str | None:
        """The thought with which an earlier response is rewritten, ``""`` where any is; None where
        none is."""
        found = next((thought for thought in ("", THOUGHT) if self.rewrites(thought)), None)
        return THOUGHT if found is None and self.abilities.thoughts == "last" else found

    def _rewriting(self) -> Iterator[Finding]:
        if self.rewritten is None:
            if self.given_system and self.moves_system and self.template_mode == "refuse":
                yield _refused(
                    "the system message is rendered before the last question alone",
                    "use template_mode per_turn (one row per assistant turn), or set "
                    "system_message to null",
                )
            return
        problem = (
            "not prefix-preserving: an earlier assistant turn is rendered otherwise once the "
            f"dialogue goes on{' (a thought is dropped)' if self.rewritten else ''}"
        )
        if self.template_mode == "refuse":
            yield _refused(
                f"{problem}, which --template_mode refuse refuses",
                "use template_mode per_turn (one row per assistant turn) or another chat_template",
            )
        else:
            yield _warning(
                f"{problem}; one training row is made per assistant turn, and --template_mode "
                "refuse refuses it"
            )

    @cached_property
    def headers(self) -> list[str | None]:
        """What has to be added to the generation prompt to reach the first and the second response;
        None where it does not lead to the response."""
        found: list[str | None] = []
        for turn, whole in zip((1, 3), self.finished, strict=True):
            plain = self.render(dialogue()[:turn])
            prompt = self.render(dialogue()[:turn], generation=True)
            response = whole.index(ANSWERS[turn // 2])
            if not whole.startswith(prompt) or len(prompt) > response:
                found.append(None)
            else:
                found.append(whole[len(plain) : response].rstrip(" ") if prompt == plain else "")
        return found

    @property
    def header(self) -> str | None:
        """What precedes every response and the template writes no generation prompt for; None where
        there is no one such text."""
        first, second = self.headers
        if first is None or first != second:
            return None
        return first if first.strip() else ""

    def _generation_prompt(self) -> Iterator[Finding]:
        if None in self.headers:
            turn = (1, 3)[self.headers.index(None)]
            plain = self.render(dialogue()[:turn])
            prompt = self.render(dialogue()[:turn], generation=True)
            yield _warning(
                f"the generation prompt {prompt[len(plain) :]!r} is not a prefix of the finished "
                "turn: responses are trained from their first character on"
            )
        elif self.header is None:
            yield _warning(
                "there is no generation prompt, and what precedes responses differs "
                f"({self.headers[0]!r}, {self.headers[1]!r}): responses are trained from their "
                "first character on"
            )
        elif self.header:
            yield _warning(
                f"there is no generation prompt: {self.header.strip()!r}, which precedes "
                "responses, is added"
            )


def abilities_of(tokenizer: Any, chat_template: str) -> Abilities:
    """What the template does with thoughts and tools; nothing where it refuses a dialogue."""
    probe = TemplateProbe(tokenizer, chat_template, None, None, "per_turn")
    try:
        next(probe.findings(), None)
        return probe.abilities if probe.text else Abilities()
    except (jinja2.TemplateError, ValueError):
        return Abilities()
