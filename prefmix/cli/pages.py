"""What a mixture looks like on the screen: funnel, sources, splits, what was reported. `build` and `show` share it.

Each page takes the manifest of a mixture, or what a dry run has in its place (`funnel`, `sources`, `subsets`, `audit`),
and gives a Rich renderable without a heading. Colours have meanings: cyan is a row in the mixture, yellow one that is
not (or something to look at), dim is beside the point. Text of the user's goes in as `Text`, never as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from prefmix.cli.charts import Bar, Histogram, Trimmed, axis, clipped, grid, percent, size, when

if TYPE_CHECKING:
    from prefmix.inspect import Listed

Manifest = Mapping[str, Any]

_TOP_REASONS = 3
_TOP_ITEMS = 3
_MOST_SOUGHT = 0.9  # of the items of a benchmark: where fewer are looked for it is said
_CHANGES = {"swap": "chosen and rejected swapped", "strip": "special tokens stripped"}


def funnel_page(manifest: Manifest) -> RenderableType:
    """From rows read to rows in the mixture, with the reasons of every stage.

    A thick bar is a share of the rows read, a thin one a share of the rows dropped.
    """
    funnel = manifest["funnel"]
    read, kept = funnel[0]["out"], funnel[-1]["out"]
    lost = sum(count for stage in funnel for count in stage["dropped"].values())
    table = grid("", ">rows", ">of read", "~")
    table.add_row("read", f"{read:,}", "", Bar(read, read))
    for number, stage in enumerate(funnel[1:], 2):
        for reason, count in by_count(stage["dropped"]):
            bar = Bar(count, lost, "yellow", thin=True)
            table.add_row(f"  {reason}", Text(f"−{count:,}", "yellow"), Text(percent(count, read), "dim"), bar)
        if stage.get("added"):
            table.add_row("  copies (repeat)", f"+{stage['added']:,}", Text(percent(stage["added"], read), "dim"), "")
        if number < len(funnel):
            line = f"left after {stage['stage']}", f"{stage['out']:,}", percent(stage["out"], read)
            table.add_row(*(Text(cell, "dim") for cell in line), Bar(stage["out"], read, "dim cyan"))
    line = (Text("in the mixture", "bold"), Text(f"{kept:,}", "bold"), Text(percent(kept, read), "dim"))
    table.add_row(*line, Bar(kept, read))
    return Trimmed(table)


def sources_page(manifest: Manifest, rows: Mapping[str, int] | None = None) -> RenderableType:
    """A line per source, in the order of their priority, with its share of the mixture, and below it what it is.

    `rows` gives the rows that each source has in the mixture, where copies make them more than the distinct rows kept.
    """
    sources = manifest["sources"]
    rows = rows or {name: entry["kept"] for name, entry in sources.items()}
    total = sum(rows.values())
    table = grid("source", ">read", ">kept", ">", ">of the mixture", "~", ">dropped", header=True)
    origins = grid("", "*")
    for name, entry in sources.items():
        dropped, own = sum(entry["dropped"].values()), rows.get(name, 0)
        counts = (f"{entry['read']:,}", f"{entry['kept']:,}", Text(percent(entry["kept"], entry["read"]), "dim"))
        lost = Text(f"{dropped:,}", "yellow" if dropped else "")
        table.add_row(Text(name), *counts, percent(own, total), Bar(own, total, width=12), lost)
        origins.add_row(Text(name), _origin(entry))
        if dropped:
            origins.add_row("", Text(f"− {_top_reasons(entry['dropped'])}", "dim"))
    return Trimmed(Group(table, "", origins))


def splits_page(manifest: Manifest) -> RenderableType:
    """Rows of every split of every subset, and tokens where a tokenizer counted them."""
    entries = [(subset, *item) for subset, splits in manifest["subsets"].items() for item in splits.items()]
    total = sum(entry["rows"] for *_, entry in entries)
    counted = any(entry.get("tokens") is not None for *_, entry in entries)
    table = grid("subset", "split", ">rows", ">", *([">tokens"] if counted else []), "~", header=True)
    previous = ""
    for subset, split, entry in entries:
        tokens = [f"{entry['tokens']:,}" if entry.get("tokens") is not None else ""] if counted else []
        shown = "" if subset == previous else subset
        share, bar = Text(percent(entry["rows"], total), "dim"), Bar(entry["rows"], total)
        table.add_row(shown, split, f"{entry['rows']:,}", share, *tokens, bar)
        previous = subset
    return Trimmed(table)


def contamination_page(report: Mapping[str, Any], read: int) -> RenderableType | None:
    """By benchmark: its items, how many of them were found, in how many of the rows, and the items in most rows. None
    where no benchmark was asked for."""
    if not report:
        return None
    table = grid("benchmark", ">items", ">found", ">rows", ">of read", "~", "~from", header=True)
    worst = grid("item", ">rows", "~words", header=True)
    most = max(entry["rows"] for entry in report.values())
    for name, entry in report.items():
        rows = Text(f"{entry['rows']:,}", "yellow" if entry["rows"] else "")
        bar = Bar(entry["rows"], most, "yellow", 12, thin=True)
        found = Text(f"{entry['touched']:,}", "yellow" if entry["touched"] else "")
        sources = clipped(", ".join(f"{source} {count:,}" for source, count in entry["sources"].items()), "dim")
        table.add_row(
            Text(name), f"{entry['items']:,}", found, rows, Text(percent(entry["rows"], read), "dim"), bar, sources
        )
        for item in entry["worst"][:_TOP_ITEMS]:
            worst.add_row(Text(item["item"]), f"{item['rows']:,}", clipped(item["text"], "dim"))
    pages: list[RenderableType] = [Trimmed(table)]
    for name, entry in report.items():
        if entry["sought"] < _MOST_SOUGHT * entry["items"]:
            unsought = f"{entry['items'] - entry['sought']:,} of the {entry['items']:,} items of {name}"
            pages.append(Text(f"{unsought} are too short to be looked for", "yellow"))
    if worst.row_count:
        pages += [Text("\nThe items in most rows", "bold"), Trimmed(worst)]
    return Group(*pages)


def audit_page(manifest: Manifest) -> RenderableType | None:
    """What was seen in rows that stayed: reported rules, changes, repeated prompts, length bias, scores. None where no
    row stayed."""
    audit = {name: entry for name, entry in manifest["audit"].items() if entry["rows"]}
    if not audit:
        return None
    seen = [(name, what, count, entry["rows"]) for name, entry in audit.items() for what, count in _seen(entry)]
    counts = grid("source", "seen in rows that stayed", ">rows", ">of kept", header=True)
    previous = ""
    for name, what, count, of in seen:
        shown = "" if name == previous else name
        counts.add_row(Text(shown), what, f"{count:,}", Text(percent(count, of), "dim"))
        previous = name
    pages: list[RenderableType] = [counts] if seen else [Text("No rule that is set to report applies.", "dim")]
    if any("length_bias" in entry for entry in audit.values()):
        pages += ["", _length_bias(audit)]
    if any("scores" in entry for entry in audit.values()):
        pages += ["", _scores(audit)]
    return Trimmed(Group(*pages))


def head_page(overview: Mapping[str, Any]) -> RenderableType:
    """Which mixture it is."""
    rows = {kind: sum(entry["rows"] for entry in splits.values()) for kind, splits in overview["subsets"].items()}
    counts = ", ".join(f"{count:,} {kind} rows" for kind, count in rows.items())
    table = grid("", "*")
    facts = {
        "digest": overview["digest"],
        "build": f"{overview['build']}, {when(overview['created'])}, prefmix {overview['tools']['prefmix']}",
        "licence": overview["license"],
        **({"tokenizer": overview["tokenizer"]["name"]} if overview["tokenizer"] else {}),
        "folder": f"{overview['folder']} ({size(overview['size_bytes'])})",
    }
    for name, fact in facts.items():
        table.add_row(Text(name, "dim"), Text(fact, "yellow" if (name, fact) == ("licence", "unknown") else ""))
    return Group(Text.assemble((f"{overview['name']}@{overview['version']}", "bold"), f"  {counts}"), Trimmed(table))


def lengths_page(lengths: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A histogram for each part of each subset (`prefmix.inspect.Lengths`); the parts of a subset share one axis."""
    table = grid("", "", "~")
    for number, each in enumerate(lengths):
        figures = f"median {each['median']:,}\np95 {each['p95']:,} · longest {each['longest']:,}"
        label = Text.assemble(f"{each['part']}\n", (each["subset"] if each["part"] == "messages" else "", "dim"))
        table.add_row(label, Histogram(each["counts"]), clipped(figures, "dim"))
        if number + 1 == len(lengths) or lengths[number + 1]["subset"] != each["subset"]:
            table.add_row("", Text(axis(each["edges"]), "dim"), "")
    return Trimmed(table)


def list_page(found: Sequence[Listed]) -> RenderableType:
    """A line for each version, the name once."""
    table = grid("mixture", "version", ">rows", "~digest", "~created", ">size", header=True)
    previous = ""
    for each in found:
        name = Text("" if each.name == previous else each.name, "bold")
        digest, created = clipped(each.digest[:12], "dim"), clipped(when(each.created))
        if each.problem:
            table.add_row(name, each.version, Text("broken", "red"), digest, created, "")
        else:
            rows = f"{sum(each.rows.values()):,}"
            table.add_row(name, each.version, rows, digest, created, size(each.size_bytes))
        previous = each.name
    problems = [Text(f"{each.name}@{each.version}: {each.problem}", "yellow") for each in found if each.problem]
    return Group(Trimmed(table), *problems)


class NextPage:
    """The command lines that are of use now, each with what it is for where the screen is wide enough for that."""

    def __init__(self, commands: Sequence[tuple[str, str]]) -> None:
        self.commands = commands

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widest = max(len(command) for command, _ in self.commands)
        fits = all(2 + widest + 2 + len(what) <= console.width for _, what in self.commands)
        yield ""
        yield Text("Next:", "bold")
        for command, what in self.commands:
            yield Text.assemble("  ", command.ljust(widest), (f"  {what}", "dim")) if fits else Text(f"  {command}")


def titled(title: str, body: RenderableType, note: str = "") -> RenderableType:
    """A page under its heading, with a blank line above."""
    return Group("", Text.assemble((title, "bold"), (f"   {note}" if note else "", "dim")), body)


def by_count(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent first; equal ones by name."""
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def _top_reasons(dropped: Mapping[str, int]) -> str:
    """`filter/tie 3, dedupe/pair 2, filter/inverted 2, others 6`."""
    ranked = by_count(dropped)
    named = ", ".join(f"{reason} {count:,}" for reason, count in ranked[:_TOP_REASONS])
    others = sum(count for _, count in ranked[_TOP_REASONS:])
    return named + (f", others {others:,}" if others else "")


def _origin(entry: Mapping[str, Any]) -> Text:
    """`Intel/orca_dpo_pairs@abcdef123456 · orca_dpo_pairs · apache-2.0`, as far as it is known."""
    path = entry.get("hub") or entry.get("path") or []
    place = path if isinstance(path, str) else ", ".join(path)
    revision = f"@{entry['revision'][:12]}" if entry.get("revision") else ""
    text = Text(" · ".join(part for part in (f"{place}{revision}", entry["format"]) if part), "dim")
    if licence := entry.get("licence"):
        text.append(" · ", "dim").append(*(("licence unknown", "yellow") if licence == "unknown" else (licence, "dim")))
    return text


def _seen(entry: Mapping[str, Any]) -> list[tuple[str, int]]:
    found = by_count(entry["reported"])
    found += [(_CHANGES.get(change, change), count) for change, count in by_count(entry["changed"])]
    found.append(("prompt repeated in this source", entry["repeated_prompts"]))
    found.append(("prompt in another source too", entry["prompts_in_other_sources"]))
    return [(what, count) for what, count in found if count]


def _length_bias(audit: Mapping[str, Any]) -> Table:
    table = grid("source", ">chosen is longer", "~", ">chosen, mean", ">rejected, mean", header=True)
    for name, entry in audit.items():
        if bias := entry.get("length_bias"):
            longer = bias["chosen_longer"]
            style = "yellow" if abs(longer - 0.5) > 0.25 else ""
            means = (f"{bias[side]:,.0f} chars" for side in ("chosen_chars", "rejected_chars"))
            table.add_row(Text(name), Text(percent(longer, 1), style), Bar(longer, 1, style or "cyan", 12), *means)
    return table


def _scores(audit: Mapping[str, Any]) -> Table:
    table = grid("source", ">scored", "score", ">min", ">median", ">max", header=True)
    for name, entry in audit.items():
        if scores := entry.get("scores"):
            for which in ("chosen", "rejected", "margin"):
                head = (Text(name), f"{scores['rows']:,}") if which == "chosen" else ("", "")
                table.add_row(*head, which, *(f"{scores[which][value]:.4g}" for value in ("min", "median", "max")))
    return table
