"""A reward model behind HTTP: its scores are those of the model in the run's own process."""

import threading

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save_file

from coati.cli.serve import parse_server
from coati.dataset.chat.conversation import Conversation
from coati.inference.evaluate.score_rows import load_reward_model
from coati.inference.serve.reward_web import RewardScorer, make_reward_app
from coati.models import Critic, RewardModel
from coati.models.generation.detokenize import decode
from coati.recipes.verbs import serve
from coati.rewards import endpoint
from coati.rewards.responses import Responses
from coati.rewards.scorer import Rewards
from tests.tiny import tiny_llama, tiny_tokenizer


def write_model(folder, kind=RewardModel):
    torch.manual_seed(3)
    model = kind(backbone=tiny_llama(layers=1)).eval()
    with torch.no_grad():
        model.score.weight.normal_()
    model.config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    Conversation.from_config(tokenizer, {}).save(folder / "conversation_template.json")
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm")
    write_model(folder)
    return folder


@pytest.fixture
def scorer(place):
    return RewardScorer(*load_reward_model(place), max_length=64, batch_size=2)


PROMPTS = [[{"role": "user", "content": text}] for text in ("Hello there", "2 + 2 =", "Why?")]
RESPONSES = ["General", "4", "because of the moon"]


def test_scores_are_those_of_the_sequences_that_a_run_would_score(place, scorer):
    """Prompt and response as a rollout has them, end token included where it stopped."""
    model, tokenizer, conversation = load_reward_model(place)
    stopped = [True, False, True]
    end = conversation.stop_ids[0] if conversation.stop_ids else [tokenizer.eos_token_id]
    texts, expected = [], []
    for messages, response, whole in zip(PROMPTS, RESPONSES, stopped, strict=True):
        prompt = conversation.encode_prompt(messages).input_ids
        written = tokenizer(response, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *written, *(end if whole else [])]])
        with torch.no_grad():
            expected.append(float(model(ids, torch.ones_like(ids))))
        texts.append(decode(tokenizer, prompt, False))
    assert scorer(texts, RESPONSES, stopped) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3
    assert scorer(texts, RESPONSES, [True] * 3)[1] != pytest.approx(expected[1], abs=1e-5)


def test_requests(scorer):
    client = TestClient(make_reward_app(scorer, "rm"))
    body = {"prompts": ["a", "b"], "responses": ["c", "d"], "gt_answers": [None, "4"]}
    answer = client.post("/score", json=body)
    assert answer.status_code == 200 and answer.json()["model"] == "rm"
    assert answer.json()["scores"] == pytest.approx(scorer(["a", "b"], ["c", "d"], [True] * 2))
    assert client.post("/score", json={"prompts": [], "responses": []}).json()["scores"] == []
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompts": ["a"], "responses": []}, 422, "there are 1 prompts, 0 responses"),
        ({"prompts": ["a"], "responses": ["b"], "stopped": []}, 422, "0 of stopped"),
        ({"prompts": "a", "responses": ["b"]}, 422, "prompts"),
        ({"prompts": [None], "responses": ["b"]}, 422, "prompts.0"),
        ({}, 422, "prompts"),
        ([], 422, ""),
    ],
)
def test_bad_requests_are_named(scorer, body, status, message):
    answer = TestClient(make_reward_app(scorer, "rm")).post("/score", json=body)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_a_row_that_cannot_be_scored_is_named_by_its_index(scorer):
    client = TestClient(make_reward_app(scorer, "rm"))
    answer = client.post("/score", json={"prompts": ["a"] * 2, "responses": ["b", "c " * 80]})
    error = answer.json()["error"]
    assert answer.status_code == 422 and error["index"] == 1
    assert "tokens; expected 1 to 64" in error["message"]
    with torch.no_grad():
        scorer.model.score.weight.fill_(float("nan"))
    error = client.post("/score", json={"prompts": ["a"], "responses": ["b"]}).json()["error"]
    assert error["message"] == "response 0: the model's score of it is nan"


def test_a_token_is_needed_where_there_is_one(scorer):
    client = TestClient(make_reward_app(scorer, "rm", token="sesame"))
    body = {"prompts": ["a"], "responses": ["b"]}
    assert client.post("/score", json=body).status_code == 401
    right = {"Authorization": "Bearer sesame"}
    assert client.post("/score", json=body, headers=right).status_code == 200


def test_the_command_tells_a_reward_model_from_a_language_model(place, tmp_path):
    assert serve.is_reward_model(parse_server([str(place)]))
    tiny_llama(layers=1).save_pretrained(tmp_path / "lm")
    assert not serve.is_reward_model(parse_server([str(tmp_path / "lm")]))
    with pytest.raises(ValueError, match="--quant: .* is a reward model"):
        serve.is_reward_model(parse_server([str(place), "--quant", "8bit"]))


def test_a_critic_is_no_reward_model(tmp_path):
    write_model(tmp_path / "critic", Critic)
    args = parse_server([str(tmp_path / "critic")])
    with pytest.raises(ValueError, match="is a critic"):
        serve.is_reward_model(args) and serve.reward_app(args)


def test_the_reward_of_a_run_may_be_that_server(place, monkeypatch):
    """Both ends of the protocol, over a socket."""
    import uvicorn

    from coati.cli.serve import listening_socket

    app = serve.reward_app(parse_server([str(place)]))
    listening = listening_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/score"
        monkeypatch.delenv(endpoint.TOKEN_VARIABLE, raising=False)
        batch = Responses(["a", "b"], ["c", "d"], lengths=[1, 1], max_new_tokens=4)
        scored = Rewards([url], timeout=30)(batch)
        direct = RewardScorer(*load_reward_model(place))(["a", "b"], ["c", "d"], [True] * 2)
        assert scored.parts["score"] == pytest.approx(direct)
        with pytest.raises(ValueError, match="reward scores .* answered status 404"):
            Rewards([url + "s"], timeout=2)(batch)
    finally:
        server.should_exit = True
        thread.join(20)
