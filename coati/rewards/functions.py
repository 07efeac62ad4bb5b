"""The registered rewards: one response to one number. :mod:`coati.rewards.registry` is their
table."""

import inspect

from coati.rewards.answers import final_answer, same_answer, whole_number
from coati.rewards.responses import Responses
from coati.rewards.tags import extract_solution, validate_response_structure

RIGHT, WELL_FORMED = 10.0, 1.0


def gsm8k_reward_fn(response: str, gt_answer: str, tags: dict | None = None) -> float:
    """10 for the right whole number, 1 for another one in due form, else 0.

    With ``tags`` (response_format_tags) due form means their structure, and the answer stands in
    the answer tags; without, it is the number that the response ends on.
    """
    answer = _answer(response, tags)
    number = None if answer is None else whole_number(answer)
    if number is None:
        return 0.0
    return RIGHT if number == whole_number(_truth(gt_answer)) else WELL_FORMED


def math_competition_reward_fn(response: str, gt_answer: str, tags: dict | None = None) -> float:
    """10 for an answer equal to ``gt_answer`` (:func:`~coati.rewards.answers.same_answer`), 1 for
    any in due form, else 0; form as for :func:`gsm8k_reward_fn`."""
    answer = _answer(response, tags)
    if not answer:
        return 0.0
    return RIGHT if same_answer(answer, _truth(gt_answer)) else WELL_FORMED


def format_reward_fn(response: str, tags: dict) -> float:
    """1 where :func:`~coati.rewards.tags.validate_response_structure` holds, else 0."""
    return float(validate_response_structure(response, tags))


def length_reward_fn(length: int, max_new_tokens: int) -> float:
    """-length / max_new_tokens, between -1 and 0."""
    return -length / max_new_tokens


def _answer(response: str, tags: dict | None) -> str | None:
    if tags is None:
        solution = extract_solution(
            response
        )  # with the usual tags where the model writes them anyway
        return final_answer(response) if solution is None else final_answer(solution) or solution
    if not validate_response_structure(response, tags):
        return None
    return extract_solution(response, tags)


def _truth(gt_answer: str) -> str:
    """The ground truth; of a worked solution, as GSM8K has them, what follows its "####"."""
    return str(gt_answer).rpartition("####")[2].strip()


def per_row(name: str, batch: Responses, row: int) -> float:
    """The registered reward function ``name`` of one response of a batch, given what its arguments
    name."""
    function = globals()[name]
    known = {
        "response": batch.responses[row],
        "gt_answer": batch.gt_answers[row],
        "tags": batch.tags,
        "length": batch.lengths[row],
        "max_new_tokens": batch.max_new_tokens,
    }
    return function(
        **{argument: known[argument] for argument in inspect.signature(function).parameters}
    )
