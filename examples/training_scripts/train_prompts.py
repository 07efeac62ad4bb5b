"""The name of train_ppo.py in the first generation; takes the flags of that time too."""

from coati.legacy.flags_rl import PROMPTS
from coati.recipes.command import run
from coati.utils.logging import get_logger

if __name__ == "__main__":
    get_logger(__name__).info("train_prompts.py is now train_ppo.py, or `coati ppo`")
    run("ppo", older=PROMPTS)
