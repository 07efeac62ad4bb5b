"""Whether an episode collects a whole number of global batches. Light: flag checks import it."""


def optimizer_steps_per_pass(
    num_collect_steps: int,
    experience_batch_size: int,
    train_batch_size: int,
    accumulation_steps: int,
    num_generations: int = 1,
    what: str = "responses",
) -> int:
    """Optimizer steps k in which one pass trains on an episode's responses: num_collect_steps x
    experience_batch_size (x num_generations) = k x train_batch_size x accumulation_steps.

    Both sides count for one process; those of a tensor-parallel group share their prompts and count
    as one. ``what``: what is collected, in messages. Raises ValueError, with the nearest settings
    that fit, where k is not an integer.
    """
    given = {
        "--num_collect_steps": num_collect_steps,
        "--experience_batch_size": experience_batch_size,
        "--num_generations": num_generations,
        "--train_batch_size": train_batch_size,
        "--accumulation_steps": accumulation_steps,
    }
    for flag, value in given.items():
        if value < 1:
            raise ValueError(f"{flag} must be at least 1, not {value}")
    collected = num_collect_steps * experience_batch_size * num_generations
    global_batch = train_batch_size * accumulation_steps
    if collected % global_batch == 0:
        return collected // global_batch
    generations = f" x --num_generations {num_generations}" if num_generations > 1 else ""
    raise ValueError(
        f"an episode collects --num_collect_steps {num_collect_steps} x --experience_batch_size "
        f"{experience_batch_size}{generations} = {collected} {what} per process, not a "
        f"multiple of the {global_batch} that one optimizer step takes (--train_batch_size "
        f"{train_batch_size} x --accumulation_steps {accumulation_steps}); "
        f"{_remedy(given, collected, global_batch)} would fit"
    )


def _remedy(given: dict[str, int], collected: int, global_batch: int) -> str:
    """The nearest change of one flag on either side: smaller steps, or more collected."""
    per_collect = collected // given["--num_collect_steps"]
    train = given["--train_batch_size"]
    steps = next(
        n
        for n in range(given["--num_collect_steps"], global_batch + collected)
        if n * per_collect % global_batch == 0
    )
    if collected % train:
        largest = next(n for n in range(min(train, collected), 0, -1) if collected % n == 0)
        steps_of = _most(collected // largest, given)
        smaller = f"--train_batch_size {largest} --accumulation_steps {steps_of}"
    else:
        smaller = f"--accumulation_steps {_most(collected // train, given)}"
    return f"{smaller}, or --num_collect_steps {steps},"


def _most(batches: int, given: dict[str, int]) -> int:
    """The largest divisor of ``batches`` that is no more accumulation than was asked for."""
    return next(
        n for n in range(min(batches, given["--accumulation_steps"]), 0, -1) if batches % n == 0
    )
