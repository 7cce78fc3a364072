"""`prefmix merge`: the adapter of a run into its base, as a model of its own.

<stage>/merged/
  model.safetensors        bf16; of a large model, shards (model-00001-of-0000N.safetensors) and their index
  config.json, generation_config.json, the tokenizer with its ChatML template
  merge.json               of what it was made, and how far it is from the adapter on its base

Memory holds one shard, beside the tensor that is computed: no model is loaded for the merging. The folder is written
beside its place and renamed when it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers.utils.logging

from prefmix.errors import ModelError, TrainError
from prefmix.model.find import Found, load_tokenizer
from prefmix.model.merge.agreement import WRONG_KL, Difference, Rows, Trained, as_trained, difference
from prefmix.model.merge.beside import write_beside
from prefmix.model.merge.place import RECORD, alone, put, writing
from prefmix.model.merge.stored import Progress, Stored, base_folder, bytes_of, weight_files, write_weights
from prefmix.model.merge.tensors import MergedTensors, read_adapter
from prefmix.train.records import now, read_json, sha256_of, write_json

SHARD_BYTES = 10**9
_BESIDE_BYTES = 64 * 2**20  # the tokenizer, and whatever else is written to the disk meanwhile


@dataclass(frozen=True)
class Check:
    """How far the merge is from the model that was trained, on the answers of `rows` rows: `fp32` before its weights were
    rounded, `bf16` as they were saved."""

    source: str
    rows: int
    tokens: int
    fp32: Difference
    bf16: Difference


@dataclass(frozen=True)
class Merged:
    """A merged model: its folder, the bytes and the number of its weight files, what was found when it was checked (None
    where it was not). `is_new` is false for one that was there."""

    folder: Path
    bytes: int
    shards: int
    check: Check | None
    is_new: bool


def merge(
    found: Found,
    out: Path | None = None,
    *,
    rows: Rows | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda what, done, total: None,
) -> Merged:
    """Merges an adapter into its base: `<stage>/merged`, unless `out` names another folder.

    With `rows` the merge is compared with the adapter on its base, and refused when it is another model. A folder that
    holds the merge of this very adapter stays as it is (it is checked where it was not); `force` replaces any other merge.

    Raises ModelError for a model without an adapter, an adapter of another base or kind, a base without safetensors, a
    folder that is there, a disk that is full, a merge that is not the model that was trained; HubError.
    """
    if found.adapter is None:
        raise ModelError(
            f"{found.name} has no adapter to merge: its weights are whole already, in {found.weights.path}."
        )
    out = out or place_of(found)
    transformers.utils.logging.disable_progress_bar()
    with writing(out), alone(out) as staged:
        about = _about(found, found.adapter)
        there = _known(out, about)
        if there and (there.check or rows is None):
            return there
        if there is None:
            _check_place(out, force)
        base = base_folder(found.weights)
        tokenizer = load_tokenizer(found)
        adapter = read_adapter(found.adapter)
        weights = MergedTensors(base, found.weights.config, adapter, found.quantization, found.dtype)
        if there is None:
            _check_room(out, weights, len(tokenizer))
        before = _compared(found, weights, rows, progress) if rows else None
        folder = out if there else staged
        if there is None:
            write_weights(weights, weights.shapes, staged, shard_bytes, progress)
            write_beside(staged, base, found.adapter, tokenizer, weights.vocabulary)
        check = _checked(found, folder, rows, before, progress) if rows and before else None
        files = {path.name: path.stat().st_size for path in weight_files(folder)}
        made = {"files": files, "check": check and asdict(check), "created": now(), "prefmix": version("prefmix")}
        write_json(folder / RECORD, {**about, **made})
        if there is None:
            put(staged, out)
    return Merged(out, sum(files.values()), len(files), check, is_new=there is None)


def place_of(found: Found) -> Path:
    """Where the merge of a run's stage, or of an adapter alone, is written."""
    return (found.stage or found.adapter or Path()) / "merged"


def _about(found: Found, adapter: Path) -> dict[str, Any]:
    """What a merge is made of. The base goes by the name that the adapter has for it, not by a path of this machine."""
    settings = read_json(adapter / "adapter_config.json") or {}
    base = {"name": settings.get("base_model_name_or_path") or found.weights.name, "revision": settings.get("revision")}
    return {
        "base": base,
        "adapter_sha256": sha256_of(adapter),
        "quantization": found.quantization,
        "dtype": found.dtype,
    }


def _known(out: Path, about: Mapping[str, Any]) -> Merged | None:
    """The merge that is there already, when it is that of the same adapter and all its files are."""
    try:
        record = read_json(out / RECORD)
        if record is None or any(record[key] != value for key, value in about.items()):
            return None
        files, check = record["files"], record["check"]
        if not all((path := out / name).is_file() and path.stat().st_size == size for name, size in files.items()):
            return None
        if check:
            fp32, bf16 = (Difference(**check[name]) for name in ("fp32", "bf16"))
            check = Check(check["source"], check["rows"], check["tokens"], fp32, bf16)
        return Merged(out, sum(files.values()), len(files), check, is_new=False)
    except (TrainError, KeyError, TypeError, AttributeError):  # of a file that somebody has edited
        return None


def _check_place(out: Path, force: bool) -> None:
    """Raises ModelError where a merge may not be put."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / RECORD).is_file():
        raise ModelError(f"{out} is there, and is no merge (it has no {RECORD}): name another folder with --out.")
    if not force:
        raise ModelError(f"{out} is there, and is another merge or not a whole one: replace it with --force, or name another "
                         f"folder with --out.")  # fmt: skip


def _check_room(out: Path, weights: MergedTensors, tokens: int) -> None:
    """Raises ModelError where the model has no room for its tokens, or the disk none for the model."""
    if tokens > weights.vocabulary:
        raise ModelError(f"The adapter's tokenizer has {tokens:,} tokens, and the model embeddings for {weights.vocabulary:,}: "
                         f"it was saved without those of the tokens that were added.")  # fmt: skip
    needed, free = bytes_of(weights.shapes.values()), shutil.disk_usage(out.parent).free
    if needed + _BESIDE_BYTES > free:
        raise ModelError(f"The merge takes {needed / 1e9:.1f} GB, and the disk of {out} has {free / 1e9:.1f} GB left: make "
                         f"room, or name another folder with --out.")  # fmt: skip


def _compared(found: Found, weights: MergedTensors, rows: Rows, progress: Progress) -> tuple[Trained, Difference]:
    """What the model that was trained makes of the rows, and how far the merge is from it. Raises ModelError when it is
    another model."""
    try:
        with _piece("loading what was trained", progress):
            trained = as_trained(found, rows)
    except RuntimeError as error:
        if "allocate" not in str(error):  # as torch says it, of a GPU too
            raise
        raise ModelError(f"There is no memory to load {found.name} as it was trained. The merge itself needs little: make "
                         f"it with --no-check, and compare it on a larger machine.") from error  # fmt: skip
    with _piece("comparing the merge", progress):
        apart = difference(trained, weights, found.weights.config, rows)
    if not apart.kl < WRONG_KL:
        raise ModelError(f"The merge of {found.name} is not the model that was trained: the mean KL on {rows.source} is "
                         f"{apart.kl:.2g}, where rounding makes less than 1e-5. Nothing was written. Merge it with PEFT, "
                         f"and report this: prefmix does not know this kind of model.")  # fmt: skip
    return trained, apart


def _checked(found: Found, folder: Path, rows: Rows, before: tuple[Trained, Difference], progress: Progress) -> Check:
    """The record of the check, with how far the weights in `folder` are from the model that was trained."""
    trained, fp32 = before
    with _piece("comparing what is saved", progress):
        bf16 = difference(trained, Stored(weight_files(folder)), found.weights.config, rows)
    return Check(rows.source, len(rows.prompts), rows.tokens, fp32, bf16)


@contextmanager
def _piece(what: str, progress: Progress) -> Generator[None]:
    progress(what, 0, 1)
    yield
    progress(what, 1, 1)
