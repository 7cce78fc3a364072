from __future__ import annotations

import itertools
import random

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmix.digest import SplitDigest, mixture_digest
from prefmix.mixture import columns

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
message = st.fixed_dictionaries({"role": text, "content": text})
rows = st.lists(
    st.fixed_dictionaries({
        "text": st.none() | text,
        "score": st.none() | st.floats(width=64),
        "turns": st.none() | st.lists(message, max_size=3),
        "tokens": st.integers(-(2**31), 2**31 - 1),
    }), min_size=1, max_size=8)  # fmt: skip
SCHEMA = pa.schema([
    ("text", pa.string()), ("score", pa.float64()), ("tokens", pa.int32()),
    ("turns", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
])  # fmt: skip


def digest(batches: list[pa.RecordBatch], split: str = "train") -> str:
    state = SplitDigest(SCHEMA)
    for batch in batches:
        state.update(batch)
    return mixture_digest({"sft": SCHEMA}, {"sft": {split: state}})


def batch(values: list[dict]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(values, schema=SCHEMA)


@given(rows, st.lists(st.integers(0, 8), max_size=3))
def test_the_digest_does_not_see_how_rows_are_cut_into_batches(values, cuts):
    whole = batch(values)
    places = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = [whole.slice(start, end - start) for start, end in itertools.pairwise(places)]
    assert digest(parts) == digest([whole])


@given(rows, rows)
def test_other_content_has_another_digest(one, other):
    same = batch(one).equals(batch(other)) or str(one) == str(other)
    assert (digest([batch(one)]) == digest([batch(other)])) == same


@pytest.mark.parametrize("seed", range(30))
def test_one_character_of_one_row_changes_the_digest(seed):
    draw = random.Random(seed)
    values = [
        {"text": f"row {n}", "score": 1.0, "tokens": n, "turns": [{"role": "user", "content": f"hello {n}"}]}
        for n in range(20)
    ]
    changed = [dict(value) for value in values]
    row = draw.randrange(20)
    changed[row]["turns"] = [{"role": "user", "content": f"hallo {row}"}]
    assert digest([batch(values)]) != digest([batch(changed)])


def test_order_split_names_nulls_and_boundaries_of_texts_count():
    def of(*texts: str | None) -> list[dict]:
        return [{"text": t, "score": None, "turns": None, "tokens": 0} for t in texts]

    digests = [
        digest([batch(of(*texts))])
        for texts in (("a", "b"), ("b", "a"), ("ab", ""), ("", "ab"), ("a", None), ("a", ""))
    ]
    assert len(set(digests)) == len(digests)
    assert digest([batch(of("a"))], "train") != digest([batch(of("a"))], "test")


def test_features_in_the_metadata_are_those_that_datasets_would_write():
    from datasets import Features

    for kind in ("preference", "sft"):
        for layout in ("text", "messages"):
            schema = columns(kind, layout, with_tokens=True)
            features = Features.from_arrow_schema(schema)
            assert Features.from_arrow_schema(schema.remove_metadata()) == features
            assert features.arrow_schema.metadata == schema.metadata
