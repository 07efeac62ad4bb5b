"""The Modelfile beside a GGUF file: its template says what the model's own does."""

import re
from copy import deepcopy

import pytest

from coati.dataset.chat.conversation import Conversation, setup_conversation_template
from coati.inference.export.ollama import modelfile, turns_of
from coati.inference.model_loading import Loaded
from coati.utils.resources import template_path
from tests.tiny import tiny_llama, tiny_tokenizer


def in_ollama(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of one loop over messages with a branch for each role."""
    begin, rest = template.split("{{ range .Messages }}")
    loop, prompt = rest.rsplit("{{ end }}{{ end }}", 1)
    parts = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', loop)[1:]
    by_role = dict(zip(parts[::2], parts[1::2], strict=True))
    turns = [by_role[one["role"]].replace("{{ .Content }}", one["content"]) for one in messages]
    return (begin + "".join(turns) + prompt).replace('{{ "{{" }}', "{{")


def loaded(config: dict | None = None, **settings) -> Loaded:
    tokenizer = deepcopy(tiny_tokenizer())
    model = tiny_llama(layers=1)
    model.generation_config.update(**settings)
    return Loaded(model, tokenizer, setup_conversation_template(tokenizer, config or {}))


def template_in(text: str) -> str:
    return re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]


def test_chatml_is_said_in_ollamas_language():
    made = loaded()
    text = modelfile("f16.gguf", made)
    assert text.splitlines()[1] == "FROM ./f16.gguf"
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "and now?"},
    ]
    for messages in (talk, talk[1:], talk[:2], talk[1:2]):
        assert in_ollama(template_in(text), messages) == made.conversation.render(messages, True)
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 512" in text
    assert "SYSTEM" not in text and "temperature" not in text


@pytest.mark.parametrize("name", ["HuggingFaceTB_SmolLM2-135M-Instruct", "microsoft_phi-4"])
def test_templates_that_come_with_coati_are_said_right(name):
    conversation = setup_conversation_template(deepcopy(tiny_tokenizer()), template_path(name))
    turns = turns_of(conversation)
    assert turns is not None
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "one two"}]
    more = [*messages, {"role": "assistant", "content": "x"}, messages[1]]
    for talk in (messages, more):
        assert in_ollama(turns.in_go(), talk) == conversation.render(talk, True)


TURN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}MARK\n{{ m['content'] }}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistantMARK\n{% endif %}"
)


def test_a_template_that_writes_turns_by_their_place_is_left_to_ollama():
    made = loaded()
    config = made.conversation.to_config() | {
        "chat_template": TURN.replace("MARK", " {{ loop.index }}", 1).replace("MARK", "")
    }
    changed = made._replace(conversation=Conversation.from_config(made.tokenizer, config))
    assert turns_of(changed.conversation) is None
    text = modelfile("f16.gguf", changed)
    assert "TEMPLATE" not in text and "# The chat template is the one inside" in text


def test_the_model_s_own_settings_and_system_message():
    made = loaded(do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.1)
    config = made.conversation.to_config() | {"system_message": "You are kind."}
    text = modelfile(
        "q8_0.gguf",
        made._replace(conversation=Conversation.from_config(made.tokenizer, config)),
    )
    for line in ("temperature 0.6", "top_k 20", "repeat_penalty 1.1"):
        assert f"PARAMETER {line}\n" in text
    assert 'SYSTEM """You are kind."""' in text


def test_braces_of_a_template_are_texts_in_ollama():
    made = loaded()
    config = made.conversation.to_config() | {"chat_template": TURN.replace("MARK", " {{ '{{' }}")}
    changed = Conversation.from_config(made.tokenizer, config)
    turns = turns_of(changed)
    assert turns is not None and '{{ "{{" }}' in turns.in_go()
    talk = [{"role": "user", "content": "one"}]
    assert in_ollama(turns.in_go(), talk) == changed.render(talk, True)
