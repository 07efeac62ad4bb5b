"""The name train_rm.py had in the first generation; takes its flags too."""

from coati.cli.preferences import parse_rm

if __name__ == "__main__":
    arguments = parse_rm()
    from train_rm import main

    from coati.cli.finish import guarded
    from coati.utils.notice import say

    say("train_reward_model.py is now train_rm.py")
    guarded("train_rm.py", main, arguments)
