"""The data card of a mixture: README.md with the YAML that `datasets` and the Hub read, made from the manifest and from
what is known of the sources (data_cards/)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

#: From free to strict: conditions that a mixture has to keep because one of its sources has them. What is not listed is
#: stricter than all of these, because nobody has read it; a source without a licence is stricter still.
STRICTNESS = (
    "cc0-1.0", "unlicense", "0bsd", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0", "cc-by-4.0", "odc-by",
    "cdla-permissive-2.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "odbl", "gpl-3.0", "agpl-3.0", "llama2", "llama3",
    "cc-by-nd-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0",
)  # fmt: skip
UNKNOWN = "unknown"

#: Licences that the upstream cards declare, for recipes that do not say.
KNOWN_LICENCES = {
    "Intel/orca_dpo_pairs": "apache-2.0",
    "argilla/ultrafeedback-binarized-preferences": "mit",
    "argilla/ultrafeedback-binarized-preferences-cleaned": "mit",
    "HuggingFaceH4/ultrafeedback_binarized": "mit",
    "openbmb/UltraFeedback": "mit",
    "Anthropic/hh-rlhf": "mit",
}


def strictest(licences: Iterable[str]) -> str:
    """The licence with the most conditions; "unknown" as soon as one is unknown."""

    def rank(licence: str) -> tuple[int, str]:
        if licence == UNKNOWN:
            return len(STRICTNESS) + 1, licence
        return STRICTNESS.index(licence) if licence in STRICTNESS else len(STRICTNESS), licence

    return max(licences, key=rank, default=UNKNOWN)


@dataclass(frozen=True)
class DataCard:
    """A datasheet: the Hub names and formats that it is about, and its text without the YAML head."""

    name: str
    hub: tuple[str, ...]
    formats: tuple[str, ...]
    text: str

    def section(self, heading: str) -> str:
        """The text below a heading of the second level."""
        return self.text.partition(f"## {heading}\n")[2].partition("\n## ")[0].strip()


@cache
def data_cards() -> tuple[DataCard, ...]:
    """The data cards that come with prefmix: in the wheel, or in a checkout of the repository."""
    package = Path(__file__).parent
    folders = (package / "data" / "data_cards", package.parent / "data_cards")
    cards: dict[str, DataCard] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.md"))):
        _, head, text = path.read_text(encoding="utf-8").split("---\n", 2)
        about = yaml.safe_load(head)
        card = DataCard(about["name"], tuple(about["hub"]), tuple(about["formats"]), text.strip())
        cards.setdefault(card.name, card)
    return tuple(cards.values())


def card(
    manifest: Mapping[str, Any],
    repo: str | None = None,
    tag: str | None = None,
    lengths: Sequence[tuple[str, str, str, int, int, int]] = (),
) -> str:
    """README.md of a mixture, in its folder or in a repository on the Hub at a tag.

    `lengths` has (subset, part, unit, median, 95th percentile, longest) of its texts.
    """
    name, subsets = manifest["name"], manifest["subsets"]
    rows = {subset: sum(entry["rows"] for entry in splits.values()) for subset, splits in subsets.items()}
    counted = " and ".join(f"{count:,} {subset} rows" for subset, count in rows.items())
    sections = [
        f"---\n{yaml.safe_dump(_head(manifest, sum(rows.values())), sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"A mixture of {counted}, made with prefmix {manifest['tools']['prefmix']}. Digest `{manifest['digest']}`.",
        "## What is inside",
        _table(["subset", "split", "rows", "tokens", "tokens a row"], list(_split_rows(subsets))),
        *_token_counts(manifest),
        *([_table(["subset", "part", "in", "median", "95 %", "longest"], _shown(lengths))] if lengths else []),
        "## Sources",
        _table(["source", "from", "revision", "licence", "read", "kept", "dropped"], list(_source_rows(manifest))),
        f"{_licence(manifest)} Every row that was read is either here or in the ledger, `drops/drops.parquet`, with its "
        "reason; rows that were changed (swapped, stripped of special tokens) are in `drops/changes.parquet`.",
        "## From rows read to rows kept",
        _table(
            ["stage", "in", "dropped", "out"],
            [
                [stage["stage"], f"{stage['in']:,}", _reasons(stage["dropped"]), f"{stage['out']:,}"]
                for stage in manifest["funnel"]
            ],
        ),
        *_known_defects(manifest),
        *_contamination(manifest["contamination"]),
        *_reported(manifest["audit"]),
        *_how_to_load(subsets, repo, tag),
        "## How to build it again",
        "```\nprefmix build recipe.toml\n```",
        "`recipe.toml` is the recipe with every default spelled out; its digest is "
        f"`{manifest['recipe_digest']}`. Sources on the Hub are read at the commits that it names; files must lie where it "
        "says, from its own folder.",
        *_use_and_limits(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _head(manifest: Mapping[str, Any], rows: int) -> dict[str, Any]:
    subsets, licence = manifest["subsets"], manifest["license"]
    head: dict[str, Any] = {"pretty_name": manifest["name"], "license": licence if licence in STRICTNESS else UNKNOWN}
    if licence not in (*STRICTNESS, UNKNOWN):
        head |= {"license": "other", "license_name": licence}
    head["task_categories"] = ["text-generation"]
    head["size_categories"] = [next(name for limit, name in _SIZES if rows < limit)]
    of_kind = {"preference": ["dpo", "preference"], "sft": ["sft"]}
    head["tags"] = ["prefmix", *(tag for subset in subsets for tag in of_kind[subset])]
    head["configs"] = [
        {
            "config_name": subset,
            **({"default": True} if subset == next(iter(subsets)) else {}),
            "data_files": [{"split": split, "path": _pattern(subset, split, entry)} for split, entry in splits.items()],
        }
        for subset, splits in subsets.items()
    ]
    return head


_SIZES = [
    (10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"), (float("inf"), "100M<n<1B"),
]  # fmt: skip


def _pattern(subset: str, split: str, entry: Mapping[str, Any]) -> str:
    """The files of a split: Arrow in a folder, Parquet on the Hub."""
    return f"{subset}/{split}-*{PurePosixPath(entry['files'][0]['path']).suffix}"


def _split_rows(subsets: Mapping[str, Any]) -> Iterator[list[str]]:
    for subset, splits in subsets.items():
        for split, entry in splits.items():
            tokens = entry["tokens"]
            each = "" if tokens is None else f"{tokens / max(entry['rows'], 1):,.0f}"
            yield [subset, split, f"{entry['rows']:,}", "" if tokens is None else f"{tokens:,}", each]


def _token_counts(manifest: Mapping[str, Any]) -> list[str]:
    tokenizer = manifest["tokenizer"]
    if not tokenizer:
        return ["Tokens were not counted: the recipe names no tokenizer."]
    at = f" at `{tokenizer['revision'][:12]}`" if tokenizer["revision"] else ""
    return [f"Tokens are those of the tokenizer {tokenizer['name']}{at}."]


def _shown(lengths: Sequence[tuple[str, str, str, int, int, int]]) -> list[list[str]]:
    return [[*each[:3], *(f"{number:,}" for number in each[3:])] for each in lengths]


def _source_rows(manifest: Mapping[str, Any]) -> Iterator[list[str]]:
    for source, entry in manifest["sources"].items():
        yield [
            source,
            entry.get("hub") or _paths(entry),
            (entry["revision"] or "")[:12],
            entry["licence"],
            f"{entry['read']:,}",
            f"{entry['kept']:,}",
            _reasons(entry["dropped"]),
        ]


def _licence(manifest: Mapping[str, Any]) -> str:
    licences = {entry["licence"] for entry in manifest["sources"].values()}
    if manifest["license"] == strictest(licences):
        return f"The licence is the strictest of the sources: {manifest['license']}."
    return (
        f"The recipe sets the licence to {manifest['license']}; the strictest of the sources is {strictest(licences)}."
    )


def _about(entry: Mapping[str, Any]) -> DataCard | None:
    """What is known of a source: by its name on the Hub, else by its format."""
    if "hub" in entry:
        return next((each for each in data_cards() if entry["hub"] in each.hub), None)
    return next((each for each in data_cards() if entry["format"] in each.formats), None)


def _known_defects(manifest: Mapping[str, Any]) -> list[str]:
    """Per source with a data card: the defects that are known, and the rules against them with their rows."""
    parts: list[str] = []
    for source, entry in manifest["sources"].items():
        about = _about(entry)
        if about is None:
            continue
        reported = manifest["audit"].get(source, {}).get("reported", {})
        parts.append(f"### {source}")
        if "hub" not in entry:
            parts.append(f"Files in the format of {about.name}. If they hold rows of it, this is known of them:")
        parts.append(about.section("Known defects"))
        rules = [
            [defect, rule, reason, *(f"{_count(reason, counts):,}" for counts in (entry["dropped"], reported))]
            for defect, rule, reason, *_ in _cells(about.section("How prefmix treats them"))
        ]
        parts.append(_table(["defect", "rule", "reason", "dropped here", "reported here"], rules))
    return ["## Known defects of the sources, and what was done", *parts] if parts else []


def _count(reasons: str, counts: Mapping[str, int]) -> int:
    """The rows of the reasons that a cell names, as in `filter/tie`, `decontaminate/<benchmark>`."""
    names = [name.partition("<")[0] for name in re.findall(r"`([^`]+)`", reasons)]
    return sum(count for reason, count in counts.items() if any(_means(name, reason) for name in names))


def _means(name: str, reason: str) -> bool:
    return reason.startswith(name) if name.endswith("/") else reason == name


def _cells(section: str) -> list[list[str]]:
    """The rows of the first table of a section, without its head."""
    lines = [line for line in section.partition("\n\n")[0].splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def _how_to_load(subsets: Mapping[str, Any], repo: str | None, tag: str | None) -> list[str]:
    subset = next(iter(subsets))
    split, entry = next(iter(subsets[subset].items()))
    pattern = _pattern(subset, split, entry)
    if repo is None:
        where, folder = '"path/to/this/folder"', 'folder = "path/to/this/folder"'
        scan, prefmix = "scan_ipc", []
    else:
        where = f'"{repo}"'
        folder = f'folder = huggingface_hub.snapshot_download("{repo}", repo_type="dataset", revision="{tag}")'
        scan = "scan_parquet"
        prefmix = [f'```python\nimport prefmix\n\nmixture = prefmix.open_mixture("hub:{repo}@{tag}")\n```']
    at = f', revision="{tag}"' if repo else ""
    needed = "\nimport huggingface_hub" if repo else ""
    method = "DPO" if subset == "preference" else "SFT"
    rows = 'rows.select_columns(["prompt", "chosen", "rejected"])' if method == "DPO" else "rows"
    load = f'rows = datasets.load_dataset({where}, "{subset}", split="{split}"{at})'
    return [
        "## How to load it",
        *prefmix,
        f"```python\nimport datasets\n\n{load}\n```",
        f'```python{needed}\nimport polars\n\n{folder}\nrows = polars.{scan}(f"{{folder}}/{pattern}")\n```',
        f"With TRL, where `MODEL` is a model whose chat template is ChatML:\n\n```python\nimport datasets\n"
        f"from trl import {method}Config, {method}Trainer\n\n{load}\n"
        f'trainer = {method}Trainer(MODEL, args={method}Config("out"), train_dataset={rows})\n```',
    ]


def _use_and_limits(manifest: Mapping[str, Any]) -> list[str]:
    subsets = manifest["subsets"]
    uses = [
        *(["preference optimisation (DPO and its kin)"] if "preference" in subsets else []),
        *(["supervised fine-tuning"] if "sft" in subsets else []),
    ]
    found: dict[str, str] = {}
    for entry in manifest["sources"].values():
        about = _about(entry)
        if about is not None and "hub" in entry:
            found[about.name] = f"**{about.name}**: {' '.join(about.section('Intended use and limits').split())}"
    searched = manifest["contamination"]
    benchmarks = (
        f"Text of {', '.join(searched)} was searched for, word for word and lightly edited; other benchmarks, and questions "
        "in other words, may be inside."
        if searched
        else "No benchmark was searched for: do not report results on one without doing that."
    )
    return [
        "## Intended use and limits",
        f"For {' and '.join(uses)} of language models with ChatML. The rules above drop what can be told from a row's text "
        f"and scores; nobody has read the rows that stayed. {benchmarks}",
        *found.values(),
    ]


def _paths(entry: Mapping[str, Any]) -> str:
    path = entry["path"]
    return ", ".join(path) if isinstance(path, list) else path


def _reasons(dropped: Mapping[str, int]) -> str:
    return (
        ", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))
        or "none"
    )


def _contamination(report: Mapping[str, Any]) -> list[str]:
    """A mixture whose recipe names benchmarks says of each what was found, also when that is nothing."""
    rows = [
        [name, *(f"{entry[key]:,}" for key in ("items", "touched", "rows", "dropped"))]
        for name, entry in report.items()
    ]
    head = ["benchmark", "items", "items found", "rows that held them", "rows dropped for it"]
    return ["## Text of benchmarks", _table(head, rows)] if rows else []


def _reported(audit: Mapping[str, Any]) -> list[str]:
    rows = [
        [source, reason, f"{count:,}"]
        for source, entry in audit.items()
        for reason, count in {**entry["reported"], "repeated prompts": entry["repeated_prompts"],
                              "prompts that another source has too": entry["prompts_in_other_sources"]}.items()
        if count
    ]  # fmt: skip
    return ["## Reported, not dropped", _table(["source", "what", "rows"], rows)] if rows else []


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
