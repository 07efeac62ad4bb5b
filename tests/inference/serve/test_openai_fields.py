"""Several choices, log-probs, prefill and text completions, asked for by OpenAI's own client."""

import math

import openai
import pytest
import torch

from coati.models.generation.detokenize import decode
from tests.inference.serving import NAME, running, until

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server():
    with running(endless=True) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def chat(client, **fields):
    return client.chat.completions.create(
        **{"model": NAME, "messages": HELLO, "max_tokens": 8} | fields
    )


def completion(client, **fields):
    return client.completions.create(**{"model": NAME, "prompt": "hello", "max_tokens": 8} | fields)


def greedy(server, ids, count):
    """The next ``count`` ids and the log-probs (count, V) that they are drawn from."""
    assert until(lambda: server.engine.running == 0)  # whose thread prepares the weights meanwhile
    found, rows = [], []
    with torch.no_grad():
        for _ in range(count):
            logits = server.engine.loaded.model(torch.tensor([[*ids, *found]])).logits[0, -1]
            rows.append(logits.log_softmax(-1))
            found.append(int(logits.argmax()))
    return found, rows


def test_several_choices_are_different_samples_and_seeds_repeat_them(client):
    hot = {"n": 3, "temperature": 1.5, "seed": 4}
    first, again = chat(client, **hot), chat(client, **hot)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] == chat(client, **hot | {"n": 1}).choices[0].message.content
    assert first.usage.completion_tokens == 24 and first.usage.prompt_tokens < 24
    streamed = {}
    for chunk in chat(client, **hot, stream=True):
        for choice in chunk.choices:
            streamed.setdefault(choice.index, [""])[0] += choice.delta.content or ""
            streamed[choice.index].append(choice.finish_reason)
    assert [streamed[number][0] for number in range(3)] == texts
    assert all(parts[1:].count("length") == 1 for parts in streamed.values())


def test_logprobs_are_the_models_own(client, server):
    ids, rows = greedy(server, server.engine.encode(HELLO), 8)
    tokenizer = server.engine.loaded.tokenizer
    for options in ({}, {"temperature": 0.3, "extra_body": {"top_k": 1}}):  # neither moves them
        choice = chat(client, logprobs=True, top_logprobs=3, **options).choices[0]
        content = choice.logprobs.content
        assert len(content) == 8
        for scored, id, row in zip(content, ids, rows, strict=True):
            assert scored.logprob == pytest.approx(float(row[id]), abs=1e-4)
            best = row.topk(3).values.tolist()
            assert [each.logprob for each in scored.top_logprobs] == pytest.approx(best, abs=1e-4)
        written = b"".join(bytes(scored.bytes) for scored in content)
        assert written.decode("utf-8", "replace") == decode(tokenizer, ids, False)
    streamed = [
        scored
        for chunk in chat(client, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for scored in chunk.choices[0].logprobs.content
    ]
    assert [each.logprob for each in streamed] == [each.logprob for each in content]
    assert streamed[0].top_logprobs == [] and chat(client).choices[0].logprobs is None


def test_logprobs_end_before_a_stop_string(client):
    whole = chat(client, max_tokens=20).choices[0].message.content
    stop = whole[3:5]
    found = chat(client, max_tokens=20, stop=stop, logprobs=True).choices[0]
    assert found.message.content == whole[: whole.index(stop)]
    assert "".join(each.token for each in found.logprobs.content) == found.message.content


def test_min_p_of_one_leaves_the_likeliest_token(client):
    wild = {"temperature": 2.0, "seed": 3}
    greedy_text = chat(client, temperature=0).choices[0].message.content
    assert chat(client, **wild).choices[0].message.content != greedy_text
    assert chat(client, **wild, extra_body={"min_p": 1}).choices[0].message.content == greedy_text


def test_a_last_message_of_the_assistant_is_continued(client, server):
    """The joined text is what the same tokens say without a cut, spaces included."""
    engine = server.engine
    begun = "hello there, how"
    ids = engine.encode(HELLO, begun)
    assert ids[: len(engine.encode(HELLO))] == engine.encode(HELLO)
    tokenizer = engine.loaded.tokenizer
    assert decode(tokenizer, ids, False).endswith("assistant\n" + begun)
    new, _ = greedy(server, ids, 8)
    messages = [*HELLO, {"role": "assistant", "content": begun}]
    found = chat(client, messages=messages, temperature=0).choices[0].message.content
    whole = decode(tokenizer, [*ids, *new])
    assert whole == decode(tokenizer, ids) + found
    streamed = chat(client, messages=messages, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == found
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's"):
        chat(client, messages=messages, extra_body={"continue_final_message": False})


def test_control_tokens_in_a_beginning_are_text(server):
    """Nobody closes the model's turn by way of a beginning."""
    end = server.engine.loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = server.engine.encode(HELLO, "a").count(end)
    assert server.engine.encode(HELLO, "a<|im_end|>b").count(end) == plain


def test_text_completions(client, server):
    tokenizer = server.engine.loaded.tokenizer
    ids = tokenizer("hello").input_ids
    new, rows = greedy(server, ids, 8)
    found = completion(client, temperature=0, logprobs=2)
    text = decode(tokenizer, [*ids, *new])
    assert found.object == "text_completion" and "hello" + found.choices[0].text == text
    scored = found.choices[0].logprobs
    expected = [float(row[id]) for row, id in zip(rows, new, strict=True)]
    assert scored.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert scored.text_offset[0] == 0 and len(scored.tokens) == 8
    assert max(scored.top_logprobs[0].values()) == pytest.approx(float(rows[0].max()), abs=1e-4)
    assert completion(client, prompt=ids, temperature=0).choices[0].text == found.choices[0].text
    streamed = completion(client, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[0].text
    assert completion(client, max_tokens=openai.omit).usage.completion_tokens == 16  # OpenAI's


def test_text_completions_of_several_prompts(client):
    found = completion(client, prompt=["hello", "there"], n=2, temperature=0)
    texts = [choice.text for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == completion(client, temperature=0).choices[0].text
    assert texts[2] == texts[3] == completion(client, prompt="there", temperature=0).choices[0].text
    assert found.usage.completion_tokens == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": ["a", ""]}, "prompt is empty"),
        ({"prompt": [[0], [0, 99999]]}, "token ids must be from 0 to 383"),
        ({"prompt": [1, 99999]}, "token ids must be from 0 to 383"),
        ({"echo": True}, "echo is not served"),
        ({"best_of": 3}, "best_of is not served"),
        ({"suffix": "x"}, "suffix is not served"),
        ({"prompt": ["a"] * 20, "n": 16}, "320 responses are more than this server takes at once"),
    ],
)
def test_text_completions_that_cannot_be_given(client, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        completion(client, **fields)


def test_too_many_prompts_are_refused_before_they_are_tokenized(client, server, monkeypatch):
    monkeypatch.setattr(server.engine, "encode_text", lambda prompt: 1 / 0)
    with pytest.raises(openai.BadRequestError, match="1000 responses are more than"):
        completion(client, prompt=["a"] * 1000)


@pytest.mark.parametrize(
    "fields", [{"prompt": [True, 1]}, {"prompt": [[False]]}, {"logprobs": True}]
)
def test_text_completions_take_no_true_for_1(client, fields):
    with pytest.raises(openai.UnprocessableEntityError):
        completion(client, **fields)


def test_embeddings_are_refused_by_name(client):
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings is not served; this server off"):
        client.embeddings.create(model=NAME, input="hello")


def test_a_logprob_of_minus_infinity_is_a_number(server):
    logits = torch.full((384,), -math.inf)
    logits[5] = 0
    scored = server.engine._scorer(5, logits, 2, 0)
    assert (scored.logprob, scored.alternatives[1][1]) == (0.0, -9999.0)


def test_bytes_of_parts_of_characters(server):
    tokenizer = server.engine.loaded.tokenizer
    ids = tokenizer("你 a").input_ids
    texts = [server.engine._scorer.text_of(id) for id in ids]
    assert [text.bytes for text in texts[:3]] == [[0xE4], [0xBD], [0xA0]]
    assert texts[0].text == "\\xe4" and b"".join(bytes(t.bytes) for t in texts) == "你 a".encode()
