"""Layers that attend to the last tokens alone: responses longer than their window, in batches with
padding, are those that the model gives without a cache."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from coati.models.generation.loop import generate
from tests.models_table.families import BY_TYPE, known, tiny_model

WINDOW = 8
# What else makes the second of two layers see everything.
FAMILIES = {
    "mistral": {},
    "phi3": {},
    "starcoder2": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 2},
    "cohere2": {"sliding_window_pattern": 2},
    "gpt_oss": {},
    "olmo3": {},
    "exaone4": {"sliding_window_pattern": 2},
}


def with_window(name: str, window: int):
    """A model of two layers whose attention has something to see."""
    fields = tiny_model(BY_TYPE[name]).config.to_dict() | FAMILIES[name]
    fields |= {"sliding_window": window, "num_hidden_layers": 2}
    if "layer_types" in fields:
        fields["layer_types"] = ["sliding_attention", "full_attention"]
    del fields["model_type"]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**fields)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FAMILIES if known(BY_TYPE[name])])
def test_responses_beyond_the_window(name):
    model = with_window(name, WINDOW)
    ids = torch.randint(5, 200, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    responses = generate(
        model, ids, attention_mask=mask, stop_sequences=[], max_new_tokens=14, do_sample=False
    ).responses()
    wide = with_window(name, 4096)
    wide.load_state_dict(model.state_dict())
    for prompt, real, response in zip(ids, mask, responses, strict=True):
        row = torch.cat([prompt[real.bool()], torch.tensor(response)])[None]
        logits = model(row, use_cache=False).logits[0]
        start = int(real.sum()) - 1
        assert logits[start:-1].argmax(-1).tolist() == response
        seen = wide(row, use_cache=False).logits[0]
        torch.testing.assert_close(seen[:WINDOW], logits[:WINDOW])
        assert (seen[WINDOW:] - logits[WINDOW:]).abs().amax() > 1e-3  # the window is there
