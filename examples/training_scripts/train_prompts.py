"""The name of train_ppo.py in the first generation; takes the flags of that time too."""

from coati.cli.rollouts import parse_ppo
from coati.legacy.flags_rl import PROMPTS
from coati.utils.logging import get_logger

if __name__ == "__main__":
    settings = parse_ppo(older=PROMPTS)
    from coati.recipes import finish, rl

    get_logger(__name__).info("train_prompts.py is now train_ppo.py")
    finish.guarded("train_prompts.py", rl.main, settings)
