"""A model as one GGUF file, for llama.cpp and what is built on it (LM Studio, Ollama).

found = find_weights("runs/smollm2")            # a merged run, or a model
exported = export(found, "q8_0")

A converter writes the file. What it leaves out or guesses is put right, so that llama.cpp reads a conversation as
training did, and what the file says of itself is checked before it gets its name.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from prefmix import hub
from prefmix.chatml import END, START
from prefmix.errors import ModelError
from prefmix.model.find import find_model, load_tokenizer
from prefmix.model.gguf.converter import converter
from prefmix.model.gguf.file import Gguf, read_gguf, write_array
from prefmix.stages import last_stage, stages_of
from prefmix.train.records import read_json, sha256_of

GgufType = Literal["q8_0", "f16"]

#: `general.file_type` of llama.cpp.
_FILE_TYPES = {"f16": 1, "q8_0": 7}
_TOKENS, _SCORES, _KINDS = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
_CONTROL = 3  # what llama.cpp calls a token that is never text
#: What is fetched from the Hub: some repositories hold the weights a second time, in other formats.
_FILES = ("model*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
_LOG_LINES = 12
_AGES_S = 1e8


@dataclass(frozen=True)
class Weights:
    """A folder with whole weights and their tokenizer; `stage` is the folder of the stage that they are of, if any."""

    name: str
    folder: Path
    stage: Path | None
    tokenizer: PreTrainedTokenizerFast

    def out(self, kind: GgufType) -> Path:
        """Where the GGUF goes unless told otherwise: beside the adapter, or into the current folder."""
        return (self.stage / "gguf" if self.stage else Path()) / f"{self.name}-{kind}.gguf"


@dataclass(frozen=True)
class Exported:
    """A GGUF file: its size, its tensors by type, the token that ends a turn, and what was put right in it."""

    path: Path
    kind: GgufType
    bytes: int
    tensors: Mapping[str, int]
    eos: str
    eos_id: int
    corrected: tuple[str, ...]


def find_weights(reference: str) -> Weights:
    """The whole weights of a merged run or stage, of a folder, or of the Hub.

    Raises ModelError for an adapter that is not merged, or was trained on since, and for a model without a chat template.
    """
    stage = _stage(Path(reference))
    if stage:
        name, folder = stage.parent.resolve().name, _merged(stage)
    elif (Path(reference) / "adapter_config.json").is_file():
        raise ModelError(f"{reference} is an adapter alone, and a GGUF needs whole weights: `prefmix merge` first.")
    else:
        name, folder = _folder(reference)
    found = find_model(folder)
    tokenizer = load_tokenizer(found)
    if not tokenizer.chat_template:
        raise ModelError(f"{reference} has no chat template, so nothing that serves it would know how a turn begins and "
                         f"ends. Put its template into {folder / 'chat_template.jinja'}.")  # fmt: skip
    return Weights(name, folder, stage, tokenizer)


def export(
    weights: Weights,
    kind: GgufType,
    out: Path | None = None,
    *,
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Writes the GGUF of a model, at once or not at all; `note` is told what takes long.

    Raises ModelError when there is a file of that name (without `force`), when the converter cannot be had or does not know
    the model, and when the file is not what it should be.
    """
    path = out or weights.out(kind)
    if path.is_dir() or (path.exists() and not force):
        remedy = "name a file with --out" if path.is_dir() else "--force replaces it, --out names another"
        raise ModelError(f"{path} is there already: {remedy}.")
    command = converter(note)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise ModelError(f"{path} cannot be written ({error.strerror}): name another place with --out.") from error
    with scratch as work:
        written = Path(work).absolute() / "model.gguf"
        note(f"converting to {kind}")
        _convert(command, _prepared(weights, written.with_name("model")), written, kind, weights.name)
        corrected = _put_right(written, weights)
        head = read_gguf(written)
        _check(head, weights, kind)
        written.replace(path)
    counts = dict(Counter(tensor for _, tensor in head.tensors.values()))
    eos_id = head.metadata["tokenizer.ggml.eos_token_id"]
    return Exported(path, kind, path.stat().st_size, counts, head.metadata[_TOKENS][eos_id], eos_id, corrected)


def _stage(folder: Path) -> Path | None:
    """The finished stage that a run, a stage or the merged weights in one stand for; None for anything else."""
    if folder.name == "merged" and stages_of(folder.parent) == [folder.parent]:
        folder = folder.parent
    return last_stage(folder) if stages_of(folder) else None


def _merged(stage: Path) -> Path:
    adapter, merged = stage / "adapter", stage / "merged"
    if (adapter / "config.json").is_file():  # trained whole
        return adapter
    if not (merged / "config.json").is_file():
        raise ModelError(f"{stage} is not merged, and a GGUF needs whole weights: `prefmix merge {stage}` first.")
    of = (read_json(merged / "merge.json") or {}).get("adapter_sha256")
    if of and adapter.is_dir() and of != sha256_of(adapter):
        raise ModelError(
            f"{merged} is the merge of another adapter than {adapter}: `prefmix merge {stage} --force` first."
        )
    return merged


def _folder(reference: str) -> tuple[str, Path]:
    """The name and the folder of a model that is not from a run; one of the Hub is fetched."""
    found = find_model(reference).weights
    if found.commit is None:
        return Path(found.path).resolve().name, Path(found.path)
    there = hub.list_files(found.path, found.commit, repo_type="model")
    wanted = [name for name in there if "/" not in name and any(fnmatch(name, kind) for kind in _FILES)]
    return found.path.partition("/")[2], hub.download(found.path, found.commit, wanted, repo_type="model")[0].parent


def _prepared(weights: Weights, folder: Path) -> Path:
    """The model as the converter is shown it: links to its files, and a tokenizer_config.json that says what llama.cpp
    would guess."""
    folder.mkdir()
    for file in weights.folder.iterdir():
        if file.is_file() and file.name != "tokenizer_config.json":
            (folder / file.name).symlink_to(file.absolute())
    settings = read_json(weights.folder / "tokenizer_config.json") or {}
    tokenizer = weights.tokenizer
    if not _rendered(tokenizer).startswith(tokenizer.bos_token or "\0"):
        settings["add_bos_token"] = False  # else llama.cpp writes one before a conversation
    if _is_sentencepiece(tokenizer):
        first = tokenizer.encode("a", add_special_tokens=False)[0]
        behind = tokenizer.encode(f"{tokenizer.eos_token}a", add_special_tokens=False)[1]
        settings["add_prefix_space"] = first == behind and tokenizer.convert_ids_to_tokens(first) != "a"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _rendered(tokenizer: PreTrainedTokenizerFast) -> str:
    turns = [{"role": "user", "content": "a"}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _convert(command: list[str], model: Path, out: Path, kind: GgufType, name: str) -> None:
    log = out.with_name("log.txt")
    words = [str(model), "--outfile", str(out), "--outtype", kind, "--model-name", name]
    with log.open("wb") as file:
        # A wait with a bound looks up now and then, which Ctrl-C needs: Polars lets system calls go on after a signal.
        done = subprocess.run([*command, *words], stdout=file, stderr=file, cwd=out.parent, timeout=_AGES_S)
    if done.returncode or not out.is_file():
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        raise ModelError(
            "\n".join([f"The converter cannot convert {name} (exit {done.returncode}). Its last lines:", *said])
        )


def _put_right(path: Path, weights: Weights) -> tuple[str, ...]:
    """Corrects what the converter writes of a SentencePiece vocabulary that it has from tokenizer.json.

    It gives each token the same score, where llama.cpp takes the order of the merges from the scores: `friend` would be
    split into other tokens than in training. And it calls `<|im_start|>` text.
    """
    head = read_gguf(path)
    if not _is_sentencepiece(weights.tokenizer) or head.metadata.get("tokenizer.ggml.model") != "llama":
        return ()
    tokens = head.metadata[_TOKENS]
    special = {token.content for token in weights.tokenizer.added_tokens_decoder.values() if token.special}
    kinds = [_CONTROL if token in special else kind for token, kind in zip(tokens, head.metadata[_KINDS], strict=True)]
    write_array(path, head, _KINDS, kinds, "i")
    if len(set(head.metadata[_SCORES])) > 1:  # there was a tokenizer.model, which has them
        return ()
    merges = _backend(weights.tokenizer)["model"]["merges"]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair) if isinstance(pair, list) else pair.replace(" ", ""), rank)
    write_array(path, head, _SCORES, [float(-ranks.get(token, len(merges))) for token in tokens], "f")
    return ("the order of the merges",)


def _is_sentencepiece(tokenizer: PreTrainedTokenizerFast) -> bool:
    model = _backend(tokenizer)["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def _backend(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _check(head: Gguf, weights: Weights, kind: GgufType) -> None:
    """Raises ModelError when the file does not say of itself what a server has to know."""
    metadata, tokenizer = head.metadata, weights.tokenizer
    template = str(tokenizer.chat_template)
    end = END if START in template and END in tokenizer.get_added_vocab() else tokenizer.eos_token
    tokens, eos_id = metadata.get(_TOKENS, []), metadata.get("tokenizer.ggml.eos_token_id")
    eos = tokens[eos_id] if eos_id is not None and eos_id < len(tokens) else None
    rows = head.tensors["token_embd.weight"][0][-1]
    problem = None
    if eos != end:
        problem = f"a turn ends with {end}, and its eos is {eos}: set eos_token in tokenizer_config.json"
    elif metadata.get("tokenizer.chat_template") != template:
        problem = "the chat template is missing or another one"
    elif len(tokens) != rows:
        problem = f"it has {len(tokens):,} tokens and {rows:,} embeddings: llama.cpp does not load it"
    elif metadata.get("general.file_type") != _FILE_TYPES[kind]:
        problem = f"it is not {kind} (file type {metadata.get('general.file_type')})"
    elif not any(tensor == kind for _, tensor in head.tensors.values()):
        problem = f"none of its tensors is {kind}"
    if problem:
        raise ModelError(f"The GGUF of {weights.folder} is not one to serve: {problem}.")
