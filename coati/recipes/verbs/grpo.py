"""GRPO and its variants: RL without a critic, for verifiable rewards."""

from coati.cli.rollouts import grpo_parser, parse_grpo
from coati.cli.verb import Verb

VERB = Verb("training", grpo_parser, parse_grpo, "coati.recipes.rl:main", processes=True)
