"""Tags around thoughts and answer, as a conversation template's response_format_tags describe
them."""

import re

# The order in which they are to stand.
TAG_NAMES = ("think_start", "think_end", "answer_start", "answer_end")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def check_tags(tags: dict) -> None:
    """Raises ValueError where ``tags`` is not {name: {"text": str, "num_occur": int}} for all four
    names."""
    for name in TAG_NAMES:
        tag = tags.get(name) if isinstance(tags, dict) else None
        good = isinstance(tag, dict) and isinstance(tag.get("text"), str) and tag["text"]
        if not good or not isinstance(tag.get("num_occur"), int) or tag["num_occur"] < 0:
            raise ValueError(
                f"response_format_tags: {name} is {tag!r}; expected {{'text': the tag, "
                "'num_occur': how often it occurs in a response} for each of "
                f"{', '.join(TAG_NAMES)}"
            )


def validate_response_structure(text: str, tags: dict) -> bool:
    """Whether every tag occurs exactly as often as ``tags`` say, in the order think, answer, and
    ``text`` ends with the closing answer tag (white space aside). A tag that occurs 0 times,
    because the prompt holds it, has no place.

    Raises ValueError for tags of another form.
    """
    check_tags(tags)
    wanted = [tags[name] for name in TAG_NAMES]
    if any(text.count(tag["text"]) != tag["num_occur"] for tag in wanted):
        return False
    places = [text.find(tag["text"]) for tag in wanted if tag["num_occur"]]
    last = tags["answer_end"]
    return places == sorted(places) and (
        not last["num_occur"] or text.rstrip().endswith(last["text"])
    )


def extract_solution(text: str, tags: dict | None = None) -> str | None:
    """What stands in the last <answer>...</answer> of ``text``, or in the last pair of ``tags``'
    answer tags; None without one."""
    pattern = _ANSWER
    if tags is not None:
        check_tags(tags)
        start, end = (re.escape(tags[name]["text"]) for name in ("answer_start", "answer_end"))
        pattern = re.compile(f"{start}(.*?){end}", re.DOTALL)
    found = pattern.findall(text)
    return found[-1].strip() if found else None
