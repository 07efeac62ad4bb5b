"""Several responses to each prompt: drawn by any engine, kept on disk, scored, selected."""
