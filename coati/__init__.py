"""coati: aligning chat models with human feedback on ColossalAI. Importing it loads nothing heavy."""

__version__ = "0.1.0"
