"""From flags to a run: one module a verb, and the parts that they share."""
