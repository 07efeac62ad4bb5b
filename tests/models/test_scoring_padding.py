"""A saved reward model scores in plain transformers what it scores here, also where the tokenizer
pads with its end token."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from coati.models.reward_model import RewardModel
from coati.models.scoring_padding import ADDED, scoring_tokenizer
from tests.tiny import tiny_llama, tiny_tokenizer

TEXTS = ["<|im_start|>user\nhow are you<|im_end|>", "hello<|im_end|><|im_end|>", "cut off here"]
USED = [1, 2]  # <|im_start|>, <|im_end|>


def bare_tokenizer():
    """Only one special token, as GPT-2 has it: end, padding and beginning."""
    from transformers import PreTrainedTokenizerFast

    core = copy.deepcopy(tiny_tokenizer())._tokenizer
    text = core.to_str().replace('"special":true', '"special":false')
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    return tokenizer


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["special to spare", "row to spare"])
def test_plain_transformers_scores_padded_batches_as_coati_does(tmp_path, side, kind):
    spare = kind == "row to spare"
    tokenizer = bare_tokenizer() if spare else tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    torch.manual_seed(0)
    rows = len(tokenizer) + (3 if spare else 0)
    model = RewardModel(backbone=tiny_llama(vocab_size=rows)).eval()
    changed, pad = scoring_tokenizer(tokenizer, rows, USED)
    assert pad not in USED and pad < rows and tokenizer.pad_token_id == 2  # the trained one stays
    assert changed.pad_token == (ADDED if spare else "<|endoftext|>")
    model.config.pad_token_id = pad
    from tests.models.test_scalar_loading import saved

    changed.save_pretrained(saved(model, tmp_path / "rm"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    read = AutoTokenizer.from_pretrained(tmp_path / "rm", padding_side=side)
    batch = dict(read(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False))
    theirs = plain(**batch).logits[:, 0]
    torch.testing.assert_close(theirs, model(**batch))
    # What was saved before scores other tokens: those before the end tokens.
    plain.config.pad_token_id = 2
    old = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert (plain(**old).logits[:, 0] - theirs).abs().max() > 1e-3


def test_padding_that_no_row_ends_with_is_left_alone_and_none_to_spare_is_said(caplog):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = "<|endoftext|>"
    assert scoring_tokenizer(tokenizer, 384, USED) == (tokenizer, 0)
    bare = bare_tokenizer()
    same, pad = scoring_tokenizer(bare, len(bare), USED)
    assert same is bare and pad is None
