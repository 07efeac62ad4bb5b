"""How Gemini's chunks are packed: the cases that ColossalAI 0.5.0 was asked for."""

import pytest

from coati.parallel.footprint.gemini_chunks import MEBI, SMALLEST, Chunk, chunks
from coati.parallel.footprint.model_shape import ModelShape

LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4}


def shape(hidden: int, inner: int, layers: int, vocabulary: int) -> ModelShape:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return ModelShape.of(LLAMA | sizes | {"vocab_size": vocabulary, "tie_word_embeddings": True})


def test_a_small_model_is_one_chunk():
    assert chunks([5, 7, 11]) == [Chunk(23, 23)]


def test_the_first_process_has_the_most_of_a_chunk_that_is_not_full():
    chunk = Chunk(size=100, used=60)
    assert [chunk.used_by_first(processes) for processes in (1, 2, 4)] == [60, 50, 25]


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        # the embedding by itself
        ((256, 768, 6, 200_000), [(51_200_000, 51_200_000), (SMALLEST, 4_721_920)]),
        ((512, 1536, 8, 32_000), [(SMALLEST, 32_904_192), (SMALLEST, 8_654_336)]),
        (
            (768, 2048, 12, 32_000),
            [(38_938_624, 38_734_848), (38_938_624, 38_937_600), (38_938_624, 24_779_520)],
        ),
    ],
)
def test_chunks_are_those_of_colossalai(sizes, found):
    packed = chunks(shape(*sizes).parameter_sizes())
    assert len(packed) == len(found)
    for chunk, (size, used) in zip(packed, found, strict=True):
        # Searched in steps of 1 MiB here, and a layer's norms are one parameter.
        assert chunk.size == pytest.approx(size, abs=MEBI)
        assert chunk.used == pytest.approx(used, abs=2 * MEBI)
