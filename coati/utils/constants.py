"""Numbers that every package has to agree on."""

# The label of a token without loss, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100
# Seconds for which the ranks of a run wait for one that is silent.
COLLECTIVE_TIMEOUT_S = 600.0
