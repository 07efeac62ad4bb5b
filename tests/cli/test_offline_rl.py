"""The flags of ``coati ilql``."""

import pytest

from coati.cli.offline_rl import parse_ilql
from coati.models.ilql_loss import ILQLLoss


def test_the_defaults_are_those_of_the_method(data):
    settings = parse_ilql(["--pretrain", "m", "--dataset", data["dataset"]])
    assert (
        vars(settings.loss)
        == vars(ILQLLoss())
        == {
            "tau": 0.7,
            "gamma": 0.99,
            "cql_coef": 0.1,
            "awac_coef": 1.0,
            "awac_beta": 0.0,
        }
    )
    assert (settings.target_alpha, settings.target_interval) == (0.001, 5)
    assert (settings.optimizer.lr, settings.optimizer.adam_beta2) == (5e-5, 0.95)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--tp", "2"], "--tp 2: ILQL's heads cannot be split over processes"),
        (["--pp", "2"], "--pp 2: ILQL's heads cannot be split"),
        (
            ["--enable_sequence_parallelism", "--sp_mode", "all_to_all", "--sp", "2"],
            "--sp 2: ILQL's heads cannot be split",
        ),
        (["--plugin", "gemini"], "--plugin gemini: the targets of ILQL's heads are averages"),
        (["--plugin", "3d"], "use --plugin ddp or zero2"),
        (["--tau", "1"], "argument --tau: expected a number"),
        (["--gamma", "1.5"], "argument --gamma"),
        (["--target_alpha", "0"], "argument --target_alpha"),
        (["--target_interval", "0"], "argument --target_interval"),
        (["--streaming"], "unknown flag --streaming"),
    ],
)
def test_what_cannot_work_is_refused_by_name(data, capsys, monkeypatch, words, said):
    monkeypatch.setenv("WORLD_SIZE", "2" if words[-1] == "2" else "1")
    given = ["--pretrain", "m", "--dataset", data["dataset"], "--accumulation_steps", "1"]
    with pytest.raises((SystemExit, ValueError)) as error:
        parse_ilql([*given, "--batch_size", "2", *words])
    assert said in capsys.readouterr().err + str(error.value)
