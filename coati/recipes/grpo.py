"""GRPO and its variants: advantages from a group of responses to each prompt, without a critic."""

from coati.cli.settings import OnlineSettings
from coati.recipes import rl


def main(settings: OnlineSettings) -> None:
    rl.train(settings)
