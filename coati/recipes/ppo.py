"""PPO: rollouts, rewards, GAE advantages from a critic, clipped policy update."""

from coati.cli.settings import PPOSettings
from coati.recipes import rl


def main(settings: PPOSettings) -> None:
    rl.train(settings)
