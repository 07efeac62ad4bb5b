"""Fixes of ColossalAI, each with the upstream line that it answers."""
