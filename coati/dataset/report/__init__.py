"""What a preparation did, for a terminal and a browser."""
