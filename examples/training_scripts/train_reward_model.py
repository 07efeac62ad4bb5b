"""The name that train_rm.py had in the first generation; takes the flags of that time too."""

from argparse import Namespace

from coati.cli.preferences import parse_rm


def main(args: Namespace) -> None:
    from train_rm import main as train

    from coati.utils.logging import get_logger

    logger = get_logger(__name__)

    logger.info("train_reward_model.py is now train_rm.py")
    train(args)


if __name__ == "__main__":
    arguments = parse_rm()
    from coati.recipes.finish import guarded

    guarded("train_reward_model.py", main, arguments)
