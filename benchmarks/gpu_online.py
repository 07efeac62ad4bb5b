"""Items of bench_gpu.py: rollouts beside transformers' generate, and episodes of PPO on OPT
models."""

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks import gpu_models as models
from benchmarks.gpu_item import GIB, Report, timed
from benchmarks.gpu_training import engine_of

PHASES = ("rollout", "scoring", "update")
MODES = ("greedy", "sampled")


def rollouts(report: Report, tiny: bool, shape: models.Shape, prompts: int, new: int) -> None:
    """``prompts`` prompts of 32 to 128 tokens, ``new`` tokens each, by the rollout of PPO and GRPO
    and by ``model.generate``, in turn; nothing ends a response early."""
    import torch

    from coati.models.generation.response_table import left_pad
    from coati.parallel.launch import launch

    launch()
    if tiny:
        shape = models.tiny(shape)
        prompts = 4
        new = 8
    vocabulary = shape["vocab_size"]
    lengths = torch.randint(
        32, 129, (prompts,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    rows = [
        ids[:n].tolist()
        for ids, n in zip(models.tokens(prompts, 128, vocabulary), lengths, strict=True)
    ]
    ids, mask = left_pad(rows, models.Pad.pad_token_id)
    ways = {
        "coati": own_way(engine_of(models.model_of(shape)), ids, mask, new),
        "transformers": their_way(models.model_of(shape).eval(), ids, mask, new),
    }
    seconds: dict[str, dict[str, list[float]]] = {mode: {way: [] for way in ways} for mode in MODES}
    for turn in range(4):
        for mode in MODES:
            for way, sample in ways.items():
                took, answered = timed(lambda s=sample, t=turn, m=mode: s(t, m == "sampled"))
                assert answered == prompts * new, (way, answered)
                seconds[mode][way].append(took)
            report.add(
                **{m: _rates(seconds[m], prompts * new) for m in MODES if seconds[m]["coati"]}
            )
        if not report.has(
            sum(times[-1] for by_way in seconds.values() for times in by_way.values())
        ):
            break


def _rates(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Tokens per second of each way and their ratio; the first turn counts where it is the only
    one."""
    middle = {way: median(times[1:] or times) for way, times in seconds.items()}
    rates = {way: tokens / each for way, each in middle.items()}
    ratio = middle["transformers"] / middle["coati"]
    return {"tokens_per_second": rates, "ratio": ratio, "turns": len(seconds["coati"])}


def own_way(engine: Any, ids: Any, mask: Any, new: int) -> Callable[[int, bool], int]:
    from coati.experience_maker.rollouts.rollout_engine import ModelRollout
    from coati.models.generation.loop import Sampling
    from coati.models.generation.row_noise import NoiseRows

    def sample(turn: int, sampled: bool) -> int:
        rollout = ModelRollout(
            engine,
            sampling=Sampling(do_sample=sampled),
            stop_sequences=[],
            max_new_tokens=new,
            pad_token_id=models.Pad.pad_token_id,
        )
        noise = NoiseRows(0, turn, range(len(ids)))
        done = rollout.ask(ids, mask, noise=noise, temperature=1.0).result()
        return sum(map(len, done.responses()))

    return sample


def their_way(model: Any, ids: Any, mask: Any, new: int) -> Callable[[int, bool], int]:
    import torch

    device = models.device()
    ids = ids.to(device)
    mask = mask.to(device)

    def sample(turn: int, sampled: bool) -> int:
        torch.manual_seed(turn)
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=sampled,
                pad_token_id=models.Pad.pad_token_id,
                **settings,
            )
        return (out.shape[1] - ids.shape[1]) * len(ids)

    return sample


def ppo(
    report: Report,
    tiny: bool,
    policy: models.Shape,
    critic: models.Shape,
    prompt: int,
    new: int,
    prompts: int,
) -> None:
    """Episodes of ``prompts`` prompts, each sampled, scored and trained on once; the reference is a
    copy of the policy, the reward model of the critic's shape. The first episode does not count."""
    import torch

    from benchmarks.online_case import Size
    from benchmarks.online_ways import Paced, boosted, loader, make_trainer
    from coati.models import Critic, RewardModel
    from coati.parallel.launch import launch
    from coati.parallel.plugins import ParallelOptions
    from coati.utils.memory import peak_memory_mb

    launch()
    if tiny:
        policy = models.tiny(policy)
        critic = models.tiny(critic)
        prompt = 12
        new = 4
        prompts = 2
    with models.device():
        scalars = [
            kind(backbone=models.model_of(critic, head=False)) for kind in (Critic, RewardModel)
        ]
    options = ParallelOptions(plugin="zero2", precision="bf16", grad_clip=1.0)
    roles = boosted(options, models.model_of(policy), *scalars, models.model_of(policy))
    episodes: list[dict] = []

    def tell(found: dict) -> None:
        episodes.append(found)
        counted = episodes[1:] or episodes
        whole = sum(one["seconds"] for one in counted)
        report.add(
            samples_per_second=prompts / median(one["seconds"] for one in counted),
            episodes=len(episodes) - 1,
            shares={part: sum(one[part] for one in counted) / whole for part in PHASES},
            peak_gib=peak_memory_mb() / GIB,
        )
        if not report.has(1.2 * found["seconds"]):
            raise EnoughEpisodes

    report.watch_memory()
    ids = models.tokens(prompts, prompt, policy["vocab_size"]).tolist()
    rows = Paced(loader(ids, models.LeftPad), tell=tell)
    size = Size(prompts=prompts, new=new)
    torch.manual_seed(0)
    try:
        make_trainer(roles, size, 5, rows, models.LeftPad).run(rows)
    except EnoughEpisodes:
        report.add(ended="the cap was near")


class EnoughEpisodes(Exception):
    """The cap is too near for another episode."""
