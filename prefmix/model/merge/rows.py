"""Rows to compare a merge with its adapter on: the last held-out ones of the mixture that a run was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl
from transformers import PreTrainedTokenizerBase

from prefmix.chatml import ANSWER_HEADER, END, START, render, render_answer, render_prompt
from prefmix.errors import ModelError
from prefmix.mixture import Mixture
from prefmix.model.merge.agreement import Rows
from prefmix.publish import open_mixture
from prefmix.store import Store

#: So many rows, and of each so many tokens: a log-probability is kept for every answer token and word of the vocabulary.
_ROWS, _PROMPT_TOKENS, _ANSWER_TOKENS = 8, 448, 64

_OWN = [
    ("Why does a kettle whistle?", "Steam is pressed through a small gap in the lid, and the gap sings."),
    ("What is 17 times 6?", "17 times 6 is 10 times 6 plus 7 times 6, which is 60 + 42 = 102."),
    ("Write a function that reverses a list in Python.", "def reversed_list(items):\n    return items[::-1]"),
    ("Name three things that float.", "1. A cork\n2. An apple\n3. Most kinds of wood"),
]


def rows_of(
    run: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase, mixture: str | None, store: str | None
) -> Rows:
    """Rows of the mixture that is named, else of the one that run.json names when the store has it, else four
    conversations of prefmix's own. Of a mixture they are the last ones of its split test (else train), of the subset that
    the stage was trained on; a long prompt loses its beginning and a long answer its end.

    Raises ModelError when none of the rows has an answer; MixtureError when there is no mixture of the name; HubError.
    """
    found = open_mixture(mixture, store) if mixture else _trained_on(run, store)
    if found is None:
        texts = [(f"{START}user\n{question}{END}\n{ANSWER_HEADER}", f"{answer}{END}") for question, answer in _OWN]
        source = f"{len(_OWN)} conversations of prefmix's own"
    else:
        asked = run["hyperparameters"]["subset"] if run else None
        subset = asked if asked in found.splits else next(iter(found.splits))
        split = "test" if "test" in found.splits[subset] else "train"
        texts = _texts(found, subset, split)
        source = f"{len(texts)} rows of {found} ({subset}, {split})"
    prompts, answers = [], []
    for prompt, answer in texts:
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        prompts.append(ids[:start][-_PROMPT_TOKENS:])
        answers.append(ids[start:][:_ANSWER_TOKENS])
    if not all(answers) or not answers:
        raise ModelError(f"{source}: there is no answer to compare models on. Name another mixture with --mixture.")
    return Rows(prompts, answers, source)


def _trained_on(run: Mapping[str, Any] | None, store: str | None) -> Mixture | None:
    """The mixture that a run was trained on, whatever its version is called now; None where the store does not have it."""
    if run is None:
        return None
    name, shelf = run["mixture"]["name"], Store(store)
    labels = [label for label, entry in shelf.versions(name).items() if entry["digest"] == run["mixture"]["digest"]]
    return shelf.find(name, labels[-1]) if labels else None


def _texts(mixture: Mixture, subset: Any, split: str) -> list[tuple[str, str]]:
    """`(prompt, answer)` in ChatML of the last rows of a split, whichever layout the mixture has."""
    rows = mixture.scan(subset, split).tail(_ROWS).collect()
    if subset == "preference":
        if rows.schema["prompt"] != pl.String:
            rows = rows.select(prompt=render_prompt(pl.col("prompt")), chosen=render_answer(pl.col("chosen")))
        return list(rows.select("prompt", "chosen").iter_rows())
    texts = rows["text"] if "text" in rows.columns else rows.select(render(pl.col("messages"))).to_series()
    parts = [text.rpartition(ANSWER_HEADER) for text in texts]
    return [(before + header, answer) for before, header, answer in parts]
