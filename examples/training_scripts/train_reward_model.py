"""The name of train_rm.py in the first generation; takes the flags of that time too."""

from coati.cli.preferences import parse_rm
from coati.legacy.flags_preferences import PREFERENCES
from coati.utils.logging import get_logger

if __name__ == "__main__":
    settings = parse_rm(older=PREFERENCES)
    from coati.recipes import finish, rm

    get_logger(__name__).info("train_reward_model.py is now train_rm.py")
    finish.guarded("train_reward_model.py", rm.main, settings)
