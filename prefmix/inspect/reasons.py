"""The reasons and their evidence in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

#: What a reason says of a row, as the end of "it is not in the mixture: ...".
SENTENCES = {
    "source/invalid": "the row does not fit the format of its source",
    "source/where": "the condition `where` of its source is not true for it",
    "source/excluded": "its id is in the file that its source excludes",
    "filter/injection": "a content holds a special token of a chat template",
    "filter/empty": "a turn is empty",
    "filter/roles": "the roles are in an order that no conversation has",
    "filter/identical": "chosen and rejected are the same text",
    "filter/inverted": "the rejected answer has the higher score",
    "filter/tie": "chosen and rejected have the same score",
    "filter/margin": "the score of chosen is not far enough above that of rejected",
    "filter/min_score": "the score of chosen is below the minimum",
    "filter/refusal": "the answer that is trained towards refuses",
    "filter/disclaimer": "the answer that is trained towards says that it has no real-time data",
    "filter/placeholder": "a placeholder was never filled in",
    "filter/cut_off": "the answer that is trained towards ends in the middle",
    "filter/language": "the answer that is trained towards is in another language",
    "filter/min_chars": "the row is shorter than the recipe allows",
    "filter/max_chars": "the row is longer than the recipe allows",
    "filter/max_length_ratio": "chosen is too many times as long as rejected",
    "filter/max_prompt_tokens": "the prompt has more tokens than the recipe allows",
    "filter/max_answer_tokens": "an answer has more tokens than the recipe allows",
    "filter/max_tokens": "prompt and answer together have more tokens than the recipe allows",
    "decontaminate": "it holds text of a benchmark",
    "dedupe/pair": "it is a copy of another row",
    "dedupe/prompt": "another row has the same prompt",
    "dedupe/prompt_cap": "enough other rows have the same prompt",
    "dedupe/near": "its text is nearly that of another row",
    "mix/not_sampled": "the recipe takes fewer rows of its source",
}

_PARTS = {"prompt": "the prompt", "messages": "a message", "answer": "the answer"}


def sentence(reason: str) -> str:
    """What a reason says, in words; a reason of another package is its own name."""
    stage, _, benchmark = reason.partition("/")
    return f"it holds text of the benchmark {benchmark}" if stage == "decontaminate" else SENTENCES.get(reason, reason)


def evidence(reason: str, detail: str | None) -> str:
    """The evidence of a ledger row (or of a change) in words; empty where it has none.

    Example: `{"chosen_score":2.5,"rejected_score":4.25}` is "chosen 2.5, rejected 4.25".
    """
    if detail is None:
        return ""
    try:
        facts = json.loads(detail)
    except ValueError:
        return detail
    return _words(reason, facts) if isinstance(facts, dict) else detail


def matching(reason: str | None, present: Mapping[str, int]) -> list[str]:
    """The reasons that `reason` means: itself, or all of a stage (`filter`). All that are present for None.

    Raises LookupError, with what would be right, when it is no reason that prefmix knows and no row has it.
    """
    if reason is None:
        return list(present)
    stage = reason.rstrip("/")
    found = [each for each in present if each == reason or each.partition("/")[0] == stage]
    known = [*present, *SENTENCES]
    benchmark = reason.startswith("decontaminate/")  # whose name only the recipe knows
    if not found and not benchmark and reason not in known and stage not in {each.partition("/")[0] for each in known}:
        near = get_close_matches(reason, known, n=1)
        raise LookupError(f"there is no reason {reason}{f' (did you mean {near[0]}?)' if near else ''}")
    return found


def _words(reason: str, facts: Mapping[str, Any]) -> str:
    match facts:
        case {"error": error, **rest}:
            place = ", ".join(f"{key} {rest[key]:,}" for key in ("line", "column") if isinstance(rest.get(key), int))
            text = f": {rest['text']}" if rest.get("text") else ""
            return f"{f'{place}: ' if place else ''}{error}{text}"
        case {"chosen_score": chosen, "rejected_score": rejected}:
            return f"chosen {_number(chosen)}, rejected {_number(rejected)}"
        case {"tokens": list(tokens)}:
            return "holds " + ", ".join(tokens)
        case {"tokens": int(tokens), "limit": limit}:
            return f"{tokens:,} tokens, limit {limit:,}"
        case {"item": item, "rule": rule, "coverage": float(coverage), "part": part, "text": text}:
            return f"{_PARTS.get(part, part)} holds {coverage:.0%} of {item} ({rule}): “{text}”"
        case {"part": part, "characters": count, "limit": limit}:
            return f"{part}: {count:,} characters, limit {limit:,}"
        case {"part": part}:
            return f"{_PARTS.get(part, part)} is empty"
        case {"opening": opening}:
            return f"“{opening}”"
        case {"ending": ending}:
            return f"“… {ending}”"
        case {"copies": copies}:
            return f"{copies:,} rows with the same {'prompt' if 'prompt' in reason else 'content'}"
        case {"jaccard": float(jaccard)}:
            return f"Jaccard similarity {jaccard:.3f}"
        case {"rows": rows, "wanted": wanted}:
            return f"{wanted:,} rows wanted of {rows:,}"
    return ", ".join(f"{key} {_number(value)}" for key, value in facts.items())


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
