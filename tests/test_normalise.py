from __future__ import annotations

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from prefmix.normalise import _normalise_unicode, normalise

texts = st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])) | st.text("aZ09 .,!-_\n\t\x00é’‘“”–—…•·©®€£°\u00a0", max_size=30), max_size=12)


@given(texts)
def test_the_ascii_kernel_and_the_unicode_expression_agree(values):
    series = pl.Series("t", values, dtype=pl.String)
    assert normalise(series).to_list() == _normalise_unicode(series).to_list()


@given(texts, st.integers(0, 12))
def test_a_slice_normalises_as_the_whole(values, start):
    series = pl.Series("t", values, dtype=pl.String)
    assert normalise(series.slice(start)).to_list() == normalise(series).to_list()[start:]


def test_case_punctuation_spacing_and_invisible_characters_do_not_count():
    values = ["Hello,  World!", "hello\u200bworld", "ＨＥＬＬＯ world", "नमस्ते, दुनिया!", "你好，世界", "--"]
    assert normalise(pl.Series(values)).to_list() == ["hello world", "helloworld", "hello world", "नमस्ते दुनिया", "你好 世界", ""]
