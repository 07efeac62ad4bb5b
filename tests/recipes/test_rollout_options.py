"""Responses ahead that cannot be corrected are refused before a run begins."""

from types import SimpleNamespace

import pytest

from coati.recipes.rollout_options import check_correctable


def settings(ahead: int, rollout_is: str) -> SimpleNamespace:
    return SimpleNamespace(
        rollout=SimpleNamespace(rollouts_ahead=ahead),
        update=SimpleNamespace(rollout_is=rollout_is),
    )


class Engine:
    def __init__(self, gives_logprobs: bool) -> None:
        self.gives_logprobs = gives_logprobs
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_an_engine_without_log_probs_cannot_sample_ahead():
    engine = Engine(False)
    with pytest.raises(ValueError, match="--rollouts_ahead 2: .* take --rollout_is none"):
        check_correctable(settings(2, "token"), engine)
    assert engine.closed


@pytest.mark.parametrize(
    "ahead, rollout_is, gives", [(0, "token", False), (2, "none", False), (2, "sequence", True)]
)
def test_what_needs_no_correction_or_has_it(ahead, rollout_is, gives):
    engine = Engine(gives)
    check_correctable(settings(ahead, rollout_is), engine)
    assert not engine.closed
