"""Commands about mixtures that are there: show, diff, drops, why, list, rm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from prefmix.cli.documents import diff_json, dropped_json, entry_json, row_json, story_json
from prefmix.cli.options import json_option, store_option
from prefmix.cli.progress import busy
from prefmix.cli.screen import command_line, emit_json, err, out, say, say_next, say_warnings
from prefmix.errors import MixtureError, UsageError

if TYPE_CHECKING:
    import polars as pl

    from prefmix.mixture import Mixture

_SHOWN_ROWS = 20
_DIFF_ROWS = 5

Command = TypeVar("Command", bound=Callable[..., Any])


def _limit_option(what: str, default: int) -> Callable[[Command], Command]:
    text = f"{what} [default: {default}; with --json all]."
    return click.option("--limit", type=click.IntRange(min=0), metavar="N", help=text)


@click.command("show")
@click.argument("mixture", metavar="MIXTURE")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Read N rows in place of the numbers.")
@click.option("--reason", metavar="REASON", help="With --sample: rows that were dropped for REASON, as in filter/tie.")
@store_option
@json_option
def show_command(mixture: str, sample: int | None, reason: str | None, store: str | None, as_json: bool) -> None:
    """Show what is in a mixture and what became of the rows that are not.

    MIXTURE is a name (its last version), name@v2, name@ and the beginning of a build or digest, a folder, or
    hub:user/repo@v2, which is pulled into the store first. A sample
    is chosen by the mixture's seed: the same N rows every time. Dropped rows are read from their source again.
    """
    if reason is not None and sample is None:
        raise UsageError(f"--reason {reason} needs --sample N; `prefmix drops` lists the rows of a reason.")
    opened = _open(mixture, store)
    if sample is None:
        _show(opened, store, as_json)
    elif reason is None:
        _show_rows(opened, sample, as_json)
    else:
        _show_dropped(opened, reason, sample, as_json)


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@_limit_option("Rows to list of each kind", _DIFF_ROWS)
@store_option
@json_option
def diff_command(a: str, b: str, limit: int | None, store: str | None, as_json: bool) -> None:
    """Say which rows came, went or moved between two mixtures, and why.

    A is the older mixture, B the newer one. A row that went has its reason in the ledger of B, one that came in the
    ledger of A; a row that is in neither is no longer in its source, or new there.
    """
    from prefmix import inspect

    old, new = _open(a, store), _open(b, store)
    if old.digest == new.digest and not as_json:
        say(f"{old} and {new} have the same rows: digest {old.digest[:12]}")
        return
    found = busy("comparing", lambda: inspect.diff(old, new))
    if as_json:
        emit_json(diff_json(found, limit))
        return
    from prefmix.cli.differences import diff_page

    out().print(busy("reading rows", lambda: diff_page(found, _DIFF_ROWS if limit is None else limit)))
    say_next([(_again("why", new, "ID", store=store), "the story of one row")])


@click.command("drops")
@click.argument("mixture", metavar="MIXTURE")
@click.option("--reason", metavar="REASON", help="List the rows of one reason (filter/tie) or one stage (filter).")
@click.option("--source", metavar="NAME", help="List the rows of one source.")
@_limit_option("Rows to list", _SHOWN_ROWS)
@store_option
@json_option
def drops_command(
    mixture: str, reason: str | None, source: str | None, limit: int | None, store: str | None, as_json: bool
) -> None:
    """List the rows that are not in a mixture, with their reasons.

    Without --reason or --source it counts them. A row is named by its file and its number in the source, from 0.
    """
    import polars as pl

    from prefmix import inspect

    opened = _open(mixture, store)
    if source is not None and source not in opened.manifest["sources"]:
        raise UsageError(f"{opened} has no source {source}; it has {', '.join(opened.manifest['sources'])}.")
    wanted = pl.col("reason").is_in(_reasons(opened, reason))
    if source is not None:
        wanted &= pl.col("source") == source
    counts = inspect.drop_counts(opened).filter(wanted)
    rows = opened.drops.filter(wanted).sort("reason", maintain_order=True)
    if as_json:
        _emit_drops(opened, counts, rows if limit is None else rows.head(limit))
    elif counts.is_empty():
        among = f" of {source}" if source else ""
        say(f"No row{among} was dropped{f' for {reason}' if reason else ''}.")
    elif reason is None and source is None and limit is None:
        _count_drops(opened, counts, store)
    else:
        _list_drops(opened, source, counts, rows.head(_SHOWN_ROWS if limit is None else limit), store)


@click.command("why")
@click.argument("mixture", metavar="MIXTURE")
@click.argument("query", metavar="ID-OR-TEXT")
@click.option(
    "--limit", type=click.IntRange(min=1), default=_SHOWN_ROWS, metavar="N", show_default=True, help="Rows to tell of."
)
@store_option
@json_option
def why_command(mixture: str, query: str, limit: int, store: str | None, as_json: bool) -> None:
    """Tell the story of one row: why it is in a mixture, or why not.

    The row is named by its id (or the first 6 digits or more), else by text that it contains, in any case. Rows that
    were dropped are read from their sources again. Exits with 1 when there is no such row.
    """
    from prefmix import inspect

    opened = _open(mixture, store)
    if not query.strip():
        raise UsageError("why: name a row by its id, or by text that it contains.")
    stories, count, problems = busy("looking for the row", lambda: inspect.why(opened, query, limit))
    if not as_json:
        say_warnings(problems)
    if not stories:
        unread = "".join(f"\n{problem}" for problem in problems) if as_json else ""
        raise MixtureError(f"No row that {opened} was made from has {query!r} as its id or in its text.{unread}")
    if as_json:
        rows = [story_json(story) for story in stories]
        emit_json({"mixture": str(opened), "found": count, "rows": rows, "problems": problems})
        return
    from prefmix.cli.texts import stories_page, story_page

    if len(stories) == 1:
        out().print(story_page(stories[0], opened))
        return
    say(f"{count:,} rows have it")
    out().print(stories_page(stories))
    if count > len(stories):
        say((f"{count - len(stories):,} more: --limit {count}", "dim"))
    say_next([(_again("why", opened, stories[0].id[:12], store=store), "the story of one of them")])


@click.command("list")
@store_option
@json_option
def list_command(store: str | None, as_json: bool) -> None:
    """List the mixtures in the store and their versions."""
    from prefmix.inspect import listing
    from prefmix.store import Store

    shelf = Store(store)
    found = listing(shelf)
    if as_json:
        emit_json([asdict(each) for each in found])
        return
    if not found:
        say(f"No mixtures in {shelf.place}.")
        say_next([("prefmix build RECIPE", "make one"), ("prefmix init", "write a recipe")])
        return
    from prefmix.cli.pages import list_page

    out().print(list_page(found))
    say_next([(command_line("show", found[-1].name, store=store), "what is in it")])


@click.command("rm")
@click.argument("mixture", metavar="MIXTURE")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing.")
@store_option
def rm_command(mixture: str, yes: bool, quiet: bool, store: str | None) -> None:
    """Remove a version of a mixture.

    Its folder goes; its label stays taken and never names other rows later.
    """
    from prefmix.store import Store

    opened, rows = _to_remove(mixture, store)
    home = opened.folder.resolve().parent
    shelf = Store(store if opened.address else home.parent)
    entry = shelf.versions(opened.name).get(opened.version) if home.name == opened.name else None
    if entry is None or entry["build"] != opened.build:
        raise UsageError(f"{opened.place} is a mixture that no store knows: delete the folder yourself.")
    what = f"{opened} ({rows}): {opened.place}"
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"rm {mixture} would remove {what}. Give --yes to do it.")
        say(what, on=err())
        if not click.confirm("Remove it?", err=True):
            err().print("Nothing was removed.")
            return
    shelf.remove(opened)
    if not quiet:
        say(f"Removed {what}", on=err())


def _to_remove(reference: str, store: str | None) -> tuple[Mixture, str]:
    """The mixture that a reference means and how large it is; one that is damaged is known by its label alone."""
    from prefmix.cli.charts import size
    from prefmix.inspect import size_bytes
    from prefmix.mixture import Unreadable
    from prefmix.store import Store, look_at_mixture

    try:
        opened = look_at_mixture(reference, store)
        length = Store(store).size_bytes(opened) if opened.address else size_bytes(opened.folder)
        return opened, f"{opened.funnel[-1]['out']:,} rows, {size(length)}"
    except Unreadable:
        shelf = Store(store)
        name, _, label = reference.partition("@")
        versions = shelf.versions(name)
        label = label or next(reversed(versions), "")
        if label not in versions:
            raise
        return shelf.labelled(name, label), "damaged"


def _open(reference: str, store: str | None) -> Mixture:
    """A mixture whose files are all there; one on the Hub is pulled first."""
    from prefmix.inspect import check_whole

    if reference.startswith("hub:"):
        from prefmix.cli.hubs import pulled

        return pulled(reference, store)
    from prefmix.store import open_mixture

    mixture = open_mixture(reference, store)
    check_whole(mixture)
    return mixture


def _show(mixture: Mixture, store: str | None, as_json: bool) -> None:
    from prefmix import inspect

    found = busy("measuring", lambda: inspect.overview(mixture))
    if as_json:
        emit_json(found)
        return
    from prefmix.cli import pages

    manifest = mixture.manifest
    out().print(pages.head_page(found))
    funnel_note = "thin bars: share of the rows dropped" if len(mixture.funnel) > 1 else ""
    out().print(pages.titled("From rows read to rows in the mixture", pages.funnel_page(manifest), funnel_note))
    out().print(pages.titled("Sources", pages.sources_page(manifest, found["rows_by_source"])))
    out().print(pages.titled("Splits", pages.splits_page(manifest)))
    out().print(
        pages.titled("Lengths", pages.lengths_page(found["lengths"]), f"in {found['lengths'][0]['unit']}, log scale")
    )
    if held := pages.contamination_page(manifest["contamination"], manifest["funnel"][0]["out"]):
        out().print(pages.titled("Text of benchmarks", held))
    if reported := pages.audit_page(manifest):
        out().print(pages.titled("Reported, not dropped", reported))
    commands = [(_again("show", mixture, "--sample", "3", store=store), "read some rows")]
    if any(stage["dropped"] for stage in mixture.funnel):
        commands.append((_again("drops", mixture, store=store), "the rows that are not in it"))
    say_next(commands)


def _show_rows(mixture: Mixture, count: int, as_json: bool) -> None:
    from prefmix import inspect

    rows = busy("reading rows", lambda: inspect.sample(mixture, count))
    if as_json:
        emit_json({"mixture": str(mixture), "rows": [row_json(row) for row in rows]})
        return
    from prefmix.cli.texts import row_page

    for row in rows:
        out().print(row_page(row))


def _show_dropped(mixture: Mixture, reason: str, count: int, as_json: bool) -> None:
    from prefmix import inspect

    entries = inspect.sample_drops(mixture, _reasons(mixture, reason), count)
    dropped, problems = busy("reading the sources again", lambda: inspect.dropped_rows(mixture, entries))
    if as_json:
        emit_json({"mixture": str(mixture), "rows": [dropped_json(each) for each in dropped], "problems": problems})
        return
    from prefmix.cli.texts import dropped_page

    say_warnings(problems)
    if not dropped:
        say(f"No row was dropped for {reason}.")
    for each in dropped:
        out().print(dropped_page(each))


def _emit_drops(mixture: Mixture, counts: pl.DataFrame, rows: pl.LazyFrame) -> None:
    entries = [entry_json(entry) for entry in rows.collect().iter_rows(named=True)]
    dropped = int(counts["rows"].sum())
    emit_json({"mixture": str(mixture), "dropped": dropped, "counts": counts.to_dicts(), "rows": entries})


def _count_drops(mixture: Mixture, counts: pl.DataFrame, store: str | None) -> None:
    from prefmix.cli.drops import counts_page

    out().print(counts_page(mixture, counts))
    totals = counts.drop("source").group_by("reason").sum()
    most = totals.sort("rows", "reason", descending=[True, False])["reason"][0]
    texts = _again("show", mixture, "--sample", "3", "--reason", most, store=store)
    rows = _again("drops", mixture, "--reason", most, store=store)
    say_next([(rows, "the rows of one reason"), (texts, "their texts")])


def _list_drops(
    mixture: Mixture, source: str | None, counts: pl.DataFrame, rows: pl.LazyFrame, store: str | None
) -> None:
    from prefmix.cli.drops import counts_page, rows_page

    listed, dropped = rows.collect(), int(counts["rows"].sum())
    out().print(counts_page(mixture, counts, source))
    out().print(rows_page(listed, several_reasons=counts["reason"].n_unique() > 1))
    if dropped > listed.height:
        say((f"{dropped - listed.height:,} more: --limit {dropped}", "dim"))
    if listed.height:
        say_next([(_again("why", mixture, listed["id"][0][:12], store=store), "the story of one of them")])


def _again(name: str, mixture: Mixture, *words: str, store: str | None) -> str:
    """A command line about the same mixture: by its folder where the store has not got it."""
    from prefmix.store import Store

    stored = (Store(store).root / mixture.name / mixture.build).resolve() == mixture.folder.resolve()
    return command_line(name, str(mixture if stored else mixture.folder), *words, store=store)


def _reasons(mixture: Mixture, reason: str | None) -> list[str]:
    """The reasons of the mixture's ledger that an option means. Raises UsageError for one that cannot be."""
    from prefmix.inspect import matching

    present: dict[str, int] = {}
    for stage in mixture.funnel:
        present |= stage["dropped"]
    try:
        return matching(reason, present)
    except LookupError as error:
        there = f" {mixture} has: {', '.join(present)}." if present else ""
        raise UsageError(f"--reason: {error.args[0]}.{there}") from None
