"""Sources as a whole: files to canonical rows, whatever the format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import polars as pl
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix import schema, sources
from prefmix.errors import SourceError
from prefmix.sources import layout as layouts
from prefmix.sources import resolve, sniff

PAIRS = [
    {"system": "Be brief.", "question": "What is 2 + 2?", "chosen": "4", "rejected": "5", "lang": "en", "n": 1},
    {"system": "", "question": "Wie geht's?", "chosen": "Gut.", "rejected": "", "lang": "de", "n": 2},
    {"system": None, "question": "And 3 + 3?", "chosen": "6", "rejected": "7", "lang": "en", "n": 3},
]


def spec(path: str | list[str], **keys: Any) -> SimpleNamespace:
    defaults = {"format": None, "hub": None, "path": path, "revision": "main", "columns": {}, "split": None}
    return SimpleNamespace(**{**defaults, "where": None, "exclude": None, "license": None, "options": {}, **keys})


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = b"\n".join(map(orjson.dumps, rows))
    if name.endswith(".parquet"):
        pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)
    elif name.endswith(".arrow"):
        pl.DataFrame(rows, infer_schema_length=None).write_ipc(path)
    elif name.endswith(".csv"):
        pl.DataFrame(rows, infer_schema_length=None).write_csv(path, quote_style="always")
    elif name.endswith(".json"):
        path.write_bytes(orjson.dumps(rows))
    else:
        path.write_bytes(
            gzip.compress(lines)
            if name.endswith(".gz")
            else zstandard.compress(lines)
            if name.endswith(".zst")
            else lines
        )
    return path


def read(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl", **keys: Any) -> pl.DataFrame:
    write(folder, name, rows)
    return resolve("test", spec(name, **keys), folder).read(seed=0)


def details(table: pl.DataFrame) -> list[Any]:
    return [None if detail is None else json.loads(detail) for detail in table["detail"]]


# --- canonical rows --------------------------------------------------------------------------------------------------


def test_rows_come_in_the_canonical_columns_with_their_origin(tmp_path: Path) -> None:
    write(tmp_path, "data/b.jsonl", PAIRS[1:])
    write(tmp_path, "data/a.parquet", PAIRS[:1])
    source = resolve("orca", spec("data"), tmp_path)
    table = source.read(seed=0)
    assert (source.name, source.format, source.kind, source.sniffed) == ("orca", "orca_dpo_pairs", "preference", True)
    assert dict(table.schema) == schema.CANONICAL["preference"]
    assert table.select("source", "source_file", "source_row").rows() == [
        ("orca", "data/a.parquet", 0),
        ("orca", "data/b.jsonl", 1),
        ("orca", "data/b.jsonl", 2),
    ]
    assert table["prompt"].to_list() == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
        [{"role": "user", "content": "Wie geht's?"}],
        [{"role": "user", "content": "And 3 + 3?"}],
    ]
    assert table["rejected"].list.first().struct.field("content").to_list() == ["5", "", "7"]
    assert table["reason"].null_count() == table["kept_id"].null_count() == 3
    assert table["id"].n_unique() == 3


WORDS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=25)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS), min_size=1, max_size=6))
def test_the_same_rows_are_the_same_from_every_type_of_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    named = [dict(zip(("system", "question", "chosen", "rejected"), row, strict=True)) for row in rows]
    tables = []
    for ending in ("parquet", "arrow", "jsonl", "json", "csv", "jsonl.gz", "jsonl.zst"):
        write(folder, f"rows.{ending}", named)
        tables.append(resolve("s", spec(f"rows.{ending}"), folder).read(seed=0).drop("source_file"))
    assert all(table.equals(tables[0]) for table in tables)
    assert tables[0]["id"].null_count() == 0


def test_names_and_numbers_do_not_depend_on_the_order_of_the_patterns(tmp_path: Path) -> None:
    for name, row in zip(("c.jsonl", "a.jsonl", "b.jsonl"), PAIRS, strict=True):
        write(tmp_path, name, [row])
    first = resolve("s", spec(["c.jsonl", "a.jsonl", "b.jsonl"]), tmp_path)
    second = resolve("s", spec(["b.jsonl", "*.jsonl"]), tmp_path)
    assert first.files == second.files
    assert first.read(seed=0).equals(second.read(seed=0))
    assert first.read(seed=0)["source_file"].to_list() == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_a_limit_reads_the_first_rows_over_all_files(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", PAIRS[:2])
    write(tmp_path, "b.parquet", PAIRS[2:])
    source = resolve("s", spec("*.parquet"), tmp_path)
    whole = source.read(seed=0)
    for limit in (1, 2, 3, 9):
        assert source.read(seed=0, limit=limit).equals(whole.head(limit))


def test_rows_are_counted_by_metadata_only(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", PAIRS)
    write(tmp_path, "b.arrow", PAIRS)
    assert resolve("s", spec(["a.parquet", "b.arrow"]), tmp_path).count_rows() == 6
    write(tmp_path, "c.jsonl", PAIRS)
    assert resolve("s", spec(["a.parquet", "c.jsonl"]), tmp_path).count_rows() is None


def test_meta_is_json_of_the_other_columns_and_only_on_request(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", PAIRS)
    source = resolve("s", spec("a.parquet"), tmp_path)
    assert source.read(seed=0)["meta"].null_count() == 3
    with_meta = source.read(seed=0, meta=True)
    assert [json.loads(meta) for meta in with_meta["meta"]] == [{"lang": row["lang"], "n": row["n"]} for row in PAIRS]
    assert with_meta.drop("meta").equals(source.read(seed=0).drop("meta"))


def test_fingerprints_follow_the_content_of_every_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", PAIRS)
    source = resolve("s", spec("a.jsonl"), tmp_path)
    before = source.fingerprints()
    assert [name for name, _ in before] == ["a.jsonl"]
    path.write_bytes(path.read_bytes() + b"\n")
    assert source.fingerprints() != before


# --- invalid rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.jsonl", "rows.json"])
def test_a_null_is_an_invalid_row_that_names_the_column(tmp_path: Path, name: str) -> None:
    table = read(tmp_path, [PAIRS[0], {**PAIRS[1], "chosen": None}, PAIRS[2]], name)
    assert table["reason"].to_list() == [None, "source/invalid", None]
    assert details(table)[1] == {"error": "chosen is null"}
    assert table.row(1, named=True) | {"prompt": None, "chosen": None, "rejected": None} == table.row(1, named=True)


def test_an_invalid_row_has_an_id_of_what_it_was_in_any_type_of_file(tmp_path: Path) -> None:
    rows = [{**PAIRS[0], "chosen": None}, {**PAIRS[1], "chosen": None}, PAIRS[2]]
    tables = [read(tmp_path, rows, name) for name in ("rows.parquet", "rows.arrow", "rows.jsonl", "rows.json")]
    ids = [table["id"].to_list() for table in tables]
    assert ids.count(ids[0]) == 4
    assert len(set(ids[0])) == 3


def test_a_line_that_cannot_be_parsed_is_a_row_with_its_place(tmp_path: Path) -> None:
    lines = [
        orjson.dumps(PAIRS[0]),
        b'{"question": "x",',
        b'{"question": "y",',
        orjson.dumps({**PAIRS[1], "chosen": 5}),
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    table = resolve("s", spec("rows.jsonl", where="lang = 'de'"), tmp_path).read(seed=0)
    assert table["source_row"].to_list() == [0, 1, 2, 3]
    assert table["reason"].to_list() == ["source/where", "source/invalid", "source/invalid", "source/invalid"]
    assert details(table)[1] == {
        "error": "invalid JSON: unexpected end of data",
        "line": 2,
        "column": 18,
        "text": '{"question": "x",',
    }
    assert details(table)[3] == {"error": "chosen is a number, not text", "line": 4}
    assert table["id"].n_unique() == 4


def test_invalid_rows_with_the_same_text_share_an_id_as_valid_ones_do(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([orjson.dumps(PAIRS[0]), b"{bad", b"{bad", b"{worse"]))
    ids = resolve("s", spec("rows.jsonl"), tmp_path).read(seed=0)["id"].to_list()
    assert ids[1] == ids[2] != ids[3]


# --- where, exclude, split, columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.csv"])
def test_where_marks_the_rows_that_do_not_satisfy_it_and_keeps_their_contents(tmp_path: Path, name: str) -> None:
    whole = read(tmp_path, PAIRS, name)
    table = read(tmp_path, PAIRS, name, where="lang = 'en' AND CAST(n AS INTEGER) < 3")
    assert table["reason"].to_list() == [None, "source/where", "source/where"]
    assert details(table)[1] == {"where": "lang = 'en' AND CAST(n AS INTEGER) < 3"}
    assert table.drop("reason", "detail").equals(whole.drop("reason", "detail"))


def test_null_does_not_satisfy_where(tmp_path: Path) -> None:
    table = read(tmp_path, [{**PAIRS[0], "lang": None}, *PAIRS[1:]], where="lang != 'de'")
    assert table["reason"].to_list() == ["source/where", "source/where", None]


def test_where_sees_the_names_and_values_of_the_files(tmp_path: Path) -> None:
    rows = [
        {"Prompt": row["question"], "chosen": row["chosen"], "rejected": row["rejected"], "kind-of": row["n"]}
        for row in PAIRS
    ]
    table = read(
        tmp_path,
        rows,
        format="orca_dpo_pairs",
        columns={"question": "Prompt"},
        where='"Prompt" LIKE \'%+%\' AND "kind-of" > 1',
    )
    assert table["reason"].to_list() == ["source/where", "source/where", None]


def test_where_on_a_column_that_only_some_files_have(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", [{key: row[key] for key in ("question", "chosen", "rejected")} for row in PAIRS])
    write(tmp_path, "b.parquet", PAIRS)
    table = resolve("s", spec("*.parquet", where="lang = 'en'"), tmp_path).read(seed=0)
    assert table["reason"].is_null().to_list() == [False, False, False, True, False, True]


@pytest.mark.parametrize(
    ("where", "error"),
    [
        (
            "lnag = 'en'",
            r"""where = "lnag = 'en'": no column "lnag": did you mean "lang"\? The files have: chosen, lang""",
        ),
        ("lang = ", r"where = 'lang = '.*write a condition in SQL"),
        ("n + 1", r"where = 'n \+ 1': it gives Int64, not true or false"),
        ("lang > 5", r"where = 'lang > 5'.*\(lang is String\): compare values of one type"),
    ],
)
@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_a_where_that_cannot_be_meant_is_quoted(tmp_path: Path, name: str, where: str, error: str) -> None:
    with pytest.raises(SourceError, match=error):
        read(tmp_path, PAIRS, name, where=where)


@pytest.mark.parametrize("name", ["ids.parquet", "ids.jsonl", "ids.csv", "ids.txt"])
def test_exclude_marks_rows_by_id(tmp_path: Path, name: str) -> None:
    whole = read(tmp_path, PAIRS)
    out = whole["id"][1]
    if name == "ids.txt":
        (tmp_path / name).write_text(f"{out}\nunknown\n")
    else:
        write(tmp_path, name, [{"id": out, "reason": "seen"}, {"id": "unknown", "reason": "seen"}])
    table = read(tmp_path, PAIRS, exclude=name)
    assert table["reason"].to_list() == [None, "source/excluded", None]
    assert table.drop("reason", "detail").equals(whole.drop("reason", "detail"))


def test_an_exclude_file_without_ids_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, "ids.jsonl", [{"key": "x"}])
    with pytest.raises(SourceError, match=r"ids\.jsonl: no column id \(it has: key\): correct `exclude`"):
        read(tmp_path, PAIRS, exclude="ids.jsonl")
    with pytest.raises(SourceError, match=r"missing\.txt: cannot be read"):
        read(tmp_path, PAIRS, exclude="missing.txt")


def test_split_keeps_the_files_of_one_split(tmp_path: Path) -> None:
    write(tmp_path, "data/train-00000-of-00001.parquet", PAIRS[:2])
    write(tmp_path, "data/test-00000-of-00001.parquet", PAIRS[2:])
    table = resolve("s", spec("data", split="train"), tmp_path).read(seed=0)
    assert table["source_file"].unique().to_list() == ["data/train-00000-of-00001.parquet"]


def test_columns_rename_and_may_shadow(tmp_path: Path) -> None:
    rows = [
        {"prompt": row["question"], "question": "not this", "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in PAIRS
    ]
    table = read(tmp_path, rows, columns={"question": "prompt"}, format="orca_dpo_pairs")
    assert table["prompt"].list.last().struct.field("content").to_list() == [row["question"] for row in PAIRS]


def test_a_rename_of_an_unknown_column_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match='format orca_dpo_pairs has no column "qestion": did you mean "question"'):
        read(tmp_path, PAIRS, columns={"qestion": "lang"}, format="orca_dpo_pairs")


# --- columns that are not there or not of the wanted type ------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.csv"])
def test_a_missing_column_names_the_file_what_it_has_and_the_remedy(tmp_path: Path, name: str) -> None:
    rows = [{"Question": "x", "chosen": "y", "rejected": "z"}]
    with pytest.raises(SourceError) as caught:
        read(tmp_path, rows, name, format="orca_dpo_pairs")
    assert str(caught.value) == (
        f'{name}: no column "question" (text, needed by orca_dpo_pairs; the file has: Question, chosen, rejected): '
        'did you mean "Question"? Then set columns = { question = "Question" }'
    )


def test_a_column_of_the_wrong_type_says_what_it_is_and_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r'rows\.parquet: column "chosen" is a list of a number, but orca_dpo_pairs wants text'
    ):
        read(tmp_path, [{**PAIRS[0], "chosen": [1]}], "rows.parquet", format="orca_dpo_pairs")
    with pytest.raises(SourceError, match=r'rows\.jsonl: column "system" is a number, but orca_dpo_pairs wants text'):
        read(tmp_path, [{**PAIRS[0], "system": 5}], format="orca_dpo_pairs")


def test_the_file_that_differs_is_the_one_named(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", PAIRS)
    write(tmp_path, "b.parquet", [{"question": "x", "chosen": "y", "answer": "z"}])
    with pytest.raises(SourceError, match=r'^b\.parquet: no column "rejected"'):
        resolve("s", spec("*.parquet"), tmp_path)


def test_files_of_a_source_may_differ_in_optional_columns_and_in_widths(tmp_path: Path) -> None:
    ratings = {"instruction": "q", "chosen_response": "a", "rejected_response": "b"}
    wide = pl.DataFrame([{**ratings, "chosen_avg_rating": 5, "rejected_avg_rating": 1}])
    wide.with_columns(pl.col("chosen_avg_rating").cast(pl.Int8)).write_parquet(tmp_path / "a.parquet")
    wide.with_columns(pl.col("chosen_avg_rating").cast(pl.Float32)).write_parquet(tmp_path / "b.parquet")
    wide.drop("rejected_avg_rating").with_columns(pl.col("instruction").cast(pl.Categorical)).write_parquet(
        tmp_path / "c.parquet"
    )
    table = resolve("s", spec("*.parquet"), tmp_path).read(seed=0)
    assert table["chosen_score"].to_list() == [5.0, 5.0, 5.0]
    assert table["rejected_score"].to_list() == [1.0, 1.0, None]
    assert table["id"].n_unique() == 1


# --- formats, options, plug-ins --------------------------------------------------------------------------------------

T, N, M, C = pl.String(), pl.Float64(), schema.MESSAGES, layouts.CONVERSATION


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"system": T, "question": T, "chosen": T, "rejected": T}, "orca_dpo_pairs"),
        (
            {"source": T, "instruction": T, "chosen_response": T, "rejected_response": T, "chosen_avg_rating": N},
            "ultrafeedback_binarized",
        ),
        (
            {
                "prompt": T,
                "prompt_id": T,
                "chosen": M,
                "rejected": M,
                "messages": M,
                "score_chosen": N,
                "score_rejected": N,
            },
            "ultrafeedback_binarized",
        ),
        (
            {"source": T, "prompt": T, "chosen": M, "chosen-rating": N, "rejected": M, "rejected-rating": N},
            "ultrafeedback_binarized",
        ),
        ({"chosen": M, "rejected": M, "score_chosen": N, "score_rejected": N}, "ultrafeedback_binarized"),
        ({"instruction": T, "input": T, "output": T}, "openhermes"),
        ({"instruction": T, "input": T, "output": T, "text": T}, "openhermes"),
        ({"conversations": C}, "sharegpt"),
        ({"conversations": C, "chosen": layouts.TURN, "rejected": layouts.TURN}, "sharegpt"),
        ({"chosen": T, "rejected": T}, "hh_rlhf"),
        ({"prompt": T, "chosen": T, "rejected": T}, "messages"),
        ({"prompt": M, "chosen": M, "rejected": M}, "messages"),
        ({"chosen": M, "rejected": M}, "messages"),
        ({"messages": M}, "messages"),
        ({"prompt": T, "completion": T}, "messages"),
        (
            {"id": T, "source": T, "prompt": T, "chosen": T, "rejected": T, "chosen_score": N, "rejected_score": N},
            "messages",
        ),
        ({"id": T, "source": T, "text": T}, "messages"),
        ({"question": T, "answer": T}, None),
        ({"chosen": N, "rejected": N}, None),
        ({}, None),
    ],
)
def test_formats_are_told_by_their_columns(columns: dict[str, pl.DataType], name: str | None) -> None:
    assert sniff(columns) == name


def test_columns_that_fit_no_format_are_listed_with_the_formats(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"source test: no format fits the columns answer, question of rows\.jsonl.*orca_dpo_pairs"
    ):
        read(tmp_path, [{"question": "x", "answer": "y"}])


def test_an_unknown_format_or_option_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match='no format "orca_dpo_pair": did you mean "orca_dpo_pairs"'):
        read(tmp_path, PAIRS, format="orca_dpo_pair")
    with pytest.raises(SourceError, match=r'orca_dpo_pairs has no option "rejected": it has: none'):
        read(tmp_path, PAIRS, options={"rejected": "random"})
    raw = [
        {
            "instruction": "x",
            "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 2}],
        }
    ]
    with pytest.raises(SourceError, match=r"options\.rejected = 'best': it must be 'random' or 'lowest'"):
        read(tmp_path, raw, options={"rejected": "best"})


@pytest.mark.parametrize("name", sources.FORMATS)
def test_every_format_says_what_it_is_and_fits_its_own_columns(name: str) -> None:
    each = sources.FORMATS[name]
    assert name == each.NAME
    assert len(each.DESCRIPTION.splitlines()) == 1
    for layout in layouts.layouts(each):
        assert layout.kind in schema.KINDS
        assert layout.columns
        assert sniff(layout.types) is not None


def _third_party(read: Callable[..., pl.LazyFrame]) -> SimpleNamespace:
    return SimpleNamespace(
        NAME="qa",
        KIND="sft",
        DESCRIPTION="q and a",
        COLUMNS={"q": pl.String, "a": pl.String},
        OPTIONS={"shout": False},
        read=read,
    )


def test_a_third_party_format_needs_four_names_and_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_qa(rows: pl.LazyFrame, options: dict[str, Any], seed: int) -> pl.LazyFrame:
        answer = pl.col("a").str.to_uppercase() if options["shout"] else pl.col("a")
        return rows.with_columns(messages=layouts.messages(("user", pl.col("q")), ("assistant", answer)))

    monkeypatch.setitem(sources.FORMATS, "qa", _third_party(read_qa))
    table = read(tmp_path, [{"q": "hi", "a": "there"}, {"q": "hi", "a": None}], options={"shout": True})
    assert table["messages"].to_list()[0][-1] == {"role": "assistant", "content": "THERE"}
    assert table["reason"].to_list() == [None, "source/invalid"]
    with pytest.raises(SourceError, match=r"options\.shout = 'yes': it must be bool"):
        read(tmp_path, [{"q": "hi", "a": "there"}], options={"shout": "yes"})


def test_a_format_that_loses_rows_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_qa(rows: pl.LazyFrame, options: dict[str, Any], seed: int) -> pl.LazyFrame:
        return rows.with_columns(messages=layouts.messages(("user", pl.col("q")))).filter(pl.col("q") != "no")

    monkeypatch.setitem(sources.FORMATS, "qa", _third_party(read_qa))
    with pytest.raises(SourceError, match=r"its format removed, added or moved rows \(2 read, 1 returned\)"):
        read(tmp_path, [{"q": "yes", "a": "x"}, {"q": "no", "a": "x"}])


def test_a_plug_in_that_cannot_be_imported_fails_only_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sources._broken, "theirs", "their.module cannot be imported: No module named 'x'")
    assert read(tmp_path, PAIRS).height == 3
    with pytest.raises(SourceError, match=r"format theirs: their\.module cannot be imported.*repair or uninstall"):
        read(tmp_path, PAIRS, format="theirs")
