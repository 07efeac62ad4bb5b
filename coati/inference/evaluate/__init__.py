"""Evaluation: responses to prompts, reward model scores, win rates."""
