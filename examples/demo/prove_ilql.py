"""Proof that ILQL learns from mediocre rows what none of them shows: random walks on a graph.

``python examples/demo/prove_ilql.py --seeds 5``. A graph of 21 nodes with random edges, and 1,000
random walks of up to 10 nodes, which end at the goal if they come upon it; the score of a walk is
its optimality, 1 for a shortest path to the goal, 0 for one that does not arrive. A small GPT-2
learns from them. Decoding by policy alone (beta_gen 0) is behavior cloning: it walks at random as
the rows do. Decoding by the heads (beta_gen 1 and 100) must have a higher mean optimality and a
shorter mean path from all nodes; the exit code says whether each did for every seed.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NODES = 21
GOAL = 0
EOS = NODES  # the id behind the nodes'
LONGEST = 10  # nodes of a walk
WALKS = 1000
EDGES = 0.1  # probability of an edge
STEPS = 1000
BATCH = 100
LR = 2e-4
TOP_K = 10
TAU = 0.8
ALPHA = 0.1  # of the targets: 0.001 would move them by a fifth in so few steps
SAMPLES = 20  # walks from each node that a decoding is judged by
BETAS = (0.0, 1.0, 100.0)


@dataclass(frozen=True)
class Graph:
    """``edges`` (NODES, NODES) bool; ``shortest`` (NODES,) nodes of a shortest path to the goal,
    both ends counted."""

    edges: np.ndarray
    shortest: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Graph":
        """One in which the goal can be reached from every node, within LONGEST nodes."""
        while True:
            edges = rng.random((NODES, NODES)) < EDGES
            np.fill_diagonal(edges, False)
            edges[GOAL] = False
            shortest = np.full(NODES, LONGEST + 1)
            shortest[GOAL] = 1
            for length in range(2, LONGEST + 1):
                before = edges[:, shortest == length - 1].any(1)
                shortest[before & (shortest > length)] = length
            if shortest.max() <= LONGEST:
                return cls(edges, shortest)

    def walk(self, rng: np.random.Generator) -> list[int]:
        walk = [int(rng.integers(1, NODES))]
        while walk[-1] != GOAL and len(walk) < LONGEST:
            walk.append(int(rng.choice(self.edges[walk[-1]].nonzero()[0])))
        return walk

    def length(self, walk: list[int]) -> int:
        """Nodes up to the goal; LONGEST for a walk that leaves the edges or does not arrive."""
        for place, (a, b) in enumerate(zip(walk, walk[1:], strict=False)):
            if b >= NODES or not self.edges[a, b]:
                return LONGEST
            if b == GOAL:
                return place + 2
        return LONGEST

    def optimality(self, walk: list[int]) -> float:
        best = self.shortest[walk[0]]
        return float((LONGEST - self.length(walk)) / max(LONGEST - best, 1))


class Nodes:
    """Stands in for a tokenizer."""

    pad_token_id = eos_token_id = EOS
    padding_side = "right"


class Walks(list):
    """Stands in for a data set: the start is the prompt, the steps after it are actions."""

    column_names = ("input_ids", "loss_mask", "reward")

    def __init__(self, graph: Graph, rng: np.random.Generator) -> None:
        walks = [graph.walk(rng) for _ in range(WALKS)]
        super().__init__(
            {
                "input_ids": [*walk, EOS],
                "loss_mask": [False] + [True] * len(walk),
                "reward": graph.optimality(walk),
            }
            for walk in walks
        )

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def network(seed: int) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=6, n_embd=144, vocab_size=NODES + 1, n_positions=32, **dropouts)
    )


def trained(rows: Walks, seed: int, steps: int, save_dir: str) -> Any:
    """The trainer, after ``steps``."""
    from coati.dataset import DataCollatorForScoredDataset
    from coati.dataset.load.loader import GlobalBatchLoader
    from coati.models.ilql_heads import attach
    from coati.models.ilql_loss import ILQLLoss
    from coati.parallel import ParallelOptions
    from coati.parallel.boost import boost
    from coati.recipes.data_checks import reward_moments
    from coati.trainer import ILQLTrainer, RunSchedule

    model = network(seed)
    attach(model, seed=seed)
    options = ParallelOptions(plugin="ddp", precision="fp32")
    engine = boost(model, options, lr=LR, weight_decay=0.0, total_steps=steps)
    mean, std = reward_moments(rows)
    trainer = ILQLTrainer(
        engine=engine,
        loss=ILQLLoss(tau=TAU),
        mean=mean,
        std=std,
        alpha=ALPHA,
        max_epochs=steps * BATCH // WALKS,
        schedule=RunSchedule(save_dir, log_interval=50),
    )
    collate = DataCollatorForScoredDataset(Nodes(), LONGEST + 1)
    trainer.fit(GlobalBatchLoader(rows, collate, batch_size=BATCH, seed=seed))
    return trainer


def judged(trainer: Any, graph: Graph, beta: float, seed: int) -> tuple[float, float]:
    """Mean length and optimality of walks from all nodes that ``beta`` decodes."""
    import torch

    from coati.models.generation.loop import generate
    from coati.models.generation.value_guidance import guided

    model = trainer.engine.module
    starts = torch.arange(1, NODES).repeat_interleave(SAMPLES)[:, None]
    with guided(model, trainer.heads, beta, TOP_K):
        found = generate(
            model,
            starts,
            stop_sequences=[[EOS]],
            max_new_tokens=LONGEST - 1,
            top_k=TOP_K,
            generator=torch.Generator().manual_seed(seed),
        )
    walks = [
        [int(start), *response] for start, response in zip(starts, found.responses(), strict=True)
    ]
    lengths = [graph.length(walk) for walk in walks]
    return float(np.mean(lengths)), float(np.mean([graph.optimality(walk) for walk in walks]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="a multiple of 10")
    args = parser.parse_args()
    from coati.parallel.boost import prepare_colossalai
    from coati.parallel.launch import launch

    launch(0)
    prepare_colossalai()
    better = 0
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        started = time.perf_counter()
        rng = np.random.default_rng(seed)
        graph = Graph.random(rng)
        rows = Walks(graph, rng)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trained(rows, seed, args.steps, folder)
            lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = json.loads([line for line in lines if "train/loss" in line][-1])
        found = {beta: judged(trainer, graph, beta, seed) for beta in BETAS}
        cloned = found[0.0]
        wins = all(found[b][0] < cloned[0] and found[b][1] > cloned[1] for b in BETAS[1:])
        better += wins
        shown = "; ".join(
            f"beta_gen {beta:g}: length {length:.2f}, optimality {optimality:.3f}"
            for beta, (length, optimality) in found.items()
        )
        print(
            f"seed {seed}: rows' optimality {np.mean(rows['reward']):.3f}; {shown}; shortest "
            f"{graph.shortest[1:].mean():.2f}; {'better' if wins else 'NOT better'} (loss "
            f"{last['train/loss']:.3f}, {time.perf_counter() - started:.0f} s)",
            flush=True,
        )
    print(f"ilql: {better} of {args.seeds} seeds beat behavior cloning at beta_gen 1 and 100")
    sys.exit(better < args.seeds)


if __name__ == "__main__":
    main()
