"""Chat templates, and loss masks by spans."""
