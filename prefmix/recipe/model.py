"""The keys of a recipe, with their limits, defaults and meanings.

docs/recipes.md, the JSON Schema and the error messages are made from these models: a key exists when it is here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic.json_schema import SkipJsonSchema

from prefmix.recipe.checks import contradictions
from prefmix.recipe.problems import dotted

Text = Annotated[str, Field(min_length=1)]
#: A recipe or stage is also a folder.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
#: `datasets` takes only word characters in a split's name.
SplitName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
Language = Annotated[str, Field(pattern=r"^[a-z]{2}$")]
HubName = Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0)]
#: Tables whose order means nothing have one order, so that nothing downstream can depend on it.
Sorted = AfterValidator(lambda table: dict(sorted(table.items())))
Rule = Literal["drop", "report", "off"]
Loss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


class Keys(BaseModel):
    """A table of a recipe: frozen, every key known, `"1"` is not a number and `true` is not 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Source(Keys):
    """One upstream data set. The order of the sources is their priority: the earlier one wins a duplicate."""

    format: Text | None = Field(
        None,
        description="Format of the rows (`prefmix sources` lists them); found from the columns when it is missing.",
    )
    hub: HubName | None = Field(None, description="Data set on the Hub, as owner/name. Either this or `path`.")
    path: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        None,
        description="File or glob pattern, or a list of them, relative to the recipe: jsonl, json, csv, parquet or "
        "arrow, plain, .gz or .zst. Either this or `hub`.",
    )
    revision: Text = Field("main", description="Branch, tag or commit on the Hub; resolved to a commit and recorded.")
    columns: dict[Text, Text] = Field(
        {}, description="Renames: column that the format expects = column that the data has."
    )
    split: Text | None = Field(None, description="Read only this split of the data set.")
    where: Text | None = Field(
        None, description="Keep only rows for which this Polars SQL condition on their columns is true."
    )
    exclude: Text | None = Field(
        None, description="File with an `id` column, relative to the recipe: rows to leave out."
    )
    take: Count | Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Use at most this many (a whole number) or this fraction (a number with a point) of the rows that "
        "survive, chosen by a hash of their ids.",
    )
    repeat: Positive = Field(1, description="How many times each row is in the mixture.")
    license: Text | None = Field(None, description="Licence of the data. Absent: what prefmix knows of the data set.")
    options: dict[Text, str | int | float | bool] = Field(
        {}, description="Settings of the format; see `prefmix sources`."
    )


class Chars(Keys):
    """A limit on characters, by part of a row."""

    prompt: Count | None = Field(None, description="The prompt.")
    answer: Count | None = Field(None, description="Each of the answers.")
    total: Count | None = Field(None, description="The prompt and the longer answer.")


def _answer_chars(value: object) -> object:
    return {"answer": value} if type(value) is int else value


CharLimit = Annotated[Chars, BeforeValidator(_answer_chars, json_schema_input_type=Count | Chars)]


class Filter(Keys):
    """Rules on single rows: "drop" removes a row, "report" counts it, "off" does not look.

    With `default = "off"` the rules that are not named are off, and their attributes say so: an attribute is always
    the value in force.
    """

    default: Literal["on", "off"] = Field("on", description='"off" turns off every rule that is not named.')
    empty: Rule = Field("drop", description="An empty prompt or answer.")
    identical: Rule = Field("drop", description="Chosen equals rejected after normalisation.")
    min_margin: float | Literal["report", "off"] = Field(
        0.0,
        description="Keep a pair if chosen_score - rejected_score is above this: at 0.0 ties go. Pairs without scores "
        'stay. "report" counts the ties.',
    )
    on_inverted: Literal["drop", "swap", "report", "off"] = Field(
        "drop", description='The rejected answer has the higher score. "swap" exchanges the two and records it.'
    )
    roles: Rule = Field("drop", description="Roles in an order that no conversation has.")
    injection: Literal["drop", "strip", "report", "off"] = Field(
        "drop", description='Special tokens of the template inside a content. "strip" takes them out and records it.'
    )
    refusals: Rule = Field("drop", description="The answer that is trained towards refuses.")
    disclaimers: Rule = Field(
        "report", description="The answer that is trained towards says that it has no real-time data or cannot browse."
    )
    placeholders: Rule = Field("report", description="Text that was to be filled in: {{name}}, [insert ...].")
    cut_off: Rule = Field("report", description="An answer that ends in the middle.")
    languages: list[Language] = Field(
        [], description='Drop rows in other languages (ISO 639-1): `["en"]`. Empty: keep all.'
    )
    min_score: float | None = Field(
        None, description="Drop pairs whose chosen answer scores less. Pairs without scores stay."
    )
    min_chars: CharLimit | None = Field(
        None, description="Drop shorter rows: one number for each answer, or { prompt, answer, total }."
    )
    max_chars: CharLimit | None = Field(
        None, description="Drop longer rows: one number for each answer, or { prompt, answer, total }."
    )
    max_length_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Drop pairs whose chosen answer has more than this many times the characters of the rejected one.",
    )
    max_prompt_tokens: Positive | None = Field(None, description="Drop longer prompts. Needs `format.tokenizer`.")
    max_answer_tokens: Positive | None = Field(
        None, description="Drop rows with a longer answer. Needs `format.tokenizer`."
    )
    max_tokens: Positive | None = Field(
        None, description="Drop rows whose prompt and longer answer are longer together. Needs `format.tokenizer`."
    )

    @model_validator(mode="before")
    @classmethod
    def _unnamed_rules_off(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("default") != "off":
            return data
        return {**dict.fromkeys(RULES, "off"), **data}


#: The rules that `filter.default` speaks for; all others are off unless given.
RULES = (
    *("empty", "identical", "min_margin", "on_inverted", "roles", "injection"),
    *("refusals", "disclaimers", "placeholders", "cut_off"),
)


class Near(Keys):
    """Near-duplicates are dropped too; `near = {}` takes the defaults, without `near` nothing is compared.

    MinHash proposes pairs, the exact Jaccard similarity of the sets of distinct shingles decides.
    """

    threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity from which two rows are duplicates.")
    shingle: Positive = Field(5, description="Length of a shingle, in `shingle_unit`s.")
    shingle_unit: Literal["word", "char"] = Field("word", description="What a shingle is made of.")
    permutations: Positive = Field(128, description="Length of a MinHash signature.")
    recall: float = Field(
        0.99, gt=0, lt=1, description="Share of the pairs at the threshold to be proposed; the bands follow from it."
    )
    on: Literal["prompt", "prompt+chosen", "chosen", "messages"] = Field(
        "prompt+chosen", description="The text that is compared; for sft rows, the prompt, the last answer or both."
    )


class Dedupe(Keys):
    """Duplicates within and across the sources."""

    exact: Literal["pair", "prompt", "off"] = Field(
        "pair", description='Drop rows with equal contents ("pair") or with equal prompts ("prompt").'
    )
    prompt_cap: Positive | None = Field(None, description="Keep at most this many pairs of one prompt.")
    near: Near | None = Field(None, description="Near-duplicates.")
    across: bool = Field(False, description="Also drop an sft row that repeats a preference row.")


class Against(Keys):
    """A benchmark of your own to decontaminate against.

    A field is a column of texts or of lists of texts; numbers are no texts. A dotted path names a key of the objects
    in a column: `choices.text`. Where the column is a list of objects, each of them is a question of its own:
    `examples.input`.
    """

    path: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="File or glob pattern, or a list of them, relative to the recipe. Either this or `hub`."
    )
    hub: HubName | None = Field(None, description="Data set on the Hub, as owner/name. Either this or `path`.")
    revision: Text = Field("main", description="Branch, tag or commit on the Hub; resolved to a commit and recorded.")
    config: Text | None = Field(None, description="Configuration (subset) of the data set on the Hub.")
    split: Text | None = Field(
        None,
        description="Read only this split. Absent: every file of `path`; on the Hub `test`, or the only split there is.",
    )
    fields: Annotated[list[Text], Field(min_length=1)] = Field(description="Columns that hold the benchmark's text.")


class Decontaminate(Keys):
    """Rows that hold text of a benchmark are dropped. Without `suites` and `against` nothing is looked for."""

    ngram: Positive = Field(13, description="Words in a row that must agree.")
    suites: list[Text] = Field(
        [],
        description="Benchmarks by name, read from the Hub: truthfulqa, agieval, bbh, gpt4all, gsm8k, gsm8k_train, "
        "mt_bench, mmlu, humaneval.",
    )
    against: Annotated[dict[SourceName, Against], Sorted] = Field(
        {}, description="Benchmarks of your own, by a name of your choice."
    )
    answers: bool = Field(False, description="Search the answers as well as the prompt.")


class Format(Keys):
    """How rows are written into the mixture."""

    template: Literal["chatml"] = Field("chatml", description="The chat template.")
    layout: Literal["text", "messages"] = Field("text", description="Rendered strings, or lists of messages.")
    system: Text = Field(
        "keep", description='System messages: "keep", "drop", or a text that is used where a row has none.'
    )
    tokenizer: Text | None = Field(
        None,
        description="Tokenizer that counts tokens: Hub name, or folder relative to the recipe. Absent: no counts.",
    )
    tokenizer_revision: Text = Field("main", description="Branch, tag or commit of the tokenizer on the Hub.")


class Mix(Keys):
    """How much of each source. Without shares everything that survives is kept."""

    preference: dict[SourceName, Share] | None = Field(
        None, description="Shares of the pairs by source, in any unit. Every source of pairs is named; 0 leaves it out."
    )
    sft: dict[SourceName, Share] | None = Field(None, description="Shares of the sft rows by source, likewise.")
    preference_rows: Positive | None = Field(
        None,
        description="Number of pairs in all. Absent: as many as the scarcest source allows, or all without shares.",
    )
    sft_rows: Positive | None = Field(None, description="Number of sft rows in all, likewise.")
    allow_repeat: bool = Field(False, description="Let rows of a scarce source repeat to reach the number of rows.")


class Lora(Keys):
    """The adapter."""

    r: Positive = Field(64, description="Rank.")
    alpha: float = Field(64.0, gt=0, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = Field(
        0.05, ge=0, lt=1, description="Dropout on the adapter's input in sft stages; dpo runs without, as in TRL."
    )
    target: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        "all-linear", description='Modules that get an adapter: "all-linear" or a list of names.'
    )


class Eos(Keys):
    """The gate on ending a turn: measured at every stage, judged after the last one."""

    min_stop_rate: float = Field(0.95, ge=0, le=1, description="Share of the prompts whose answer must end by itself.")
    on_fail: Literal["warn", "stop", "repair"] = Field(
        "warn", description='"stop" ends with exit code 3; "repair" runs the sft stages marked `if_needed`.'
    )
    prompts: Positive = Field(64, description="Prompts that are answered to measure it.")
    max_new_tokens: Positive = Field(256, description="Length at which an answer counts as not ended.")


class Stage(Keys):
    """One training stage; the next one starts from its adapter."""

    name: Name = Field(description="Name of the stage and of its folder.")
    method: Literal["dpo", "sft"] = Field(description="How the stage trains.")
    subset: Literal["preference", "sft"] = Field(description="The rows that the method reads.")
    epochs: float = Field(1.0, gt=0, description="Passes over the rows; may be a fraction.")
    max_steps: Positive | None = Field(None, description="Optimiser steps; wins over `epochs`.")
    rows: Positive | None = Field(None, description="Use at most this many rows.")
    batch_size: Positive = Field(32, description="Rows per optimiser step, over all GPUs and accumulation.")
    token_budget: Literal["auto"] | Positive = Field(
        "auto", description="Tokens per micro-batch: changes speed and memory, never the step."
    )
    learning_rate: float = Field(5e-6, gt=0, description="Highest learning rate.")
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="Course of the learning rate.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    max_length: Positive = Field(
        2048, description="Longest prompt and answer, in tokens; the prompt is cut at its start, the answer never."
    )
    eval_every: Positive | None = Field(None, description="Evaluate every so many steps. Absent: at the end.")
    checkpoint_every: Positive | None = Field(
        None, description="Save a checkpoint every so many steps. Absent: at the end."
    )
    eval: list[Text] = Field(
        [],
        description="Benchmarks that the trained stage is evaluated on, as `prefmix eval` takes them: agieval, bbh, gpt4all, "
        "truthfulqa, gsm8k, reference or tasks of lm-evaluation-harness.",
    )


class DpoStage(Stage):
    """Direct preference optimisation on the preference subset."""

    method: Literal["dpo"] = Field(description="How the stage trains.")
    subset: Literal["preference"] = Field("preference", description="The rows that the method reads.")
    beta: float = Field(0.1, gt=0, description="How strongly the model is held to its reference.")
    loss: Loss | Annotated[list[Loss], Field(min_length=1)] = Field(
        "sigmoid", description="Loss, or a list that is summed."
    )
    loss_weights: list[float] | None = Field(None, description="One weight per loss. Absent: 1 each.")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of the labels taken to be wrong; read by robust, exo_pair, aot and aot_unpaired.",
    )


class SftStage(Stage):
    """Supervised fine-tuning on the answers of the sft subset."""

    method: Literal["sft"] = Field(description="How the stage trains.")
    subset: Literal["sft"] = Field("sft", description="The rows that the method reads.")
    if_needed: bool = Field(False, description='Run only when the EOS gate fails and `train.eos.on_fail` is "repair".')


def _method(stage: object) -> str:
    method = stage.get("method") if isinstance(stage, dict) else getattr(stage, "method", None)
    return (
        "sft" if method == "sft" else "dpo"
    )  # a wrong method is then reported at its key, with the stage's other keys


AnyStage = Annotated[Annotated[DpoStage, Tag("dpo")] | Annotated[SftStage, Tag("sft")], Discriminator(_method)]


class Train(Keys):
    """What `prefmix train` does; never part of the mixture's digest."""

    base: Text = Field(description="Base model: Hub name or folder (relative to the recipe).")
    base_revision: Text = Field("main", description="Branch, tag or commit of the base model on the Hub.")
    output: Text = Field("runs", description="Folder for the runs, relative to the current directory.")
    quantization: Literal["nf4", "none"] = Field("nf4", description="Base weights in 4 bits (qLoRA) or as they are.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="What is computed in. auto: bfloat16 on a GPU or a CPU with AMX, float32 on other CPUs."
    )
    adapter: Literal["lora", "none"] = Field("lora", description='"none" trains all weights; not with nf4.')
    lora: Lora = Field(Lora(), description="The adapter.")
    add_tokens: bool = Field(
        False, description="Add ChatML's tokens to a base that lacks them; their embeddings are trained and saved."
    )
    packing: Literal["auto"] | bool = Field(
        "auto", description="Many rows in one sequence, the prompt of a pair once. auto: where the model allows it."
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="Compute activations again instead of keeping them. auto: when memory asks for it."
    )
    eos: Eos = Field(Eos(), description="The gate on ending a turn.")
    stages: Annotated[list[AnyStage], Field(min_length=1)] = Field(description="Training stages, in order.")


class Recipe(Keys):
    """A mixture and how it is made. Inputs are relative to `root`, the folder of the recipe's file."""

    name: Name = Field(description="Name of the mixture.")
    seed: int = Field(42, ge=0, lt=2**63, description="Where all randomness comes from.")
    license: Text | None = Field(None, description="Licence of the mixture. Absent: the strictest of its sources.")
    root: Path = Field(
        default_factory=Path.cwd,
        description="Folder that inputs are relative to; written into a mixture's recipe. Absent: the recipe's folder.",
    )
    path: SkipJsonSchema[Path | None] = Field(None, exclude=True, description="The recipe's file; not a key of it.")
    sources: Annotated[dict[SourceName, Source], Field(min_length=1)] = Field(
        description="The data sets by a name of your choice, in the order of their priority."
    )
    filter: Filter = Field(Filter(), description="Rules on single rows.")
    dedupe: Dedupe = Field(Dedupe(), description="Duplicates.")
    decontaminate: Decontaminate = Field(Decontaminate(), description="Text of benchmarks.")
    format: Format = Field(Format(), description="How rows are written.")
    mix: Mix = Field(Mix(), description="How much of each source.")
    splits: Annotated[dict[SplitName, Annotated[float, Field(ge=0, lt=1)]], Sorted] = Field(
        {"test": 0.02},
        description="Shares of the rows held out, by split; the rest is `train`. 0 makes no such split.",
    )
    train: Train | None = Field(None, description="What `prefmix train` does.")

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        found = [
            f"{dotted(f.path)}: {f.message}"
            for f in contradictions(self.model_dump(exclude_unset=True, exclude_none=True))
        ]
        if found:
            raise ValueError("\n".join(found))
        return self

    def digest(self, revisions: Mapping[str, str] | None = None) -> str:
        """64 hex digits: SHA-256 of what the mixture is asked to be, all defaults included, as canonical JSON.

        `revisions` gives the commit that a revision was resolved to, by source name, `tokenizer` for the tokenizer and
        `against.<name>` for a benchmark. The order of the sources counts (it is their priority), that of other keys
        does not; `train`, `root` and `path` are left out.
        """
        data = self._resolved(revisions or {})
        del data["root"], data["train"]
        data["sources"] = list(data["sources"].items())
        text = json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_toml(self, revisions: Mapping[str, str] | None = None) -> str:
        """The resolved recipe: every default spelled out, paths as written plus `root`, `revisions` as in `digest`."""
        import tomli_w

        return tomli_w.dumps(_without_nothing(self._resolved(revisions or {})))

    def _resolved(self, revisions: Mapping[str, str]) -> dict[str, Any]:
        """The recipe as JSON data; a revision that nothing reads is left out."""
        data = self.model_dump(mode="json")
        against = {f"against.{name}": table for name, table in data["decontaminate"]["against"].items()}
        for name, table in {**data["sources"], **against}.items():
            table["revision"] = revisions.get(name, table["revision"]) if table["hub"] else None
        table = data["format"]
        revision = revisions.get("tokenizer", table["tokenizer_revision"])
        table["tokenizer_revision"] = revision if table["tokenizer"] else None
        return data


def portable(toml: str) -> str:
    """A resolved recipe without the folder that it lay in, which is no concern of others."""
    return re.sub(r"^root = .*\n", "", toml, count=1, flags=re.M)


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value
