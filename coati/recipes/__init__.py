"""From flags to a run: one module an algorithm, and the parts that they share."""
