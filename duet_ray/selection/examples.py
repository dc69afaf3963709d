"""A few examples of the task itself, where the user has some and may show them: `selection.examples`."""

from typing import Any

from duet_ray.config import StudyConfig
from duet_ray.domains import BadRow, EncodeSettings, encode_rows, read_rows
from duet_ray.errors import DataError, SelectionError
from duet_ray.records import TokenRow


def read_examples(config: StudyConfig, tokenizer: Any) -> list[TokenRow]:
    """The examples, tokenised for the model that scores; none where the study names no file.

    Raises:
        SelectionError: there is no such file, it has no rows, or one of them is bad.
    """
    if config.selection.examples is None:
        return []
    file = config.resolve_path(config.selection.examples)
    try:
        rows = list(read_rows([file], "prompt_completion", {}, setting="selection.examples"))
        sound = [row for row in rows if not isinstance(row, BadRow)]
        encoded = encode_rows(sound, tokenizer, EncodeSettings.from_config(config))
    except DataError as error:
        raise SelectionError(f"selection.examples: {error}") from error
    if bad := [row for row in (*rows, *encoded) if isinstance(row, BadRow)]:
        raise SelectionError(f"selection.examples: {len(bad)} bad rows, the first: {bad[0]}; mend or remove them")
    if not encoded:
        raise SelectionError(f"selection.examples: {file} has no rows")
    return [row.tokens for row in encoded if not isinstance(row, BadRow)]
