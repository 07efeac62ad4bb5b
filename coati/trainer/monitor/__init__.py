"""What a run says about itself: diagnostics, sample tables, reports."""
