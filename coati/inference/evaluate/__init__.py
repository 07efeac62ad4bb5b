"""Generated responses compared and scored."""
