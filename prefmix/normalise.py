"""Text normalisation for comparing: what two texts must share to count as the same prompt.

Lower case, Unicode NFKC, without invisible format characters (zero-width joiners and the like split words), every run
of anything but letters, marks and digits as one blank. Marks stay: without them Hindi and Thai fall apart.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa

_TABLE = np.full(256, ord(" "), dtype=np.uint8)
for _first, _last in ((b"0", b"9"), (b"a", b"z")):
    _TABLE[_first[0] : _last[0] + 1] = np.arange(_first[0], _last[0] + 1)
_TABLE[ord("A") : ord("Z") + 1] = np.arange(ord("a"), ord("z") + 1)

#: Separators beyond ASCII that English text is full of; with blanks for them, half of its other texts are plain ASCII.
_PUNCTUATION = list("’‘“”–—…•·©®€£°\u00a0")


def normalise(texts: pl.Series) -> pl.Series:
    """string -> string, of the same length and order; nulls stay null.

    Fastest on about a thousand texts at a time, whose bytes stay in the cache: 130 MB/s a core on ASCII, 38 on 20 MB.
    """
    texts = texts.str.replace_many(_PUNCTUATION, [" "] * len(_PUNCTUATION))
    ascii_only = (texts.str.len_bytes() == texts.str.len_chars()).fill_null(True)
    result = pl.concat([_normalise_ascii(texts.filter(ascii_only)), _normalise_unicode(texts.filter(~ascii_only))])
    places = pl.concat([ascii_only.arg_true(), (~ascii_only).arg_true()])
    return result.gather(places.arg_sort()).alias(texts.name)


def _normalise_unicode(texts: pl.Series) -> pl.Series:
    return (
        texts.str.replace_all(r"\p{Cf}+", "")
        .str.to_lowercase()
        .str.normalize("NFKC")
        .str.replace_all(r"[^\p{L}\p{M}\p{N}]+", " ")
        .str.strip_chars(" ")
    )


def _normalise_ascii(texts: pl.Series) -> pl.Series:
    """The same for texts of one byte a character, on the bytes of the whole column at once."""
    array = texts.to_arrow(compat_level=pl.CompatLevel.oldest())
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2]
    if data is None or offsets[0] == offsets[-1]:
        return texts
    letters = _TABLE[np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]]]
    starts = offsets - offsets[0]
    blank = letters == ord(" ")
    # A blank stays only between two words of the same text: not before a text's first word, not after another blank,
    # and not after its last word.
    after_word = np.empty_like(blank)
    after_word[0], after_word[1:] = False, ~blank[:-1]
    first = starts[:-1][starts[:-1] < len(letters)]
    after_word[first] = False
    keep = ~blank | after_word
    lengths = np.add.reduceat(np.append(keep, False), np.append(starts[:-1], len(letters)), dtype=np.int64)[:-1]
    lengths[starts[1:] == starts[:-1]] = 0
    ends = np.cumsum(lengths)
    kept = letters[keep]
    filled = np.flatnonzero(lengths)
    trailing = filled[kept[ends[filled] - 1] == ord(" ")]
    kept = np.delete(kept, ends[trailing] - 1)
    lengths[trailing] -= 1
    ends = np.cumsum(lengths)
    buffers = [array.buffers()[0], pa.py_buffer(np.append(0, ends)), pa.py_buffer(kept)]
    return pl.Series(texts.name, pa.Array.from_buffers(pa.large_string(), len(array), buffers, offset=0))
