from coati.recipes.eval_samples import what_differs


def test_prompts_are_shown_without_what_all_share():
    # 1: system message, 2: "user", 9: "assistant"
    assert what_differs([[1, 2, 5, 6, 9], [1, 2, 7, 9]]) == [[5, 6], [7]]


def test_a_prompt_that_has_nothing_of_its_own_is_shown_whole():
    assert what_differs([[1, 2, 9]]) == [[1, 2, 9]]
    assert what_differs([[1, 9], [1, 5, 9]]) == [[1, 9], [5]]
