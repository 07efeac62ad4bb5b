"""How ColossalAI splits the layers of a transformers 5 model: one policy for all families, by the
plans that transformers keeps in each configuration. The model's own forward runs unchanged."""
