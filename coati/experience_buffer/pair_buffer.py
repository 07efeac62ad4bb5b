"""The experience buffer of pairs: the two rows of a pair stay in one micro-batch."""

from coati.experience_buffer.buffer import BufferItem, NaiveExperienceBuffer
from coati.experience_maker.experience import Experience


class PairBuffer(NaiveExperienceBuffer):
    """:class:`~coati.experience_buffer.buffer.NaiveExperienceBuffer` of which an item is a pair of
    :mod:`coati.experience_maker.pairs`, so ``sample_batch_size`` and ``limit`` count pairs."""

    def _split(self, experience: Experience) -> list[BufferItem]:
        rows = range(0, len(experience), 2)
        return [experience.select([row, row + 1]).trimmed() for row in rows]

    def _index_of(self, item: BufferItem) -> int:
        return int(item.sample_index[0]) // 2
