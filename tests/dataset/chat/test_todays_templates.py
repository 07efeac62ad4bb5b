"""Templates of config/conversation_template/ for today's families, against the formats that their
makers document, written out by hand."""

import pytest

from coati.dataset import setup_conversation_template
from tests.dataset.makers import TEMPLATES, family_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n"
)
DEEPSEEK = (
    "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
    "<｜User｜>Bye<｜Assistant｜>"
)
WRITTEN = {
    "Qwen_Qwen3-8B": CHATML,
    "Qwen_Qwen3.5-9B": CHATML,
    "HuggingFaceTB_SmolLM3-3B": CHATML,
    "allenai_Olmo-3-7B-Instruct": CHATML,
    "LiquidAI_LFM2-1.2B": "<|startoftext|>" + CHATML,
    "meta-llama_Llama-3.1-8B-Instruct": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "meta-llama_Llama-4-Scout-17B-16E-Instruct": (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHi<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nHello.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nBye<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    ),
    # Gemma 3 has no system turn: the text goes before the first question.
    "google_gemma-3-4b-it": (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    ),
    "google_gemma-4-31B-it": (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n"
        "<|turn>model\nHello.<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"
    ),
    "openai_gpt-oss-20b": (
        "<|start|>system<|message|>Reasoning: low\n\n"
        "# Valid channels: analysis, commentary, final.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
        "<|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello.<|return|>"
        "<|start|>user<|message|>Bye<|end|>"
        "<|start|>assistant<|channel|>final<|message|>"
    ),
    # GLM ends a response with the token that begins the user's turn.
    "zai-org_GLM-4.5-Air": (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\nHello.<|user|>\nBye"
        "<|assistant|>\n"
    ),
    "microsoft_Phi-3.5-mini-instruct": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n"
    ),
    "microsoft_phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Hello.<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|>"
        "<|im_start|>assistant<|im_sep|>"
    ),
    "mistralai_Mistral-Small-3.2-24B-Instruct-2506": (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi[/INST]Hello.</s>[INST]Bye[/INST]"
    ),
    "deepseek-ai_DeepSeek-V3": DEEPSEEK,
    "deepseek-ai_DeepSeek-R1": DEEPSEEK,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_text_is_the_familys(name):
    conversation = setup_conversation_template(family_tokenizer(name), TEMPLATES / f"{name}.json")
    assert conversation.render([SYSTEM, *TURNS], add_generation_prompt=True) == WRITTEN[name]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_thought_of_an_earlier_turn_is_kept_and_trained(name):
    """The tokenizers' own templates of several of these families drop it, so that the row would no
    longer be what the model wrote."""
    conversation = setup_conversation_template(family_tokenizer(name), TEMPLATES / f"{name}.json")
    thought = "<think>\nadd\n</think>\n\n2"
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": thought}]
    (row,) = conversation.encode_turns([*turns, *TURNS[:2]])
    answers = [conversation.encoder.decode(answer) for answer in row.responses()]
    assert answers == [text + conversation.end_of_assistant for text in (thought, "Hello.")]


def test_thoughts_of_gpt_oss_are_in_their_channel():
    """With a reasoning effort the prompt leaves the channel to the model; without one it answers at
    once."""
    name = "openai_gpt-oss-20b"
    thought = "<|channel|>analysis<|message|>add<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>2<|return|>"
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "add"},
    ]
    for effort in ("high", None):
        args = {"reasoning_effort": effort} if effort else {}
        conversation = setup_conversation_template(
            family_tokenizer(name), TEMPLATES / f"{name}.json", template_args=args
        )
        (row,) = conversation.encode_turns(turns)
        assert [conversation.encoder.decode(one) for one in row.responses()] == [thought + final]
        assert f"Reasoning: {effort or 'low'}\n" in row.text
