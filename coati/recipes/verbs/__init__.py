"""The verbs of the command: one module each, light to import; its first sentence is the help."""
