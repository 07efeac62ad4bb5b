"""A run as one page: what was asked for, what it measured, what it wrote, what went wrong."""
