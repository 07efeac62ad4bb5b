"""From files of any accepted format to rows of messages, and to token ids."""
