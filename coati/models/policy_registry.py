"""Names of the policy trainers' choices and what each means. Imports nothing heavy: parsers read
these tables."""

# --kl_estimator -> what it is of x = log pi(token) - log reference(token)
KL_ESTIMATORS = {
    "k1": "x: unbiased, negative for half of the tokens",
    "k2": "x^2 / 2: never negative, biased, its gradient is that of the KL divergence",
    "k3": "exp(-x) - 1 + x: never negative and unbiased (Schulman 2020)",
}
# How the terms of a global batch become one number: verl's names
LOSS_AGG_MODES = {
    "token-mean": "mean over all actions of the global batch (PPO, DAPO)",
    "seq-mean-token-mean": "mean over each response, then over responses (GRPO)",
    "seq-mean-token-sum-norm": "sum over each response divided by the longest one allowed, then "
    "mean over responses (Dr. GRPO)",
}
# --rollout_is -> which importance weight corrects for responses of older weights
ROLLOUT_IS = {
    "token": "of each token by itself: little variance, biased where its prefix is off",
    "sequence": "of the whole response: unbiased up to the cap, more variance",
    "none": "no weights",
}
# The largest weight, where --rollout_is_cap does not say
ROLLOUT_IS_CAPS = {"token": 2.0, "sequence": 3.0, "none": 1.0}
