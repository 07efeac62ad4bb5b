"""Further chat templates, of the ways in which families write calls of tools that those of
family_templates.py do not have, each with that family's control tokens."""

from functools import cache
from pathlib import Path
from typing import Any

from coati.dataset.chat.conversation import Conversation
from tests.dataset.chat import family_templates
from tests.dataset.makers import CHATML, DEEPSEEK, LLAMA, byte_level

FOLDER = Path(__file__).parents[2] / "data" / "call_templates"
COHERE = ("START_OF_TURN_TOKEN", "END_OF_TURN_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN", "SYSTEM_TOKEN")
COHERE += ("START_THINKING", "END_THINKING", "START_ACTION", "END_ACTION", "START_RESPONSE")
COHERE += ("END_RESPONSE", "START_TOOL_RESULT", "END_TOOL_RESULT")
TOKENS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "qwen3_coder": (CHATML, {"eos_token": "<|im_end|>"}),
    "minimax_m2": (("]~!b[", "]~b]"), {"eos_token": "[e~["}),
    "deepseek_v3_2": (("<｜User｜>", "<｜Assistant｜>"), DEEPSEEK),
    "llama4_pythonic": (
        ("<|header_start|>", "<|header_end|>", "<|python_tag|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"},
    ),
    "olmo_3": (CHATML, {"eos_token": "<|im_end|>"}),
    "lfm_2": (
        (*CHATML, "<|tool_call_start|>", "<|tool_call_end|>"),
        {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"},
    ),
    "mistral_small_3_2": (("[INST]", "[/INST]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), LLAMA),
    "command_r7b": (
        tuple(f"<|{name}|>" for name in COHERE if name != "END_OF_TURN_TOKEN"),
        {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
    ),
    "granite_3": (
        ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        {"eos_token": "<|end_of_text|>"},
    ),
    "gemma_4_bare": (
        ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
}
WITHOUT_TOOLS = ("phi_3", "gemma_3")
ALL = (*TOKENS, *(name for name in family_templates.TOKENS if name not in WITHOUT_TOOLS))


@cache
def conversation_of(name: str) -> Conversation:
    folder, tokens = FOLDER, TOKENS
    if name not in TOKENS:
        folder, tokens = family_templates.FOLDER, family_templates.TOKENS
    specials, names = tokens[name]
    tokenizer: Any = byte_level(specials, names)
    text = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    return Conversation(tokenizer, None, text)
