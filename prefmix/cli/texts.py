"""Rows on the screen: their turns, what became of them, and two of them side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prefmix.cli.charts import Trimmed, clipped, grid
from prefmix.inspect import Dropped, Row, Story, evidence, sentence
from prefmix.mixture import Mixture

#: Characters of a turn that are shown; --json has them all.
SHOWN_CHARS = 800
_SIDE_CHARS = 400
_BEFORE_CHARS = 80  # before the first difference of two long texts
_MARKED = ("bold yellow", "bold cyan")
_ID_CHARS = 12
#: C0 and C1 controls except newline and tab, as pictures: a row must not command the terminal.
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {0x7F: "\u2421"}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")


def plain(text: str) -> str:
    """Text of a row without what a terminal would obey."""
    return text.translate(_CONTROLS)


def short(text: str, most: int = SHOWN_CHARS) -> str:
    """The beginning of a long text, and how much more there is."""
    text = plain(text)
    return text if len(text) <= most else f"{text[:most].rstrip()} … ({len(text) - most:,} characters more)"


def one_line(text: str, most: int = 200) -> str:
    """The beginning of a text with its white space squeezed."""
    return plain(" ".join(text[: most * 2].split()))[:most]


def opening(row: Row | None) -> str:
    """The beginning of what the user asks."""
    turns = next(iter(row.parts.values()), []) if row else []
    asked = next((turn for turn in turns if turn["role"] != "system"), turns[0] if turns else None)
    return one_line(asked["content"]) if asked else ""


def place(entry: Mapping[str, Any]) -> str:
    """`quickstart/orca.jsonl:15`: file and row of a ledger entry."""
    return f"{plain(entry['source_file'] or '')}:{entry['source_row']}"


def turns_page(row: Row) -> RenderableType:
    """The turns of a row under each other, each with its role; answers with what they are, and their scores."""
    table = grid("", "*")
    for label, score, content in _turns(row):
        table.add_row(Text.assemble((label, "cyan"), (score, "dim")), Text(short(content)))
    return Trimmed(table)


def row_page(row: Row) -> RenderableType:
    """A row of the mixture."""
    head = Text.assemble((row.id[:_ID_CHARS], "bold"), (f"  {row.source} · {row.kind}/{row.split}", "dim"))
    return Group("", head, turns_page(row))


def dropped_page(dropped: Dropped, head: bool = True) -> RenderableType:
    """A row of the ledger: where it stood, why it is not in the mixture, its texts, the row that was kept instead."""
    entry = dropped.entry
    lines: list[RenderableType] = []
    if head:
        where = Text(f"  {entry['source']} · {place(entry)}", "dim")
        lines += ["", Text.assemble((entry["id"][:_ID_CHARS], "bold"), where)]
    lines.append(Text.assemble((entry["reason"], "yellow"), f"  {sentence(entry['reason'])}"))
    if facts := evidence(entry["reason"], entry["detail"]):
        lines.append(Text(one_line(facts, 400), "dim"))
    if entry["kept_id"] is not None:
        lines.append(_kept_line(dropped))
    if dropped.row and dropped.kept and _contents(dropped.row) != _contents(dropped.kept):
        lines.append(_side_by_side(dropped.row, dropped.kept))
    elif dropped.row:
        lines.append(turns_page(dropped.row))
    return Group(*lines)


def story_page(story: Story, mixture: Mixture) -> RenderableType:
    """All that became of the rows with one id."""
    lines: list[RenderableType] = []
    if story.row:
        lines.append(Text.assemble((story.id, "bold"), f"  is in {mixture}"))
        facts = grid("", "*")
        files = mixture.manifest["sources"][story.row.source]["files"]
        origin = f" · {plain(files[0]['path'])}" if len(files) == 1 else ""  # of several, nobody has noted which one
        facts.add_row(Text("source", "dim"), Text(f"{story.row.source} ({story.row.kind}){origin}"))
        splits = [f"{spot['split']}, row {spot['row']:,}" for spot in story.places]
        facts.add_row(
            Text("split", "dim"), Text("; ".join(splits[:4]) + (f"; {len(splits) - 4:,} more" * (len(splits) > 4)))
        )
        for change in story.changes:
            text = f"{change['change']}: {evidence(change['change'], change['detail'])}  ({place(change)})"
            facts.add_row(Text("changed", "dim"), Text(plain(text), "yellow"))
        if story.instead_of:
            facts.add_row(Text("instead of", "dim"), _instead_of(story))
        lines += [Trimmed(facts), "", turns_page(story.row)]
    own = [dropped for dropped in story.dropped if not (story.row and dropped.entry["kept_id"] == story.id)]
    for number, dropped in enumerate(own):
        if story.row or number:
            lines += ["", Text("A copy of it was dropped.", "dim")]
        else:
            lines.append(Text.assemble((story.id, "bold"), f"  is not in {mixture}"))
        entry = dropped.entry
        lines += [
            Text(f"{entry['source']} ({entry['kind']}) · {place(entry)}", "dim"),
            dropped_page(dropped, head=False),
        ]
    if not story.row and story.instead_of:
        lines += ["", Text.assemble(("instead of  ", "dim"), _instead_of(story))]
    return Group("", *lines)


def stories_page(stories: list[Story]) -> RenderableType:
    """Several rows, one line each."""
    table = grid("id", "source", "in", "~asks", header=True)
    for story in stories:
        source = story.row.source if story.row else story.dropped[0].entry["source"]
        fate = Text(story.row.split or "") if story.row else Text(story.dropped[0].entry["reason"], "yellow")
        row = story.row or story.dropped[0].row
        table.add_row(Text(story.id[:_ID_CHARS], "bold"), Text(source), fate, clipped(opening(row), "dim"))
    return Trimmed(table)


def _turns(row: Row) -> Iterator[tuple[str, str, str]]:
    """(label, score, content) of every turn."""
    for part, turns in row.parts.items():
        for number, turn in enumerate(turns):
            answer = part in ("chosen", "rejected")
            score = row.scores.get(f"{part}_score") if answer and number == len(turns) - 1 else None
            label = part if answer and turn["role"] == "assistant" else plain(turn["role"])
            yield label, "" if score is None else f" {score:g}", turn["content"]


def _contents(row: Row) -> list[tuple[str, str]]:
    return [(label, content) for label, _, content in _turns(row)]


def _kept_line(dropped: Dropped) -> Text:
    kept_id = dropped.entry["kept_id"]
    line = Text("kept instead: ", "dim").append(kept_id[:_ID_CHARS], "bold")
    if dropped.kept:
        line.append(f"  {dropped.kept.source} · {dropped.kept.kind}/{dropped.kept.split}", "dim")
        if dropped.row and _contents(dropped.row) == _contents(dropped.kept):
            line.append(", the same texts", "dim")
    elif dropped.kept_reason:
        line.append("  which was dropped later: ", "dim").append(dropped.kept_reason, "yellow")
    return line


def _side_by_side(dropped: Row, kept: Row) -> RenderableType:
    """Two rows in two columns, turn by turn, each with its role above it."""
    table = Table(box=None, header_style="", pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    table.add_column(Text("dropped", "yellow"), ratio=1, overflow="fold")
    table.add_column(Text("kept", "cyan"), ratio=1, overflow="fold")
    sides = [_numbered(row) for row in (dropped, kept)]
    for key in sorted(dict.fromkeys([*sides[0], *sides[1]]), key=lambda key: key[0] != "system"):
        one, other = (side.get(key) for side in sides)
        if one is None or other is None:
            table.add_row(
                *("" if turn is None else _stacked(turn, Text(short(turn[2], _SIDE_CHARS))) for turn in (one, other))
            )
        elif one[2] == other[2]:
            table.add_row(_stacked(one, Text(short(one[2], _SIDE_CHARS))), _stacked(other, Text("the same", "dim")))
        else:
            texts = _compared(one[2], other[2])
            table.add_row(*(_stacked(turn, text) for turn, text in zip((one, other), texts, strict=True)))
    return Trimmed(table)


def _compared(one: str, other: str) -> tuple[Text, Text]:
    """Two texts from shortly before they part, with marks at what only one of them has."""
    differ = (at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    apart = next(differ, min(len(one), len(other)))
    start = one.rfind(" ", 0, apart - _BEFORE_CHARS) + 1 if apart > _SIDE_CHARS // 2 else 0
    pages = Text(short(one[start:], _SIDE_CHARS)), Text(short(other[start:], _SIDE_CHARS))
    # Twice what is shown: where only one of two ends is cut off, it would look like a change.
    _mark_changes(pages, (one[start:][: 2 * _SIDE_CHARS], other[start:][: 2 * _SIDE_CHARS]))
    if start:
        before = f"({start:,} equal characters) … "
        return Text.assemble((before, "dim"), pages[0]), Text.assemble((before, "dim"), pages[1])
    return pages


def _mark_changes(pages: tuple[Text, Text], texts: tuple[str, str]) -> None:
    """Marks the words that only one of two texts has; none where they have less than half in common."""
    spans = [[match.span() for match in re.finditer(r"\S+", text)] for text in texts]
    words = [[text[start:end] for start, end in found] for text, found in zip(texts, spans, strict=True)]
    matcher = SequenceMatcher(None, *words, autojunk=False)
    if matcher.ratio() < 0.5:
        return
    for kind, *bounds in matcher.get_opcodes():
        for side in (0, 1) if kind != "equal" else ():
            for start, end in spans[side][slice(*bounds[2 * side :][:2])]:
                pages[side].stylize(_MARKED[side], start, end)


def _numbered(row: Row) -> dict[tuple[str, int], tuple[str, str, str]]:
    """The turns of a row by label and by how many of that label came before."""
    found: dict[tuple[str, int], tuple[str, str, str]] = {}
    for turn in _turns(row):
        found[turn[0], sum(label == turn[0] for label, _ in found)] = turn
    return found


def _stacked(turn: tuple[str, str, str], content: Text) -> Text:
    """A turn: its role and score, and below it its text."""
    return Text.assemble((turn[0] + turn[1], "dim"), "\n", content)


def _instead_of(story: Story) -> Text:
    """The rows that were dropped because this one was kept."""
    shown = [f"{entry['reason']} {place(entry)}" for entry in story.instead_of[:5]]
    more = len(story.instead_of) - len(shown)
    return Text("\n".join(shown) + (f"\nand {more:,} more" if more > 0 else ""))
