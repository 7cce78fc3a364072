"""The data card of a mixture: README.md with the YAML that `datasets` and the Hub read, made from the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def card(manifest: Mapping[str, Any]) -> str:
    """README.md of a mixture."""
    name, subsets = manifest["name"], manifest["subsets"]
    rows = {subset: sum(entry["rows"] for entry in splits.values()) for subset, splits in subsets.items()}
    licence = manifest["license"]
    front: dict[str, Any] = {"pretty_name": name, "license": licence if licence in STRICTNESS else UNKNOWN}
    if licence not in (*STRICTNESS, UNKNOWN):
        front |= {"license": "other", "license_name": licence}
    front["tags"] = [
        "prefmix",
        *(["dpo", "preference"] if "preference" in subsets else []),
        *(["sft"] if "sft" in subsets else []),
    ]
    front["configs"] = [
        {
            "config_name": subset,
            **({"default": True} if subset == next(iter(subsets)) else {}),
            "data_files": [{"split": split, "path": f"{subset}/{split}-*.arrow"} for split in splits],
        }
        for subset, splits in subsets.items()
    ]
    first = next(iter(subsets))
    first_split = next(iter(subsets[first]))
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"A mixture of {' and '.join(f'{count:,} {subset} rows' for subset, count in rows.items())}, made with prefmix "
        f"{manifest['tools']['prefmix']}. Digest `{manifest['digest']}`.",
        "## What is inside",
        _table(
            ["subset", "split", "rows", "tokens"],
            [
                [subset, split, f"{entry['rows']:,}", "" if entry["tokens"] is None else f"{entry['tokens']:,}"]
                for subset, splits in subsets.items()
                for split, entry in splits.items()
            ],
        ),
        "## Sources",
        _table(
            ["source", "from", "revision", "licence", "read", "kept", "dropped"],
            [
                [
                    source,
                    entry.get("hub") or _paths(entry),
                    (entry["revision"] or "")[:12],
                    entry["licence"],
                    f"{entry['read']:,}",
                    f"{entry['kept']:,}",
                    _reasons(entry["dropped"]),
                ]
                for source, entry in manifest["sources"].items()
            ],
        ),
        "Every row that was read is either here or in `drops/drops.parquet` with its reason; rows that were changed "
        "(swapped, stripped of special tokens) are in `drops/changes.parquet`.",
        "## From rows read to rows kept",
        _table(
            ["stage", "in", "dropped", "out"],
            [
                [stage["stage"], f"{stage['in']:,}", _reasons(stage["dropped"]), f"{stage['out']:,}"]
                for stage in manifest["funnel"]
            ],
        ),
        *_contamination(manifest["contamination"]),
        *_reported(manifest["audit"]),
        "## How to load it",
        "```python\nimport datasets\n\n"
        f'rows = datasets.load_dataset("path/to/this/folder", "{first}", split="{first_split}")\n```',
        f'```python\nimport polars\n\nrows = polars.scan_ipc("path/to/this/folder/{first}/{first_split}-*.arrow")\n```',
        "## How to build it again",
        "```\nprefmix build recipe.toml\n```",
        f"`recipe.toml` is the recipe with every default spelled out; its digest is `{manifest['recipe_digest']}`.",
    ]
    return "\n\n".join(sections) + "\n"


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
