"""Every flag of the training commands has one fate on resume."""

import pytest

from coati.cli import resume_flags
from coati.cli.arguments import sft_parser
from coati.cli.distilling import gkd_parser
from coati.cli.offline_rl import ilql_parser
from coati.cli.preferences import dpo_parser, kto_parser, orpo_parser, rm_parser
from coati.cli.pretraining import pretrain_parser
from coati.cli.resume_flags import APPLIED, CLASS_OF, CLASSES, FREE, SAME, changes, refusal
from coati.cli.rollout_pairs import online_dpo_parser
from coati.cli.rollouts import grpo_parser, ppo_parser
from tests.laws import ROOT

PARSERS = {
    "sft": sft_parser,
    "pretrain": pretrain_parser,
    "rm": rm_parser,
    "dpo": dpo_parser,
    "orpo": orpo_parser,
    "kto": kto_parser,
    "gkd": gkd_parser,
    "ilql": ilql_parser,
    "ppo": ppo_parser,
    "grpo": grpo_parser,
    "online-dpo": online_dpo_parser,
}
FLAGS = {
    verb: [action.dest for action in make()._actions if action.dest != "help"]
    for verb, make in PARSERS.items()
}
ALL = sorted({flag for flags in FLAGS.values() for flag in flags})


@pytest.mark.parametrize("verb", PARSERS)
def test_every_flag_has_a_class(verb):
    missing = [flag for flag in FLAGS[verb] if flag not in CLASS_OF]
    assert not missing, f"put into CLASSES of coati/cli/resume_flags.py: {missing}"


def test_each_in_one_class_alone():
    flags = [flag for name in CLASSES for flag in CLASSES[name]]
    assert len(flags) == len(set(flags)) and set(CLASSES) == {APPLIED, SAME, FREE}
    assert set(resume_flags.FILES) <= set(CLASS_OF) and set(resume_flags.UNSAID) <= set(CLASS_OF)


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert resume_flags.markdown() in page


@pytest.mark.parametrize("flag", ALL)
def test_a_changed_flag_is_applied_or_refused_or_of_no_matter(flag):
    found = list(changes({flag: "before"}, {flag: "now"}, {}, {}))
    if CLASS_OF[flag] == FREE or flag in resume_flags.ROWS:
        assert found == []
        return
    (change,) = found
    assert str(change) == f"--{flag} before -> now"
    said = refusal(change)
    if CLASS_OF[flag] == SAME:
        assert said.startswith(f"--{flag} before -> now: must be the same")
        assert "--checkpoint_weights_only" in said
    else:
        assert said is None


def test_what_is_the_same_is_no_change():
    flags = dict.fromkeys(ALL, 1)
    assert not list(changes(flags, flags, {"pretrain": "a"}, {"pretrain": "a"}))


def test_a_model_that_moved_is_the_same_and_one_that_changed_in_its_place_is_not():
    there = {"pretrain": "/old/model"}
    here = {"pretrain": "/new/model"}
    assert not list(changes(there, here, {"pretrain": "abc"}, {"pretrain": "abc"}))
    (change,) = changes(here, here, {"pretrain": "abc"}, {"pretrain": "def"})
    assert str(change) == "--pretrain /new/model (its content changed)"
    assert "must be the same" in refusal(change)


def test_checkpoints_of_earlier_releases_say_nothing_of_later_flags():
    now = {"lr": 1.0, "lr_scheduler": "wsd", "early_stopping_patience": 3, "eval_ratio": None}
    found = [str(change) for change in changes({"lr": 1.0}, now, {}, {})]
    assert found == [
        "--lr_scheduler cosine -> wsd",
        "--early_stopping_patience default -> 3",
    ]
    assert not list(changes({}, now, {}, {}))  # not even their flags


@pytest.mark.parametrize(
    "flag, before, now, refused",
    [
        ("head_lr", None, 1e-3, True),
        ("head_lr", 1e-3, None, True),
        ("head_lr", 1e-3, 1e-4, False),
        ("embedding_lr", None, 1e-3, True),
        ("embedding_lr", 1e-3, None, True),
        ("embedding_lr", 1e-3, 1e-4, False),
        ("lora_plus_ratio", None, 16.0, True),
        ("lora_plus_ratio", 16.0, 8.0, False),
        ("documents", "file", "line", True),
        ("center_coef", 0.0, 0.1, True),
        ("center_coef", 0.2, 0.1, False),
        ("ptx_dataset", [], ["rows"], False),
        ("ptx_dataset", ["rows"], ["others"], True),
    ],
)
def test_what_would_train_other_parameters_is_refused(flag, before, now, refused):
    (change,) = changes({flag: before}, {flag: now}, {}, {})
    assert (refusal(change) is not None) == refused
