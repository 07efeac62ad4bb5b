"""Rows with tools, from their preparation to a served model that calls them: what was trained is
what the template writes, and what the template writes is read back."""

import json
import os
import subprocess
import sys

import openai
import pytest

from tests.end_to_end.inputs import ROOT, write_model
from tests.inference.serving import NAME, running

TEMPLATE = ROOT / "tests" / "data" / "chat_templates" / "qwen2_5.jinja"
CITIES = {"Oslo": 5, "Rome": 18, "Lima": 21}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def row(city: str, degrees: int) -> dict:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    call = {"id": "call_1", "type": "function", "function": function}
    return {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": f"Weather in {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": f"{degrees} degrees"},
            {"role": "assistant", "content": f"It has {degrees} degrees in {city}."},
        ],
    }


def coati(*words: object) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "coati", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    model = write_model(folder / "model", max_position_embeddings=2048)
    template = folder / "template.json"
    template.write_text(json.dumps({"chat_template": TEMPLATE.read_text(encoding="utf-8")}))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(*each)) + "\n" for each in CITIES.items()))
    own = ("--conversation_template_config", template, "--max_length", 1024)
    coati(
        *("prepare", "--type", "sft", "--data_input_dirs", rows, "--tokenizer_dir", model),
        *("--data_cache_dir", folder / "cache", "--data_jsonl_output_dir", folder / "jsonl"),
        *("--data_arrow_output_dir", folder / "data", *own),
    )
    coati(
        *("sft", "--pretrain", model, "--dataset", folder / "data", "--save_dir", folder / "out"),
        *(
            "--max_epochs",
            100,
            "--batch_size",
            3,
            "--accumulation_steps",
            1,
            "--lr",
            "4e-3",
            "--warmup_steps",
            5,
        ),
        *("--mixed_precision", "fp32", "--plugin", "ddp", *own),
    )
    return folder / "out"


@pytest.mark.slow
def test_what_was_learned_of_tools_is_served_as_tool_calls(trained):
    from coati.inference.model_loading import load

    with running(loaded=load(trained), max_length=2048) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=120)
        for city, degrees in CITIES.items():
            messages = [{"role": "user", "content": f"Weather in {city}?"}]
            ask = {"model": NAME, "messages": messages, "tools": [TOOL], "temperature": 0}
            choice = client.chat.completions.create(**ask, max_tokens=200).choices[0]
            assert choice.finish_reason == "tool_calls" and choice.message.content is None
            (call,) = choice.message.tool_calls
            assert (call.function.name, json.loads(call.function.arguments)) == (
                "weather",
                {"city": city},
            )
            streamed = client.chat.completions.create(**ask, max_tokens=200, stream=True)
            deltas = [chunk.choices[0].delta.tool_calls for chunk in streamed]
            pieces = [each for calls in deltas for each in calls or []]
            assert pieces[0].function.name == "weather"
            assert "".join(each.function.arguments for each in pieces) == call.function.arguments
            messages += [
                choice.message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": call.id, "content": f"{degrees} degrees"},
            ]
            answer = client.chat.completions.create(**ask, max_tokens=200).choices[0]
            assert answer.message.content == f"It has {degrees} degrees in {city}."
            assert (answer.finish_reason, answer.message.tool_calls) == ("stop", None)
