"""The registered rewards: one response to one number. :mod:`coati.rewards.registry` is their
table."""

import inspect
from collections.abc import Callable

from coati.rewards.answers import answer_inside, final_answer, same_answer, whole_number
from coati.rewards.responses import Responses
from coati.rewards.tags import extract_solution, validate_response_structure

RIGHT = 10.0
WELL_FORMED = 1.0

RewardFunction = Callable[..., float]
FUNCTIONS: dict[str, RewardFunction] = {}  # by name of the table


def register(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator: the function of the row ``name`` of :data:`~coati.rewards.registry.REWARDS`. Its
    arguments may be response, gt_answer, tags, length and max_new_tokens."""

    def add(function: RewardFunction) -> RewardFunction:
        FUNCTIONS[name] = function
        return function

    return add


@register("gsm8k")
def gsm8k_reward_fn(response: str, gt_answer: str, tags: dict | None = None) -> float:
    """10 for the right whole number, 1 for another one, well formed, else 0.

    With ``tags`` (response_format_tags) well formed means their structure, and the answer stands in
    the answer tags; without, the answer is the number that the response ends on.
    """
    answer = stated_answer(response, tags)
    number = None if answer is None else whole_number(answer)
    if number is None:
        return 0.0
    return RIGHT if number == whole_number(true_answer(gt_answer)) else WELL_FORMED


@register("math_competition")
def math_competition_reward_fn(response: str, gt_answer: str, tags: dict | None = None) -> float:
    """10 for an answer equal to ``gt_answer`` (:func:`~coati.rewards.answers.same_answer`), 1 for
    another one that is well formed as for :func:`gsm8k_reward_fn`, else 0."""
    answer = stated_answer(response, tags)
    if not answer:
        return 0.0
    return RIGHT if same_answer(answer, true_answer(gt_answer)) else WELL_FORMED


@register("format")
def format_reward_fn(response: str, tags: dict) -> float:
    """1 where :func:`~coati.rewards.tags.validate_response_structure` holds, else 0."""
    return float(validate_response_structure(response, tags))


@register("length")
def length_reward_fn(length: int, max_new_tokens: int) -> float:
    """-length / max_new_tokens, between -1 and 0."""
    return -length / max_new_tokens


def stated_answer(response: str, tags: dict | None = None) -> str | None:
    """What a response says is the answer: the content of the answer tags of a well-formed one, or
    without ``tags`` what it ends on; None where it says none."""
    if tags is None:
        # With the usual tags where the model writes them anyway.
        solution = extract_solution(response)
        return final_answer(response) if solution is None else answer_inside(solution)
    if not validate_response_structure(response, tags):
        return None
    return extract_solution(response, tags)


def true_answer(gt_answer: str) -> str:
    """The ground truth; of a worked solution, as GSM8K has them, what follows its "####"."""
    return str(gt_answer).rpartition("####")[2].strip()


# Arguments of reward functions that a batch may lack -> what to do about it
_MISSING = {
    "gt_answer": "the row has no gt_answer to compare with; prepare the prompts with one in every "
    "row",
    "max_new_tokens": "the batch does not say how long a response may be (max_new_tokens)",
}


def per_row(name: str, batch: Responses, row: int) -> float:
    """The reward ``name``, of :data:`~coati.rewards.registry.REWARDS`, of one response of a batch.

    Its function is given what its arguments name. Raises ValueError where the batch lacks an
    argument that has no default.
    """
    function = FUNCTIONS[name]
    known = {
        "response": batch.responses[row],
        "gt_answer": batch.gt_answers[row],
        "tags": batch.tags,
        "length": batch.lengths[row],
        "max_new_tokens": batch.max_new_tokens,
    }
    parameters = inspect.signature(function).parameters
    for argument, parameter in parameters.items():
        if known[argument] is None and parameter.default is parameter.empty:
            raise ValueError(_MISSING.get(argument, f"the batch has no {argument}"))
    return function(**{argument: known[argument] for argument in parameters})
