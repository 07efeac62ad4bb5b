"""Distillation: the objective by hand, which rows the student answers and how they are put
together, a teacher behind a server, and what a student learns of rows it has not seen."""

import http.server
import json
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from coati.dataset.load.collator import DataCollatorForSupervisedDataset
from coati.dataset.load.loader import EvaluationLoader, GlobalBatchLoader
from coati.models.distillation import divergence
from coati.models.head_outputs import HeadOutputs
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.trainer import GKDTrainer, RunSchedule, SFTTrainer
from coati.trainer.gkd import GKDObjective
from coati.trainer.global_batches import as_global_batches
from coati.trainer.on_policy_rows import OnPolicyRows, OnPolicySettings, prompt_of
from coati.trainer.teachers import ModelTeacher, ServerTeacher, Teacher
from coati.utils.errors import RunFailed
from tests.experience_maker.rollout_servers import serving
from tests.parallel.preference_cases import Rows
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.test_learning import TOKENIZER, Clipped, PlainBooster, group_of_one  # noqa: F401

# Objective

LABELS = torch.tensor([[-100, 7, 8, -100], [-100, -100, 9, -100]])
OUTPUTS = HeadOutputs(
    logps=torch.tensor([-1.0, -2.0, -4.0]),  # of 7, 8 and 9
    divergence=torch.tensor([0.5, 0.25, 2.0]),
    teacher_logps=torch.tensor([-0.5, -1.5, -3.0]),
)


class Known(Teacher):
    """Has nothing to look at."""

    def look_at(self, batch):
        return {}

    def label_logps(self, outputs, batch):
        return outputs.teacher_logps


def batch(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"labels": LABELS, "input_ids": LABELS, "attention_mask": LABELS * 0 + 1, **more}


def mean(objective: GKDObjective, found: dict[str, torch.Tensor]) -> float:
    return float(objective.loss(OUTPUTS, found)[0] / objective.num_terms(found))


def test_the_loss_is_the_mean_divergence():
    assert mean(GKDObjective(Known()), batch()) == pytest.approx(2.75 / 3)


def test_the_sft_term_is_of_the_rows_own_tokens_alone():
    """0.1 x (1 + 2 + 4); with the second row the student's, 0.1 x (1 + 2)."""
    objective = GKDObjective(Known(), sft_coef=0.1)
    assert mean(objective, batch()) == pytest.approx((2.75 + 0.7) / 3)
    sampled = batch(on_policy=torch.tensor([False, True]))
    assert mean(objective, sampled) == pytest.approx((2.75 + 0.3) / 3)


def test_tokens_have_weights():
    """(0.5 x 0.5 + 0 x 0.25 + 1 x 2) / 1.5."""
    weights = torch.tensor([[9.0, 0.5, 0.0, 9.0], [9.0, 9.0, 1.0, 9.0]])
    assert mean(GKDObjective(Known()), batch(loss_weights=weights)) == pytest.approx(1.5)


def test_metrics_tell_the_two_kinds_of_rows_apart():
    found = batch(on_policy=torch.tensor([False, True]))
    _, metrics = GKDObjective(Known()).loss(OUTPUTS, found)
    assert metrics["divergence"].tolist() == [0.5, 0.25, 2.0]
    assert metrics["nll"].tolist() == [1.0, 2.0] and metrics["teacher_nll"].tolist() == [0.5, 1.5]
    assert metrics["on_policy_divergence"].tolist() == [2.0]
    assert metrics["on_policy"].tolist() == [0.0, 1.0]
    assert metrics["response_length"].tolist() == [1.0]


def test_a_trainer_needs_a_teacher():
    with pytest.raises(ValueError, match="needs a teacher"):
        GKDTrainer(engine=SimpleNamespace())


# Rows that the student answers


@pytest.mark.parametrize(
    ("labels", "prompt"),
    [
        ([-100, -100, 3, 4], [1, 2]),
        ([-100, 2, -100, -100, 5, -100], [1, 2, 3, 4]),  # the last of two responses
        ([1, 2, 3], []),
        ([-100, -100], []),
        ([], []),
    ],
)
def test_the_prompt_is_what_the_last_response_answers(labels, prompt):
    assert prompt_of(list(range(1, len(labels) + 1)), labels) == prompt


def settings(share: float = 0.5, **more) -> OnPolicySettings:
    given = {"stop_sequences": [[2]], "pad_token_id": 2, "max_new_tokens": 6, "max_length": 40}
    return OnPolicySettings(share, **given | more)


def engine_of(model, dp_rank: int = 0, dp_size: int = 1) -> Engine:
    engine = Engine(PlainBooster(), model, Clipped(model.parameters(), lr=1e-3))
    mesh = SimpleNamespace(**{name: getattr(engine.mesh, name) for name in MESH})
    mesh.dp_rank, mesh.dp_size = dp_rank, dp_size
    engine.mesh = mesh
    return engine


MESH = ("sharded_forward", "tp_group", "pp_size", "is_loss_rank", "last_stage")


def some_rows(count: int = 12) -> Rows:
    generator = torch.Generator().manual_seed(3)
    made = Rows()
    for number in range(count):
        ids = torch.randint(3, 384, (8 + number % 5,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:], "seq_length": len(ids)})
    return made


def micro_batches(rows: Rows, size: int, ranks: int = 1, rank: int = 0) -> list[dict]:
    collate = DataCollatorForSupervisedDataset(TOKENIZER, 40)
    starts = range(rank * size, len(rows), ranks * size)
    return [collate(list(rows)[i : i + size]) for i in starts]


def texts(batches: list[dict]) -> list[tuple[list[int], list[int], bool]]:
    """Ids and labels without padding, and whether the student wrote them."""
    found = []
    for one in batches:
        for row in range(len(one["input_ids"])):
            real = one["attention_mask"][row].bool()
            ids, labels = one["input_ids"][row][real], one["labels"][row][real]
            found.append((ids.tolist(), labels.tolist(), bool(one["on_policy"][row])))
    return found


def test_the_share_of_rows_is_chosen_from_the_seed():
    rows = OnPolicyRows(None, settings(0.3))
    chosen = [rows.chosen(0, index) for index in range(4000)]
    assert abs(sum(chosen) / 4000 - 0.3) < 0.03
    assert chosen == [rows.chosen(0, index) for index in range(4000)]
    assert chosen != [rows.chosen(1, index) for index in range(4000)]
    other = OnPolicyRows(None, settings(0.3, seed=7))
    assert chosen != [other.chosen(0, index) for index in range(4000)]
    more = OnPolicyRows(None, settings(0.6))
    assert all(more.chosen(0, i) for i, one in enumerate(chosen) if one)  # a larger share adds
    ends = [OnPolicyRows(None, settings(share)) for share in (0.0, 1.0)]
    assert [any(one.chosen(0, i) for i in range(99)) for one in ends] == [False, True]
    assert all(ends[1].chosen(0, i) for i in range(99))


def test_a_row_is_the_same_however_the_global_batch_is_cut():
    """Batch sizes, ranks, and how many are sampled at once."""
    model = tiny_llama()
    rows = some_rows()
    whole = texts(OnPolicyRows(engine_of(model), settings())(micro_batches(rows, 12), 1, 24))
    assert 0 < sum(own for *_, own in whole) < 12
    for size, batch_size in ((3, None), (4, 1), (1, 2)):
        cut = OnPolicyRows(engine_of(model), settings(batch_size=batch_size))
        assert texts(cut(micro_batches(rows, size), 1, 24)) == whole
    ranks = [
        texts(OnPolicyRows(engine_of(model, rank, 2), settings())(batches, 1, 24))
        for rank in range(2)
        for batches in [micro_batches(rows, 3, 2, rank)]
    ]
    assert [*ranks[0][:3], *ranks[1][:3], *ranks[0][3:], *ranks[1][3:]] == whole
    later = texts(OnPolicyRows(engine_of(model), settings())(micro_batches(rows, 12), 2, 24))
    assert later != whole


def test_only_the_students_response_is_learned_and_other_rows_are_as_they_were():
    rows = some_rows()
    given = micro_batches(rows, 12)
    weights = torch.rand(given[0]["labels"].shape)
    given = [given[0] | {"loss_weights": weights}]
    (made,) = OnPolicyRows(engine_of(tiny_llama()), settings())(given, 0, 0)
    for number, (ids, labels, own) in enumerate(texts([made])):
        row = list(rows)[number]
        own_weights = made["loss_weights"][number][: len(ids)]
        if own:
            assert ids[:4] == row["input_ids"][:4] and labels == [-100] * 4 + ids[4:]
            last = weights[number][len(row["input_ids"]) - 1]  # of what it replaces
            assert 1 <= len(ids) - 4 <= 6 and (own_weights == last).all()
        else:
            assert (ids, labels) == (row["input_ids"], row["labels"])
            assert_close(own_weights, weights[number][: len(ids)])


def test_a_prompt_without_room_for_a_response_keeps_its_own():
    rows = some_rows()
    tight = OnPolicyRows(engine_of(tiny_llama()), settings(1.0, max_length=6))
    found = texts(tight(micro_batches(rows, 12), 0, 0))
    assert all(own and len(ids) <= 6 for ids, _, own in found)
    none = OnPolicyRows(engine_of(tiny_llama()), settings(1.0, max_length=4))
    assert not any(own for *_, own in texts(none(micro_batches(rows, 12), 0, 0)))


def test_the_dropout_of_training_is_back_after_sampling():
    model = tiny_llama()
    model.train()
    OnPolicyRows(engine_of(model), settings(1.0))(micro_batches(some_rows(), 12), 0, 0)
    assert model.training


# Teachers


def plain_logps(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_model_in_this_process(family):
    """Its divergence and log-probs are those of its own full logits, soft caps and scales
    included."""
    student = tiny_llama(0)
    wise = tiny_llama(1, hidden=96) if family == "llama" else of_family(family)
    teacher = ModelTeacher(InferenceModel.plain(wise))
    objective = GKDObjective(teacher, beta=0.3)
    (given,) = micro_batches(some_rows(), 12)
    step = engine_of(student).evaluate([given], objective)
    values, nll = [], []
    for row in some_rows():
        ids = row["input_ids"]
        q, p = (plain_logps(model, ids)[3:-1] for model in (student, wise))
        values.append(divergence(q, p, 0.3))
        nll.append(-p.gather(1, torch.tensor(ids[4:])[:, None])[:, 0])
    assert step.loss == pytest.approx(float(torch.cat(values).mean()), rel=1e-5)
    found = torch.cat(step.metrics["teacher_nll"])
    assert_close(found.sort().values, torch.cat(nll).sort().values, rtol=1e-4, atol=1e-5)


def of_family(family: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(2)
    more = {"gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8}, "granite": {}}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    scaled = {"logits_scaling": 0.1} if family == "granite" else {}
    config = AutoConfig.for_model(family, **sizes, **heads, **ends, **more[family], **scaled)
    return AutoModelForCausalLM.from_config(config)


def test_the_teacher_is_not_trained_and_has_no_gradient():
    student, wise = tiny_llama(0), tiny_llama(1)
    wise.train()
    before = {name: value.clone() for name, value in wise.state_dict().items()}
    objective = GKDObjective(ModelTeacher(InferenceModel.plain(wise)))
    engine_of(student).train_step(micro_batches(some_rows(), 6), objective)
    assert not wise.training and all(p.grad is None for p in wise.parameters())
    assert all(torch.equal(value, before[name]) for name, value in wise.state_dict().items())


def test_a_server_lists_the_likeliest_ids():
    """The library's own, with as many ids as there are: the divergence over the whole
    vocabulary; with five: over six cells."""
    student, wise = tiny_llama(0), tiny_llama(1, hidden=96)
    (given,) = micro_batches(some_rows(), 12)
    here = engine_of(student).evaluate(
        [given], GKDObjective(ModelTeacher(InferenceModel.plain(wise)), beta=0.3)
    )
    with serving(wise) as [server]:
        whole = ServerTeacher(f"{server.url}/v1", 384)
        there = engine_of(student).evaluate([given], GKDObjective(whole, beta=0.3))
        five = ServerTeacher(server.url, 5)
        listed = engine_of(student).evaluate([given], GKDObjective(five, beta=0.3))
    assert there.loss == pytest.approx(here.loss, rel=1e-4)
    nll = [torch.cat(step.metrics["teacher_nll"]) for step in (here, there, listed)]
    assert_close(nll[0], nll[1], rtol=1e-4, atol=1e-5)
    assert_close(nll[0], nll[2], rtol=1e-4, atol=1e-5)
    cells = []
    for row in some_rows():
        q, p = (plain_logps(model, row["input_ids"])[3:-1] for model in (student, wise))
        logps, ids = p.topk(5)
        both = []
        for x in (q.exp(), p.exp()):
            top = x.gather(1, ids)
            both.append(torch.cat([top, 1 - top.sum(1, keepdim=True)], 1).log())
        cells.append(divergence(*both, 0.3))
    assert listed.loss == pytest.approx(float(torch.cat(cells).mean()), rel=1e-4)


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers each prompt with ``listed`` at each token."""

    listed: dict = {}
    status = 200

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choices = [
            {"index": i, "prompt_logprobs": [None, *[self.listed] * (len(prompt) - 1)]}
            for i, prompt in enumerate(body["prompt"])
        ]
        data = json.dumps({"choices": choices} if self.status == 200 else {"error": "too many"})
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    """``stub(listed, status)``: the URL of a server that says so."""
    servers = []

    def started(listed, status: int = 200) -> str:
        kind = type("Kind", (Answering,), {"listed": listed, "status": status})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


def entry(logprob, token: str | None = None) -> dict:
    return {"logprob": logprob} | ({"decoded_token": token} if token is not None else {})


@pytest.mark.parametrize(
    ("listed", "status", "said"),
    [
        ({"7": entry(-1.0)}, 400, "answered status 400"),
        (None, 200, "prompt_logprobs of another form"),
        ({"5": entry(-1.0), "6": entry(-2.0)}, 200, "prompt_logprobs of another form"),
        ({"7": {"p": 0.1}}, 200, "prompt_logprobs of another form"),
        ({"7": entry(-1.0)}, 200, "lists 1 ids"),
        ({"7": entry(-1.0), "8": entry(float("-inf"))}, 200, "finite log-probs"),
    ],
)
def test_what_a_server_should_not_answer(stub, listed, status, said):
    rows = Rows([{"input_ids": [5, 7], "labels": [-100, 7], "seq_length": 2}])
    (given,) = micro_batches(rows, 1)
    with pytest.raises(RunFailed, match=said):
        ServerTeacher(stub(listed, status), 2).look_at(given)


def test_ids_that_the_student_does_not_have_are_left_out(stub):
    rows = Rows([{"input_ids": [5, 7], "labels": [-100, 7], "seq_length": 2}])
    (given,) = micro_batches(rows, 1)
    listed = {"7": entry(-1.0), "400": entry(-0.5), "9": entry(-3.0)}
    teacher = ServerTeacher(stub(listed), 2)
    teacher.vocabulary = 384
    assert teacher.look_at(given)["teacher_ids"].tolist() == [[7, 9]]


def test_steps_on_a_plain_loader_choose_other_rows_each_time(tmp_path):
    rows = some_rows(16)
    collate = DataCollatorForSupervisedDataset(TOKENIZER, 40)
    loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)
    starts = []
    trainer = GKDTrainer(
        None,
        None,
        None,
        None,
        engine=engine_of(tiny_llama()),
        teacher=Teacher(),
        on_policy=settings(),
    )
    trainer.on_policy = lambda batches, epoch, start: starts.append(start) or batches
    trainer._loader = as_global_batches(loader, 2)
    for batches in trainer._loader.global_batches(0):
        trainer.training_batches(batches)
        trainer.state.sample_start_index += trainer._loader.rows_per_step
    assert starts == [0, 8]


def test_a_server_that_gives_none_is_told_what_would(stub):
    with serving(tiny_llama()) as [server]:
        teacher = ServerTeacher(server.url, 2)
        teacher._ask([[5, 7]])
        server.sampler.complete = lambda body: [{"index": 0, "token_ids": [1], "text": ""}]
        with pytest.raises(RunFailed, match="gives no prompt_logprobs; serve the teacher by vLLM"):
            teacher._ask([[5, 7]])


def test_tokens_of_another_vocabulary_at_a_server(stub):
    tokenizer = tiny_tokenizer()
    (id,) = tokenizer.encode("T", add_special_tokens=False)
    right = {str(id): entry(-1.0, "T"), "9": entry(-2.0)}
    ServerTeacher(stub(right), 2).check(tokenizer)
    with pytest.raises(ValueError, match=rf"token {id} is 'other' there, 'T' here"):
        ServerTeacher(stub({str(id): entry(-1.0, "other")}), 1).check(tokenizer)
    with pytest.raises(ValueError, match="token 90000 is 'x' there, None here"):
        ServerTeacher(stub({"90000": entry(-1.0, "x")}), 1).check(tokenizer)


def test_a_row_in_which_nothing_is_learned_is_not_asked_for(stub):
    rows = Rows([{"input_ids": [5, 7], "labels": [-100, -100], "seq_length": 2}])
    (given,) = micro_batches(rows, 1)
    found = ServerTeacher("http://127.0.0.1:9", 2).look_at(given)  # nobody is there
    assert found["teacher_ids"].shape == (0, 2)


# Learning

SYMBOLS = 12


def walks(count: int, seed: int) -> Rows:
    """Prompts of random symbols; responses that a rule gives, each with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    made = Rows()
    for _ in range(count):
        prompt = torch.randint(3, SYMBOLS, (3,), generator=generator).tolist()
        response = []
        at = prompt[-1]
        for _ in range(5):
            step = 1 + int(torch.rand((), generator=generator) < 0.3)
            at = 3 + (at - 3 + step) % (SYMBOLS - 3)
            response.append(at)
        ids = prompt + response
        made.append({"input_ids": ids, "labels": [-100] * 3 + response, "seq_length": len(ids)})
    return made


def trained(kind, seed: int, folder, steps: int, rows: Rows, **keywords):
    model = keywords.pop("start", None) or tiny_llama(seed, layers=1, hidden=32, vocab_size=SYMBOLS)
    engine = Engine(PlainBooster(), model, Clipped(model.parameters(), lr=1e-2))
    collate = DataCollatorForSupervisedDataset(TOKENIZER, 16)
    schedule = RunSchedule(str(folder), max_steps=steps, eval_interval=0, log_interval=steps)
    trainer = kind(engine=engine, max_epochs=1000, schedule=schedule, **keywords)
    trainer.fit(
        GlobalBatchLoader(rows, collate, batch_size=16),
        EvaluationLoader(walks(200, 999), collate, batch_size=100),
    )
    return trainer


@pytest.fixture(scope="module")
def wise(tmp_path_factory):
    """A model that knows the rule from many rows."""
    folder = tmp_path_factory.mktemp("wise")
    return trained(SFTTrainer, 5, folder, 80, walks(1280, 5)).engine.module


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_student_learns_more_from_few_rows_with_a_teacher(wise, share, tmp_path):
    """32 rows, seen 20 times: their own responses are learned by heart, the teacher's
    distribution at them is not."""
    few = walks(32, 1)
    own = settings(share, stop_sequences=[[0]], pad_token_id=0, max_length=16, max_new_tokens=5)
    alone = trained(SFTTrainer, 0, tmp_path / "sft", 40, few)
    taught = trained(
        GKDTrainer,
        0,
        tmp_path / "gkd",
        40,
        few,
        teacher=ModelTeacher(InferenceModel.plain(wise)),
        on_policy=own if share else None,
    )
    nll = {
        "alone": alone.last_evaluation["eval/loss"],
        "taught": taught.last_evaluation["eval/nll"],
    }
    assert nll["taught"] < nll["alone"] - 0.1, nll
    assert taught.last_evaluation["eval/divergence"] < taught.first_evaluation["eval/divergence"]
    assert taught.last_evaluation["eval/perplexity"] == pytest.approx(math.exp(nll["taught"]))
