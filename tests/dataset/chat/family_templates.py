"""Chat templates of today's families, written after their documented behavior: where thoughts,
tools, calls and results go, what is dropped, and what ends a turn. In each the tokenizer of its
kind, with that family's control tokens."""

from functools import cache
from pathlib import Path
from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.encoded import Encoded
from coati.dataset.chat.row_options import RowOptions
from coati.dataset.chat.template_lint import TemplateReport, check_template
from tests.dataset.makers import CHATML, DEEPSEEK, LLAMA, byte_level

FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
IM_END = {"eos_token": "<|im_end|>"}
# file -> (control tokens, names of tokens)
TOKENS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "qwen2_5": (CHATML, IM_END),
    "qwen3": (CHATML, IM_END),
    "llama3_1": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "mistral_v0_3": (
        (
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        LLAMA,
    ),
    "magistral": (
        (
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[SYSTEM_PROMPT]"),
            *("[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
            *("[/TOOL_RESULTS]", "[THINK]", "[/THINK]"),
        ),
        LLAMA,
    ),
    "glm4_5": (
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        {"eos_token": "<|endoftext|>"},
    ),
    "gpt_oss": (
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"),
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"},
    ),
    "deepseek_r1": (
        (
            *("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
            *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
            *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        ),
        DEEPSEEK,
    ),
    "deepseek_v3_1": (
        (
            *("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
            *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        ),
        DEEPSEEK,
    ),
    "nemotron_3": (CHATML, IM_END),
    "phi_3": (
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    ),
    "gemma_3": (
        ("<start_of_turn>", "<end_of_turn>"),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "gemma_4": (
        (
            *("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>"),
            *("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
        ),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "exaone_4": (
        ("[|system|]", "[|user|]", "[|assistant|]", "[|tool|]", "[|endofturn|]"),
        {"bos_token": "[BOS]", "eos_token": "[|endofturn|]"},
    ),
    "smollm3": (CHATML, {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}),
    "granite_4": (
        ("<|start_of_role|>", "<|end_of_role|>"),
        {"eos_token": "<|end_of_text|>"},
    ),
    "kimi_k2": (
        (
            *("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"),
            *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ),
        {"bos_token": "[BOS]", "eos_token": "<|im_end|>"},
    ),
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


TOOLS = [WEATHER]


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer_of(name: str) -> Any:
    specials, names = TOKENS[name]
    return byte_level(specials, names, text_of(name))


def family(name: str, args: dict[str, Any] | None = None, **options: str) -> Conversation:
    """The conversation of a family; ``options`` are RowOptions."""
    config = {"chat_template": text_of(name), "template_args": args or {}}
    return Conversation.from_config(tokenizer_of(name), config, options=RowOptions(**options))


def checked(name: str) -> TemplateReport:
    """What --check_template finds in a family's template."""
    return check_template(tokenizer_of(name), {"chat_template": text_of(name)})


def learned(template: Conversation, row: Encoded) -> list[str]:
    """The text of each response that is learned."""
    return [template.encoder.decode(response) for response in row.responses()]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, thought: str | None = None, **more: Any) -> dict[str, Any]:
    thinking = {} if thought is None else {"reasoning_content": thought}
    return {"role": "assistant", "content": text, **thinking, **more}


def call(arguments: Any, thought: str | None = None, text: str = "", name: str = "weather") -> dict:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return answer(text, thought, tool_calls=calls)


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}
