"""Online DPO: the policy's own responses, told apart by a judge, reward model or functions."""

from coati.cli.rollout_pairs import online_dpo_parser, parse_online_dpo
from coati.cli.verb import Verb

VERB = Verb(
    "training",
    online_dpo_parser,
    parse_online_dpo,
    "coati.recipes.rl_pairs:main",
    processes=True,
)
