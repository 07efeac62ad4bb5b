"""The table of data types, and what follows from it."""

from collections.abc import Iterable
from itertools import chain

from coati.dataset.types.data_type import DataType
from coati.dataset.types.kto_rows import Kto
from coati.dataset.types.preference_rows import Preference
from coati.dataset.types.prompt_rows import Prompt
from coati.dataset.types.scored_rows import Scored
from coati.dataset.types.sft_rows import Sft
from coati.dataset.types.text_rows import Text

DATA_TYPES: dict[str, DataType] = {
    one.name: one for one in (Sft(), Preference(), Prompt(), Kto(), Text(), Scored())
}
# Every column that may hold token ids.
TOKEN_COLUMNS = tuple(
    dict.fromkeys(chain.from_iterable(type.token_columns for type in DATA_TYPES.values()))
)


def types_of(columns: Iterable[str]) -> list[DataType]:
    """The data types whose needed columns are among ``columns``, the one that needs most first:
    rows for sft are prompts, too."""
    columns = set(columns)
    fitting = [type for type in DATA_TYPES.values() if columns.issuperset(type.needed_columns)]
    return sorted(fitting, key=lambda type: -len(type.needed_columns))


def type_of_row(row: dict) -> DataType:
    """The data type of a training row. Raises ValueError when it is none's."""
    if not (found := types_of(row)):
        raise ValueError(f"a row with the columns {', '.join(row)} is of no data type")
    return found[0]
