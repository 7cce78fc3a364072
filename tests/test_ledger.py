from __future__ import annotations

import polars as pl
import pytest
from canonical import frame, pair

from prefmix.errors import BuildError
from prefmix.ledger import LEDGER, Drop, check_conservation, ledger, mark


def rows() -> pl.DataFrame:
    return frame([pair(f"q{n}", "yes", "no") for n in range(4)]).with_columns(n=pl.int_range(pl.len()))


def test_the_first_rule_that_holds_is_the_reason_and_gives_the_evidence():
    marked = mark(rows(), [Drop("filter/a", pl.col("n") >= 2, pl.struct(n="n")), Drop("filter/b", pl.col("n") >= 1)])
    assert marked["reason"].to_list() == [None, "filter/b", "filter/a", "filter/a"]
    assert marked["detail"].to_list() == [None, None, '{"n":2}', '{"n":3}']


def test_a_later_stage_does_not_touch_rows_that_are_dropped_already():
    once = mark(rows(), [Drop("filter/a", pl.col("n") == 1, pl.struct(n="n"))])
    twice = mark(once, [Drop("dedupe/pair", pl.col("n") <= 1, pl.struct(m=pl.col("n") + 10), pl.lit("k"))])
    assert twice["reason"].to_list() == ["dedupe/pair", "filter/a", None, None]
    assert twice["detail"].to_list() == ['{"m":10}', '{"n":1}', None, None]
    assert twice["kept_id"].to_list() == ["k", None, None, None]


def test_a_condition_that_is_null_does_not_drop():
    marked = mark(rows(), [Drop("filter/a", pl.lit(None, pl.Boolean))])
    assert marked["reason"].null_count() == 4


def test_the_ledger_has_the_dropped_rows_with_the_contract_columns():
    written = ledger(mark(rows(), [Drop("filter/a", pl.col("n") == 2)]), "preference")
    assert dict(written.schema) == LEDGER
    assert written.select("source", "source_row", "kind", "stage", "reason").rows() == [
        ("a", 2, "preference", "filter", "filter/a")
    ]


def test_rows_read_equal_rows_kept_and_dropped():
    check_conservation({"a": 3, "b": 1}, {"a": 2, "b": 1}, {"a": 1})


@pytest.mark.parametrize(("kept", "dropped"), [({"a": 4}, {}), ({}, {"a": 2}), ({"a": 2}, {"a": 2})])
def test_a_lost_or_doubled_row_is_an_error_that_names_the_source(kept, dropped):
    with pytest.raises(BuildError, match="source a: 3 rows were read"):
        check_conservation({"a": 3}, kept, dropped)
