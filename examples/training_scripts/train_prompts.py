"""The name that train_ppo.py had in the first generation; takes the flags of that time too."""

from argparse import Namespace

from coati.cli.rollouts import parse_prompts


def main(args: Namespace) -> None:
    from train_ppo import main as train

    from coati.utils.logging import get_logger

    logger = get_logger(__name__)

    logger.info("train_prompts.py is now train_ppo.py")
    train(args)


if __name__ == "__main__":
    arguments = parse_prompts()
    from coati.recipes.finish import guarded

    guarded("train_prompts.py", main, arguments)
