"""From prepared rows to batches: order, packing, collation."""
