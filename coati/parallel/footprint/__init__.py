"""How much memory training takes, from a model's configuration and the flags alone; imports nothing
heavy."""
