"""What a command is pointed at: a model, or a run of `prefmix train` whose last stage is meant.

found = find_model("runs/smollm2")        # or runs/smollm2/dpo, a folder of weights, user/model@revision
model, tokenizer = load_model(found)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from prefmix.errors import ModelError, TrainError
from prefmix.stages import RUN, last_stage, read_record, stages_of
from prefmix.train.weights import Base, DType, Quantization, find_base, load_adapter, load_base, native_dtype

_WHOLE, _ADAPTER = "config.json", "adapter_config.json"


@dataclass(frozen=True)
class Found:
    """A model that can be loaded.

    `weights` has whole weights, or it is the base of `adapter`. `stage` is the folder of a finished stage and `run` its
    run.json, where the model is one. `quantization` and `dtype` are those that it was trained in; a model that is not
    from a run is loaded as it is, in what this machine computes best in.
    """

    name: str
    weights: Base
    adapter: Path | None
    stage: Path | None
    run: Mapping[str, Any] | None
    quantization: Quantization
    dtype: DType


def find_model(reference: str | Path, base: str | None = None) -> Found:
    """Finds the model of a run, of a stage, of a folder (whole weights, or an adapter alone) or of the Hub
    (`user/model`, `user/model@revision`).

    `base` is the folder of an adapter's base, where it is not found by the name that the run knows it by.
    Raises ModelError when there is none, when a stage has not ended or when the base is missing; HubError.
    """
    folder = Path(reference)
    if stages_of(folder):
        return _of_stage(last_stage(folder), base)
    if (folder / _ADAPTER).is_file():
        return _adapted(str(reference), folder, None, {}, base)
    if base is not None:
        raise ModelError(f"{reference} is no adapter, so it has no base: leave --base out.")
    try:
        if (folder / _WHOLE).is_file():
            found = find_base(str(reference), "main", Path())
        elif folder.is_dir() or str(reference).count("/") != 1 or str(reference).startswith((".", "/")):
            raise ModelError(f"{reference} is neither a run nor a model: a run folder has stages with a run.json, a model "
                             f"a config.json, and one on the Hub is called user/model.")  # fmt: skip
        else:
            name, _, revision = str(reference).partition("@")
            found = find_base(name, revision or "main", Path())
    except TrainError as error:
        raise ModelError(str(error)) from error
    return Found(str(reference), found, None, None, None, "none", native_dtype())


def _of_stage(stage: Path, base: str | None) -> Found:
    run = read_record(stage / RUN)
    weights = stage / "adapter"
    settings = run["hyperparameters"]
    if (weights / _ADAPTER).is_file():
        return _adapted(str(stage), weights, stage, run, base)
    if not (weights / _WHOLE).is_file():
        raise ModelError(
            f"{weights} has neither an adapter nor a model. Run the stage again with `prefmix train --force`."
        )
    found = find_base(str(weights), "main", Path())
    return Found(str(stage), found, None, stage, run, "none", settings["dtype"])


def _adapted(name: str, adapter: Path, stage: Path | None, run: Mapping[str, Any], base: str | None) -> Found:
    try:
        settings = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{adapter / _ADAPTER} cannot be read ({error}).") from error
    asked = base or settings.base_model_name_or_path
    if not asked:
        raise ModelError(f"{adapter / _ADAPTER} does not name its base: give it with --base.")
    home = _home(asked, adapter)
    try:
        found = find_base(asked, "main" if base else settings.revision or "main", home)
    except TrainError as error:
        raise ModelError(f"{error}. Give the folder of the base of {name} with --base.") from error
    trained = run.get("hyperparameters", {})
    return Found(
        name,
        found,
        adapter,
        stage,
        run or None,
        trained.get("quantization", "none"),
        trained.get("dtype", native_dtype()),
    )


def _home(base: str, adapter: Path) -> Path:
    """The folder that a base's name is relative to: a run lies below the folder that it was started in."""
    return next((place for place in [Path(), *adapter.resolve().parents] if (place / base).is_dir()), Path())


def load_model(found: Found) -> tuple[Any, PreTrainedTokenizerFast]:
    """The model as it was trained, in eval mode on this machine's device, and its tokenizer.

    Raises ModelError for weights that cannot be loaded and for an adapter of another base.
    """
    tokenizer = load_tokenizer(found)
    try:
        vocabulary = len(tokenizer) if found.adapter else None
        model: Any = load_base(found.weights, found.quantization, found.dtype, vocabulary)
        if found.adapter:
            model = get_peft_model(model, PeftConfig.from_pretrained(str(found.adapter)))
            load_adapter(model, found.adapter)
    except TrainError as error:
        raise ModelError(str(error)) from error
    except ValueError as error:  # PEFT: the base has no module that the adapter is for
        raise ModelError(
            f"{found.adapter} is the adapter of another base than {found.weights.name}: {error}"
        ) from error
    model.config.use_cache = True
    return model.eval(), tokenizer


def load_tokenizer(found: Found) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, with its own chat template if it has one. Raises ModelError."""
    folder, commit = (str(found.adapter), None) if found.adapter else (found.weights.path, found.weights.commit)
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, revision=commit or "main")
    except Exception as error:  # the library raises a bare Exception for a broken file
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{folder} has no tokenizer.json that can be read ({reason}).") from error
