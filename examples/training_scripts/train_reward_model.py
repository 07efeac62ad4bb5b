"""The name of train_rm.py in the first generation; takes the flags of that time too."""

from coati.legacy.flags_preferences import PREFERENCES
from coati.recipes.command import run
from coati.utils.logging import get_logger

if __name__ == "__main__":
    get_logger(__name__).info("train_reward_model.py is now train_rm.py, or `coati rm`")
    run("rm", older=PREFERENCES)
