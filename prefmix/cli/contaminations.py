"""`prefmix contamination`: which benchmarks a data set holds text of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefmix.cli.options import json_option, store_option
from prefmix.cli.progress import busy
from prefmix.cli.screen import emit_json, out, say, say_warnings
from prefmix.errors import GateError, UsageError

if TYPE_CHECKING:
    from prefmix.contamination import Contamination

_FORMATS = (".parquet", ".jsonl", ".csv")


@click.command("contamination")
@click.argument("data", nargs=-1, required=True)
@click.option(
    "--against",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Suite (as truthfulqa), or file, folder or glob pattern of a benchmark; may be given more than once.",
)
@click.option(
    "--field",
    "fields",
    multiple=True,
    metavar="FIELD",
    help="Column of the benchmark that holds text, as choices.text; else those with well-known names.",
)
@click.option(
    "--column", "columns", multiple=True, metavar="COLUMN", help="Search this column of DATA, whatever its format."
)
@click.option(
    "--ngram", type=click.IntRange(min=1), default=13, show_default=True, help="Words in a row that must agree."
)
@click.option("--answers", is_flag=True, help="Search the answers as well as the prompts.")
@click.option(
    "--out",
    "path",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write the rows with their evidence to a .parquet, .jsonl or .csv file.",
)
@click.option("--fail", is_flag=True, help="Exit with code 3 when anything is found.")
@store_option
@json_option
def contamination_command(
    data: Sequence[str],
    against: Sequence[str],
    fields: Sequence[str],
    columns: Sequence[str],
    ngram: int,
    answers: bool,
    path: str | None,
    fail: bool,
    store: str | None,
    as_json: bool,
) -> None:
    """Say which benchmarks a data set holds text of, and where.

    DATA are mixtures, files, folders, glob patterns or data sets on the Hub (owner/name); a file or folder comes before a
    mixture of the same name. What counts is what a build drops rows for with the same benchmarks in its recipe.
    """
    if path is not None:
        _check_place(Path(path))

    def search() -> Contamination:
        from prefmix.contamination import contamination

        return contamination(
            data, against, fields=fields or None, columns=columns, ngram=ngram, answers=answers, store=store
        )

    found = busy("looking for text of benchmarks", search)
    if path is not None:
        _write(found, Path(path))
    if as_json:
        emit_json({"benchmarks": found.report, "rows": found.rows, "invalid": found.invalid})
    else:
        _report(found, path)
    if fail and not found.found.is_empty():
        names = found.found["benchmark"].unique(maintain_order=True)
        raise GateError(f"the data holds text of {', '.join(name for name in found.report if name in names)}.")


def _report(found: Contamination, path: str | None) -> None:
    import polars as pl

    from prefmix.cli.pages import contamination_page

    rows = sum(found.rows.values())
    held = found.found.select(pl.struct("source", "kind", "source_row").n_unique()).item()
    say((f"{held:,}", "bold yellow" if held else "bold"), f" of {rows:,} rows hold text of a benchmark")
    if page := contamination_page(found.report, rows):
        out().print()
        out().print(page)
    say_warnings(
        [
            f"{name}: {count:,} row{'s do' if count > 1 else ' does'} not fit its format, and {'were' if count > 1 else 'was'} not searched"
            for name, count in found.invalid.items()
        ]
    )
    number = f"{found.found.height:,} finding{'s' * (found.found.height != 1)}"
    if path is not None:
        say()
        say("wrote ", (path, "bold"), (f"  {number}", "dim"))
    elif held:
        say()
        say((f"--out FILE writes the {number}, each with its row and the words", "dim"))


def _check_place(path: Path) -> None:
    """Raises UsageError, before anything is searched, where a file cannot be written."""
    if path.suffix not in _FORMATS:
        raise UsageError(f"--out {path}: the name must end in {', '.join(_FORMATS)}.")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: there is no folder {path.parent}.")


def _write(found: Contamination, path: Path) -> None:
    """Writes the findings as a whole or not at all."""
    fresh = path.with_name(f".{path.name}.part")
    writers = {".parquet": found.found.write_parquet, ".jsonl": found.found.write_ndjson, ".csv": found.found.write_csv}
    try:
        writers[path.suffix](fresh)
        fresh.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        fresh.unlink(missing_ok=True)
