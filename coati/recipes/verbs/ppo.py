"""PPO against a reward model, with a critic."""

from coati.cli.rollouts import parse_ppo, ppo_parser
from coati.cli.verb import Verb

VERB = Verb("training", ppo_parser, parse_ppo, "coati.recipes.rl:main", processes=True)
