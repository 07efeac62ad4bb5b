"""Sample answers during training."""

from coati.dataset.conversation import Conversation
from coati.models.generation import generate
from coati.models.samples import format_samples, left_pad, sample_answers, without_stop
from tests.tiny import tiny_llama, tiny_tokenizer


def test_each_prompt_gets_the_answer_that_it_gets_alone():
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    conversation = Conversation.from_config(tokenizer, {})
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    prompts = ["hello", [*history, {"role": "user", "content": "how are you today?"}]]
    together = sample_answers(model, tokenizer, conversation, prompts, max_new_tokens=8)
    assert [prompt for prompt, _ in together] == ["hello", "how are you today?"]
    assert together == [sample_answers(model, tokenizer, conversation, [p], max_new_tokens=8)[0] for p in prompts]
    ids = conversation.encode([{"role": "user", "content": "hello"}], add_generation_prompt=True).input_ids
    alone = generate(model, left_pad([ids], 0)[0], stop_sequences=[[2]], max_new_tokens=8, do_sample=False)
    assert together[0][1] == tokenizer.decode(alone.answers()[0], skip_special_tokens=True).strip()
    assert sample_answers(model, tokenizer, conversation, []) == []


def test_rows_are_padded_on_the_left():
    ids, mask = left_pad([[5], [6, 7, 8]], pad=7)
    assert ids.tolist() == [[7, 7, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_the_stop_sequence_is_taken_off():
    assert without_stop([5, 7, 8], [[8], [7, 8]]) == [5]  # the longest that fits
    assert without_stop([5, 7], [[8], [7, 8]]) == [5, 7]


def test_the_table():
    table = format_samples([("hello there", "hi"), ("a" * 30, "word " * 40), ("again", "")], width=45)
    assert table.splitlines()[:3] == [
        "prompt           | answer",
        "-----------------+---------------------------",
        "hello there      | hi",
    ]
    assert all(len(line) <= 45 for line in table.splitlines())
    assert table.count("word") < 40 and "..." in table and table.splitlines()[-1].endswith("(empty)")
