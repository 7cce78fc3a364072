from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import orjson
import polars as pl
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from prefmix import files, records, rows
from prefmix.errors import SourceError
from prefmix.rows import FAULT, RAW

TEXT = {"a": pl.String(), "b": pl.String()}
TURNS = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))


def write(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def faults(table: pl.DataFrame) -> dict[int, dict[str, object]]:
    return {row: json.loads(fault) for row, fault in enumerate(table[FAULT]) if fault is not None}


def names(found: list[Path], root: Path) -> list[str]:
    return [files.relative_name(path, root) for path in found]


# --- which files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl.gz", "deep/er/c.parquet", "deep/d.csv", ".hidden/e.jsonl", "deep/.f.jsonl"):
        write(tmp_path, name, "{}")
    for name in ("README.md", "deep/dataset_info.json", "state.json", "script.py"):
        write(tmp_path, name, "text")
    return tmp_path


def test_a_folder_means_all_data_files_below_it_that_are_not_hidden_in_path_order(tree: Path) -> None:
    assert names(files.find_files(".", tree), tree) == ["a.jsonl.gz", "b.jsonl", "deep/d.csv", "deep/er/c.parquet"]
    assert names(files.find_files("deep", tree), tree) == ["deep/d.csv", "deep/er/c.parquet"]


def test_patterns_may_overlap_and_every_file_is_there_once(tree: Path) -> None:
    found = files.find_files(["deep/**/*.parquet", "b.jsonl", "**/*", str(tree / "b.jsonl")], tree)
    assert names(found, tree) == ["a.jsonl.gz", "b.jsonl", "deep/d.csv", "deep/er/c.parquet"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    path = write(tmp_path, "rows[1].jsonl", '{"a": "x"}')
    assert files.find_files("rows[1].jsonl", tmp_path) == [path]
    assert files.read(path, TEXT)["a"].to_list() == ["x"]
    parquet = tmp_path / "rows[2].parquet"
    pl.DataFrame({"a": ["y"]}).write_parquet(parquet)
    assert files.read(parquet, TEXT)["a"].to_list() == ["y"]


def test_of_a_mixture_only_the_rows_of_one_subset_are_read(tmp_path: Path) -> None:
    for name in ("mixture.json", "preference/train-0.arrow", "preference/test-0.arrow", "drops/drops.parquet"):
        write(tmp_path, f"mix/{name}", "{}")
    found = names(files.find_files("mix", tmp_path), tmp_path)
    assert found == ["mix/preference/test-0.arrow", "mix/preference/train-0.arrow"]
    write(tmp_path, "mix/sft/train-0.arrow", "{}")
    with pytest.raises(SourceError, match=r"preference and sft rows: name one of them, mix/preference or mix/sft"):
        files.find_files("mix", tmp_path)
    assert names(files.find_files("mix/sft", tmp_path), tmp_path) == ["mix/sft/train-0.arrow"]


def test_a_pattern_without_a_file_names_the_folder_and_what_is_like_it(tree: Path) -> None:
    with pytest.raises(SourceError, match=rf"deep/d\.cvs: no such file, searched in {tree}/deep \(there: d\.csv"):
        files.find_files("deep/d.cvs", tree)
    with pytest.raises(SourceError, match=r"nowhere/\*\.jsonl: no such file, searched in .*/nowhere"):
        files.find_files("nowhere/*.jsonl", tree)
    with pytest.raises(SourceError, match=r"\*\.py: no data file among script\.py: prefmix reads \.parquet"):
        files.find_files("*.py", tree)
    with pytest.raises(SourceError, match=r"script\.py: unknown file type: prefmix reads \.parquet"):
        files.find_files("script.py", tree)
    (tree / "empty").mkdir()
    with pytest.raises(SourceError, match="empty: no data files in the folder"):
        files.find_files("empty", tree)


@pytest.mark.parametrize(
    ("name", "split", "belongs"),
    [
        ("data/train-00000-of-00001.parquet", "train", True),
        ("train_prefs-00000.parquet", "train", True),
        ("train_prefs-00000.parquet", "train_prefs", True),
        ("sft/train/0.arrow", "train", True),
        ("my training.jsonl", "train", True),
        ("train1.csv", "train", True),
        ("trainer.jsonl", "train", False),
        ("constrain.jsonl", "train", False),
        ("test.jsonl", "train", False),
        ("eval.jsonl", "test", True),
        ("data.val.jsonl", "validation", True),
    ],
)
def test_a_split_is_found_by_the_words_in_a_path(name: str, split: str, belongs: bool) -> None:
    assert files.in_split(name, split) == belongs


def test_split_looks_below_the_folder_that_was_named_only(tmp_path: Path) -> None:
    for name in ("test_data/train.jsonl", "test_data/dev.jsonl"):
        write(tmp_path, name, "{}")
    assert names(files.find_files("test_data", tmp_path, "train"), tmp_path) == ["test_data/train.jsonl"]
    with pytest.raises(SourceError, match=r'test_data: no file of the split "test" among dev\.jsonl, train\.jsonl'):
        files.find_files("test_data", tmp_path, "test")


# --- the same rows from every type of file ---------------------------------------------------------------------------

#: Text that files and their readers get wrong: controls, quotes, separators, astral and combining characters.
WORDS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\r\n",
        "\r",
        '"',
        '""',
        ",",
        "\\",
        "\\n",
        "\u2028",
        "\x00",
        "\x1e",
        "\ufeff",
        "é\u0301",
        "🎉",
        "null",
        "1",
    ]
)


def as_csv(table: pl.DataFrame) -> bytes:
    import csv
    import io

    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    writer.writerow(table.columns)
    writer.writerows(table.rows())
    return buffer.getvalue().encode()


def as_arrow_stream(table: pl.DataFrame, path: Path) -> None:
    table.write_ipc_stream(path)


def jsonl(table: pl.DataFrame) -> bytes:
    return b"\n".join(orjson.dumps(row) for row in table.iter_rows(named=True))


WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    "rows.parquet": lambda table, path: table.write_parquet(path),
    "rows.arrow": lambda table, path: table.write_ipc(path),
    "stream.arrow": as_arrow_stream,
    "rows.jsonl": lambda table, path: path.write_bytes(jsonl(table)),
    "crlf.jsonl": lambda table, path: path.write_bytes(jsonl(table).replace(b"\n", b"\r\n") + b"\r\n"),
    "bom.jsonl": lambda table, path: path.write_bytes(b"\xef\xbb\xbf\n" + jsonl(table)),
    "rows.jsonl.gz": lambda table, path: path.write_bytes(gzip.compress(jsonl(table))),
    "rows.jsonl.zst": lambda table, path: path.write_bytes(zstandard.compress(jsonl(table))),
    "rows.json": lambda table, path: path.write_bytes(orjson.dumps(table.to_dicts())),
    "indented.json": lambda table, path: path.write_bytes(orjson.dumps(table.to_dicts(), option=orjson.OPT_INDENT_2)),
    "object.json": lambda table, path: path.write_bytes(orjson.dumps({"version": "1", "data": table.to_dicts()})),
    "ascii.json": lambda table, path: path.write_text(json.dumps(table.to_dicts(), ensure_ascii=True)),
    "lines.json": lambda table, path: path.write_bytes(jsonl(pl.concat([table, table]))),
    "rows.json.gz": lambda table, path: path.write_bytes(gzip.compress(orjson.dumps(table.to_dicts()))),
    "rows.csv": lambda table, path: path.write_bytes(as_csv(table)),
    "rows.csv.zst": lambda table, path: path.write_bytes(zstandard.compress(as_csv(table))),
}


@pytest.mark.parametrize("name", WRITERS)
def test_text_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("rows")

    @given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8))
    def round_trip(pairs: list[tuple[str, str]]) -> None:
        table = pl.DataFrame(pairs, schema=TEXT, orient="row")
        WRITERS[name](table, folder / name)
        read = files.read(folder / name, TEXT)
        assert faults(read) == {}
        expected = pl.concat([table, table]) if name == "lines.json" else table
        assert read.select("a", "b").equals(expected)
        assert files.count_rows(folder / name) == (table.height if name.endswith((".parquet", ".arrow")) else None)

    round_trip()


@given(
    st.lists(
        st.none() | st.lists(st.fixed_dictionaries({"role": WORDS, "content": st.none() | WORDS}), max_size=3),
        min_size=1,
        max_size=6,
    )
)
def test_message_lists_come_back_from_json_as_they_were(tmp_path_factory: pytest.TempPathFactory, column: list) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps({"m": value, "extra": 1}) for value in column))
    read = files.read(path, {"m": TURNS})
    assert read.schema["m"] == TURNS
    assert read["m"].to_list() == column


def test_blocks_and_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"a": f"row {number} " + "x" * (number % 50), "b": "ä"} for number in range(300)]
    path = write(tmp_path, "rows.jsonl", b"\n".join(map(orjson.dumps, lines)))
    array = write(tmp_path, "rows.json", orjson.dumps(lines))
    table = write(tmp_path, "rows.csv", as_csv(pl.DataFrame(lines)))
    whole = [files.read(each, TEXT) for each in (path, array, table)]
    monkeypatch.setattr(records, "_BLOCK_BYTES", 37)
    monkeypatch.setattr(records, "_CHUNK_ROWS", 7)
    small = [files.read(each, TEXT) for each in (path, array, table)]
    for before, after in zip(whole, small, strict=True):
        assert before.equals(after)
        assert after["a"].to_list() == [line["a"] for line in lines]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "stream.arrow", "rows.jsonl", "rows.json", "rows.csv"])
def test_limit_reads_the_first_rows(tmp_path: Path, name: str) -> None:
    table = pl.DataFrame({"a": [str(number) for number in range(20)], "b": ["x"] * 20})
    WRITERS[name](table, tmp_path / name)
    assert files.read(tmp_path / name, TEXT, limit=3)["a"].to_list() == ["0", "1", "2"]
    assert files.read(tmp_path / name, TEXT, limit=99).height == 20


# --- bad records -----------------------------------------------------------------------------------------------------


def test_a_bad_line_is_a_row_that_says_where_it_is_bad(tmp_path: Path) -> None:
    lines = [
        b'{"a": "one"}',
        b"",
        b'{"a": "two", "b"',
        b'{"a": "\xff"}',
        b'["a"]',
        b'{"a": "\\ud83d"}',
        b'{"a": NaN}',
        b'{"a": "three"}',
    ]
    read = files.read(write(tmp_path, "rows.jsonl", b"\n".join(lines)), TEXT)
    found = faults(read)
    assert read["a"].to_list() == ["one", None, None, None, None, None, "three"]
    assert {row: fault["line"] for row, fault in found.items()} == {1: 3, 2: 4, 3: 5, 4: 6, 5: 7}
    assert found[1]["error"] == "invalid JSON: unexpected end of data"
    assert found[1]["column"] == 17
    assert found[2] == {
        "error": "invalid JSON: bytes that are not UTF-8",
        "line": 4,
        "column": 8,
        "text": '{"a": "\\xff"}',
    }
    assert found[3]["error"] == "a list, not a JSON object"
    assert "surrogate" in str(found[4]["error"])
    assert read[RAW].to_list() == [
        None,
        '{"a": "two", "b"',
        '{"a": "\\xff"}',
        '["a"]',
        '{"a": "\\ud83d"}',
        '{"a": NaN}',
        None,
    ]


def test_a_bad_element_of_an_array_is_a_row_with_its_line(tmp_path: Path) -> None:
    text = '[\n  {"a": "one"},\n  {"a": "\\ud83d"},\n  7,\n\n  {"a":\n    nope}\n]\n'
    read = files.read(write(tmp_path, "rows.json", text), TEXT)
    assert read["a"].to_list() == ["one", None, None, None]
    assert {row: fault["line"] for row, fault in faults(read).items()} == {1: 3, 2: 4, 3: 7}


def test_only_the_odd_row_suffers_from_an_odd_type(tmp_path: Path) -> None:
    rows_ = [
        {"a": "x", "s": 1, "m": [{"role": "user", "content": "hi"}]},
        {"a": 5, "s": 1},
        {"a": "y", "s": True},
        {"a": "z", "s": "9"},
        {"a": None, "s": 2.5, "m": [{"role": "user", "content": ["hi"]}]},
        {"a": "w", "s": 10**400, "m": "text"},
    ]
    wanted = {"a": pl.String(), "s": pl.Float64(), "m": TURNS}
    path = write(tmp_path, "rows.jsonl", "\n".join(json.dumps(row) for row in rows_))
    read = files.read(path, wanted)
    assert {name: read.schema[name] for name in wanted} == wanted
    assert read["s"].to_list()[:2] == [1.0, 1.0]
    assert {row: fault["error"] for row, fault in faults(read).items()} == {
        1: "a is a number, not text",
        2: "s is a boolean, not a number",
        3: "s is text, not a number",
        4: "m[0].content is a list, not text",
        5: read[FAULT].str.json_path_match("$.error")[5],
    }
    assert json.loads(read[RAW][1]) == {"a": 5, "s": 1}
    assert faults(read)[3]["line"] == 4


def test_other_columns_are_typed_by_all_their_values(tmp_path: Path) -> None:
    first = {"whole": 1, "mixed": "one", "nested": {"x": 1}, "flag": True, "real": 1}
    second = {"whole": 2, "mixed": 2, "nested": [1], "flag": None, "real": 2.5, "late": "here"}
    path = write(tmp_path, "rows.jsonl", "\n".join(json.dumps(row) for row in [first] * 3 + [second]))
    expected = {"whole": pl.Int64, "mixed": pl.String, "nested": pl.String, "flag": pl.Boolean, "real": pl.Float64}
    for chunk_rows in (8192, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "_BLOCK_BYTES", 4 << 20 if chunk_rows == 8192 else 60)
            read = files.read(path, {}, None)
        assert {name: read.schema[name] for name in expected} == expected
        assert read["mixed"].to_list() == ["one", "one", "one", "2"]
        assert read["nested"].to_list() == ['{"x":1}'] * 3 + ["[1]"]
        assert read["late"].to_list() == [None, None, None, "here"]


def test_a_file_without_one_good_line_is_not_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", "a,b\n1,2\n")
    for attempt in (lambda: files.read(path, TEXT), lambda: files.schema(path)):
        with pytest.raises(SourceError, match=r"rows\.jsonl: it is not JSON lines: line 1: invalid JSON"):
            attempt()


def test_csv_rows_that_do_not_fit_the_header_or_the_encoding_are_marked_with_their_line(tmp_path: Path) -> None:
    data = b'a,b\n1,"two\nlines"\n3\n\n4,5,6\n\xff,7\n"8"x,9\n10,"11"\n'
    read = files.read(write(tmp_path, "rows.csv", data), TEXT)
    assert read["b"].to_list() == ["two\nlines", None, None, None, None, "11"]
    assert {row: (fault["line"], fault["error"]) for row, fault in faults(read).items()} == {
        1: (4, "1 fields, not 2"),
        2: (6, "3 fields, not 2"),
        3: (7, "invalid UTF-8"),
        4: (8, "invalid CSV: ',' expected after '\"'"),
    }
    assert read[RAW][3] == "\\xff,7\n"


def test_numbers_in_csv_are_read_where_a_format_wants_them(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", "a,s\nx,1.5\ny,\nz,high\n")
    read = files.read(path, {"a": pl.String(), "s": pl.Float64()})
    assert read["s"].to_list() == [1.5, None, None]
    assert {row: fault["error"] for row, fault in faults(read).items()} == {2: 's is "high", not a number'}


# --- files that cannot be read ---------------------------------------------------------------------------------------

WHOLE = pl.DataFrame({"a": [str(number) * 50 for number in range(2000)], "b": ["x"] * 2000})


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"])
def test_an_empty_file_is_an_error_with_its_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, b"")
    with pytest.raises(SourceError, match=rf"{name}: the file is empty: remove it"):
        files.schema(path)


def test_a_file_without_rows_is_an_error_with_its_name(tmp_path: Path) -> None:
    pl.DataFrame(schema=TEXT).write_parquet(tmp_path / "rows.parquet")
    write(tmp_path, "rows.csv", "a,b\n")
    write(tmp_path, "rows.json", "[]")
    write(tmp_path, "rows.jsonl", "\n\n")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(SourceError, match=rf"{path.name}: the file has no rows"):
            files.schema(path)
        if path.suffix != ".parquet":  # there, `schema` has seen all rows
            with pytest.raises(SourceError, match=rf"{path.name}: the file has no rows"):
                files.read(path, TEXT)


@pytest.mark.parametrize(
    "name",
    ["rows.parquet", "rows.arrow", "stream.arrow", "rows.jsonl.gz", "rows.jsonl.zst", "rows.json", "rows.json.gz"],
)
def test_a_truncated_file_is_an_error_with_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](WHOLE, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(SourceError, match=rf"{name}: .*truncated"):
        files.read(path, TEXT)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_file_that_is_not_what_its_name_says_is_an_error_with_its_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, b"this is not it at all" * 100)
    for attempt in (lambda: files.schema(path), lambda: files.read(path, TEXT)):
        with pytest.raises(SourceError, match=rf"{name}: .*not what its name says"):
            attempt()


def test_bytes_changed_inside_a_parquet_file_are_an_error_or_change_nothing_silently(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    WHOLE.write_parquet(path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"rows\.parquet: the file is truncated, corrupt"):
        files.read(path, TEXT)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('[{"a": "x"}, {"a": ', "never closed"),
        ('[{"a": "x"}, {"a": "y', "never closed"),
        ('[{"a": "x"}] [{"a": "y"}]', "more than one value"),
        ('{"x": [1], "y": [2]}', 'arrays "x", "y"'),
        ('{"x": 1}', "no array"),
        ('"text"', "begins with neither"),
    ],
)
def test_json_that_holds_no_rows_is_an_error_that_says_why(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(SourceError, match=rf"rows\.json: .*{error}"):
        files.read(write(tmp_path, "rows.json", text), TEXT)


def test_a_csv_quote_that_is_never_closed_is_an_error_as_it_swallows_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n')
    with pytest.raises(
        SourceError, match=r"rows\.csv: a quoted field that begins in the row of line 3 is never closed"
    ):
        files.read(path, TEXT)


def test_a_folder_or_a_locked_file_or_a_broken_link_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(SourceError, match=r"rows\.jsonl: a folder, not a file"):
        files.read(tmp_path / "rows.jsonl", TEXT)
    (tmp_path / "link.parquet").symlink_to(tmp_path / "nowhere.parquet")
    with pytest.raises(SourceError, match=r"link\.parquet: no such file"):
        files.schema(tmp_path / "link.parquet")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv.gz"])
def test_a_file_that_may_not_be_read_is_an_error_with_its_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, "{}")
    path.chmod(0)
    with pytest.raises(SourceError, match=rf"{name}: permission denied"):
        files.schema(path)


# --- fingerprints and the small parts --------------------------------------------------------------------------------


def test_a_fingerprint_follows_the_content_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", "{}")
    before, stat = files.fingerprint(path), path.stat()
    path.write_bytes(b"[]")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files.fingerprint(path) != before
    assert files.fingerprint(write(tmp_path, "copy.jsonl", "{}")) == before


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    )
)
def test_a_value_conforms_to_the_type_inferred_from_it_alone(value: object) -> None:
    dtype = rows.infer([value])
    if dtype in (pl.String, TURNS):
        assert rows.conform(value, dtype) == value
    assert rows.infer([value, value]) == dtype


@given(
    st.lists(
        st.one_of(
            st.integers(-9, 9),
            WORDS,
            st.lists(st.integers(0, 3), max_size=3),
            st.dictionaries(WORDS, WORDS, max_size=2),
        ),
        max_size=6,
    )
)
def test_the_elements_of_an_array_are_found_whatever_they_hold(values: list[object]) -> None:
    data = orjson.dumps(values)
    found = [orjson.loads(data[begin:end]) for begin, end in records._elements(data, 0, closed=True)]
    assert found == values


def test_arrow_types_of_wanted_columns_hold_more_than_two_gigabytes_of_offsets() -> None:
    assert rows._arrow_type(TURNS) == pa.large_list(
        pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
    )
