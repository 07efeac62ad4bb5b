"""Writing systems of texts, by Unicode block: a cheap stand-in for their languages."""

from functools import lru_cache

import numpy as np

# Name -> first and last code point of its blocks (Unicode 15.1), letters above all; digits and
# signs belong to none.
BLOCKS: dict[str, tuple[tuple[int, int], ...]] = {
    "Latin": (
        (0x41, 0x5A),
        (0x61, 0x7A),
        (0xC0, 0xD6),
        (0xD8, 0xF6),
        (0xF8, 0x2AF),
        (0x1E00, 0x1EFF),
        (0x2C60, 0x2C7F),
        (0xA720, 0xA7FF),
        (0xFF21, 0xFF3A),
        (0xFF41, 0xFF5A),
    ),
    "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "Armenian": ((0x531, 0x58A),),
    "Hebrew": ((0x591, 0x5F4), (0xFB1D, 0xFB4F)),
    "Arabic": (
        (0x610, 0x65F),
        (0x66E, 0x6EF),
        (0x6FA, 0x6FF),
        (0x750, 0x77F),
        (0x8A0, 0x8FF),
        (0xFB50, 0xFDFF),
        (0xFE70, 0xFEFC),
    ),
    "Devanagari": ((0x900, 0x963), (0x970, 0x97F), (0xA8E0, 0xA8FF)),
    "Bengali": ((0x980, 0x9E3), (0x9F0, 0x9FF)),
    "Gurmukhi": ((0xA00, 0xA65), (0xA70, 0xA7F)),
    "Gujarati": ((0xA80, 0xAE5), (0xAF0, 0xAFF)),
    "Odia": ((0xB00, 0xB65), (0xB70, 0xB7F)),
    "Tamil": ((0xB80, 0xBE5), (0xBF0, 0xBFF)),
    "Telugu": ((0xC00, 0xC65), (0xC70, 0xC7F)),
    "Kannada": ((0xC80, 0xCE5), (0xCF0, 0xCFF)),
    "Malayalam": ((0xD00, 0xD65), (0xD70, 0xD7F)),
    "Sinhala": ((0xD80, 0xDFF),),
    "Thai": ((0xE01, 0xE4F), (0xE5A, 0xE7F)),
    "Lao": ((0xE80, 0xECF), (0xEDA, 0xEFF)),
    "Tibetan": ((0xF00, 0xF1F), (0xF34, 0xFFF)),
    "Burmese": ((0x1000, 0x103F), (0x104A, 0x109F)),
    "Georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF)),
    "Ethiopic": ((0x1200, 0x139F),),
    "Khmer": ((0x1780, 0x17DF),),
    "Mongolian": ((0x1820, 0x18AF),),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "Kana": ((0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "Han": (
        (0x2E80, 0x2FDF),
        (0x3005, 0x3007),
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF),
        (0x20000, 0x323AF),
    ),
}
NAMES = ("none", *BLOCKS)  # "none": no letter of any of these
_KANA = NAMES.index("Kana")
_HAN = NAMES.index("Han")


@lru_cache
def _table() -> np.ndarray:
    """Code point -> index into :data:`NAMES`; the last entry stands for all that lie behind."""
    table = np.zeros(0x323AF + 2, dtype=np.uint8)
    for index, blocks in enumerate(BLOCKS.values(), 1):
        for first, last in blocks:
            table[first : last + 1] = index
    return table


def main_scripts(texts: list[str]) -> list[str]:
    """The script with most letters of each text; Japanese, which mixes Kana with Han, is Kana."""
    if not texts:
        return []
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kinds = _table()[np.minimum(codes, len(_table()) - 1)]
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    counts = np.bincount(owner * len(NAMES) + kinds, minlength=len(texts) * len(NAMES)).reshape(
        len(texts), -1
    )
    counts[:, 0] = 0
    japanese = 5 * counts[:, _KANA] > counts[:, _HAN]
    counts[japanese, _KANA] += counts[japanese, _HAN]
    return [NAMES[index] for index in counts.argmax(axis=1)]
