"""Proof that GRPO learns to use a tool: a tiny model, products of two numbers, a calculator.

``python examples/demo/prove_tools.py --seeds 10``. A random model is first shown demonstrations, of
which every other one asks the calculator and the rest guess. GRPO then learns which of these is
worth it, from the environment's reward alone (1 for the right product), while one result in twenty
of the calculator is false. Each seed must answer 0.9 of unseen products, sampled at temperature 1;
the same model without the tool, shown right answers and trained as long, must stay below 0.5. The
exit code says whether all did.
"""

import argparse
import random
import sys
import tempfile
import time
from typing import Any

from coati.environments.calculator import Calculator

EPISODES = 50
PROMPTS = 16  # of an episode
GROUP = 8  # responses to a prompt
UPDATES = 2  # passes over the responses of an episode
LR = 3e-4
SHOWN_STEPS = 700  # on demonstrations
SHOWN_BATCH = 32
TOKENS = 64  # of a response, all turns together
UNSEEN = 256  # products
NUMBERS = range(32, 100)  # whose products have four digits
WRONG = 0.05  # of the calculator's results
GOAL = 0.9
BARE = 0.5  # that a model without the tool stays below
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Unreliable(Calculator):
    """A calculator of whose results one in twenty is false."""

    def reset(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        self.chance = random.Random(row["seed"])
        return super().reset(row)

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        result = super().call(name, arguments)
        return str(self.chance.randrange(1000, 10000)) if self.chance.random() < WRONG else result


class WithoutTools(Calculator):
    """The same problems and reward, nothing to call."""

    tools = ()


def products(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of numbers to learn from, and unseen ones."""
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
    random.Random(seed).shuffle(pairs)
    return pairs[UNSEEN:], pairs[:UNSEEN]


def question(a: int, b: int) -> dict[str, str]:
    return {"role": "user", "content": f"{a}*{b}"}


def with_call(a: int, b: int) -> list[dict[str, Any]]:
    """A dialogue in which the calculator is asked."""
    result = str(a * b)
    arguments = {"expression": f"{a}*{b}"}
    function = {"name": "calculator", "arguments": arguments}
    return [
        question(a, b),
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "name": "calculator", "content": result},
        {"role": "assistant", "content": result},
    ]


def demonstration(a: int, b: int, tools: bool, chance: random.Random) -> list[dict[str, Any]]:
    """A dialogue; with tools every other one is a guess, without them all are right."""
    if not tools:
        return [question(a, b), {"role": "assistant", "content": str(a * b)}]
    if chance.random() < 0.5:
        return with_call(a, b)
    guess = str(chance.randrange(1000, 10000))
    return [question(a, b), {"role": "assistant", "content": guess}]


def tokenizer_of() -> Any:
    """Digits stand alone; what the template writes around them is a few tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\d*]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1*1"}}\n</tool_call>'
    texts = [call, "system\ncalculator", "\n", "user\n1", "assistant\n", "tool\n1", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=marks[1:2],
    )


def network(seed: int, vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, pad_token_id=0, **sizes)
    )


def show(model: Any, template: Any, pairs: list, tools: bool, seed: int, steps: int) -> None:
    """Supervised steps on demonstrations."""
    import torch

    chance = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    given = list(Calculator.tools) if tools else None
    rows = []
    for a, b in pairs[: SHOWN_BATCH * 100]:
        encoded = template.encode(demonstration(a, b, tools, chance), tools=given)
        rows.append((encoded.input_ids, encoded.loss_mask))
    for _ in range(steps):
        batch = chance.sample(rows, SHOWN_BATCH)
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch])
        mask = torch.tensor([own + [False] * (width - len(own)) for _, own in batch])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[mask[:, 1:]], ids[:, 1:][mask[:, 1:]])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def prompts_of(template: Any, pairs: list, tools: bool) -> Any:
    """Prompts as coati prepares them for an environment."""
    import json

    class Prompts(list):
        column_names = ("input_ids", "gt_answer", "dialogue")

    given = list(Calculator.tools) if tools else None
    return Prompts(
        {
            "input_ids": template.encode_prompt([question(a, b)], tools=given).input_ids,
            "gt_answer": str(a * b),
            "dialogue": json.dumps({"messages": [question(a, b)], "tools": None}),
        }
        for a, b in pairs
    )


class Run:
    """One model, shown demonstrations, and what trains and measures it."""

    def __init__(self, seed: int, tools: bool, episodes: int, folder: str) -> None:
        from coati.dataset import DataCollatorForPromptDataset
        from coati.dataset.chat.conversation import Conversation
        from coati.dataset.load.loader import GlobalBatchLoader

        self.seed = seed
        self.tokenizer = tokenizer_of()
        self.template = Conversation(self.tokenizer, None, TEMPLATE)
        learned, self.unseen = products(seed)
        model = network(seed, len(self.tokenizer))
        show(model, self.template, learned, tools, seed, SHOWN_STEPS)
        self.collator = DataCollatorForPromptDataset(self.tokenizer, 64)
        self.prompts = GlobalBatchLoader(
            prompts_of(self.template, learned, tools), self.collator, batch_size=PROMPTS, seed=seed
        )
        self.tools = tools
        self.trainer = self._trainer(model, episodes, folder)

    def _trainer(self, model: Any, episodes: int, folder: str) -> Any:
        from coati.environments.turn_tokens import TurnTokens
        from coati.experience_buffer import NaiveExperienceBuffer
        from coati.experience_maker import ExperienceSettings, NaiveExperienceMaker
        from coati.experience_maker.rollouts.dialogue_rollout import (
            EnvironmentRollout,
            TurnLimits,
        )
        from coati.experience_maker.rollouts.rollout_engine import ModelRollout
        from coati.experience_maker.scoring import no_scores
        from coati.models.generation.loop import Sampling
        from coati.models.policy_loss import LossAggregation
        from coati.parallel import ParallelOptions
        from coati.parallel.boost import boost
        from coati.trainer import OLTrainer, RunSchedule
        from coati.trainer.online import Episodes
        from coati.trainer.policy_objective import PolicySettings

        options = ParallelOptions(plugin="ddp", precision="fp32")
        steps = episodes * UPDATES * 2
        actor = boost(model, options, lr=LR, weight_decay=0.0, total_steps=steps)
        stops = [list(stop) for stop in self.template.stop_ids]
        rollout = ModelRollout(
            actor, sampling=Sampling(), stop_sequences=stops, max_new_tokens=TOKENS, pad_token_id=0
        )
        environment = EnvironmentRollout(
            actor,
            rollout,
            Unreliable if self.tools else WithoutTools,
            TurnTokens(self.template, stops),
            TurnLimits(turns=4, tokens=TOKENS, prompt=64),
            pad_token_id=0,
        )
        settings = ExperienceSettings(
            TOKENS, stops, method="grpo", num_generations=GROUP, kl_in="loss", seed=self.seed
        )
        maker = NaiveExperienceMaker(
            actor, rollout, no_scores, self.tokenizer, settings, environment=environment
        )
        return OLTrainer(
            actor,
            maker,
            NaiveExperienceBuffer(PROMPTS * GROUP // 2),
            Episodes(episodes, UPDATES, 2, seed=self.seed, sample_interval=0),
            policy=PolicySettings(loss_agg=LossAggregation("seq-mean-token-mean")),
            schedule=RunSchedule(folder),
        )

    def right(self) -> float:
        """The share of unseen products that are answered rightly, sampled once each."""
        maker = self.trainer.maker
        maker.publish(self.trainer.state.step)
        batch = self.collator(prompts_of(self.template, self.unseen, self.tools))
        found = maker.rollout_and_score(batch, range(len(self.unseen)), 2**31)
        return float(found.experience.reward.mean())


def shares(seed: int, tools: bool, episodes: int = EPISODES) -> tuple[float, float]:
    """Right answers before and after GRPO."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(seed, tools, episodes, folder)
        before = run.right()
        run.trainer.run(run.prompts)
        if tools:  # a reliable calculator
            run.trainer.maker.environment.make = Calculator
        return before, run.right()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--episodes", type=int, default=EPISODES)
    args = parser.parse_args()
    from coati.parallel.boost import prepare_colossalai
    from coati.parallel.launch import launch

    launch(0)
    prepare_colossalai()
    learned = 0
    for seed in range(args.first, args.first + args.seeds):
        started = time.perf_counter()
        before, after = shares(seed, True, args.episodes)
        _, bare = shares(seed, False, args.episodes)
        learned += after >= GOAL and bare <= BARE
        print(
            f"tools seed {seed}: {before:.2f} of unseen products before, {after:.2f} after; "
            f"without the tool {bare:.2f} ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
    print(
        f"tools: {learned} of {args.seeds} seeds answer {GOAL} of unseen products with the tool, "
        f"and no more than {BARE} without"
    )
    sys.exit(learned < args.seeds)


if __name__ == "__main__":
    main()
