"""Numbers that every package has to agree on."""

# The label of a token without loss, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100
