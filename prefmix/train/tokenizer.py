"""The tokenizer of a base model, made ready for ChatML: one id for `<|im_start|>`, one for `<|im_end|>`, our template.

It is read from tokenizer.json as it is. The class that the base names is not asked for: some rebuild the vocabulary and
give the added tokens other ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from prefmix.chatml import ANSWER_HEADER, END, START
from prefmix.errors import TrainError

#: What `prefmix.chatml` renders, for `apply_chat_template`: no default system prompt, nothing behind the last
#: `<|im_end|>`, generation markers around each answer and the `<|im_end|>` that ends it.
CHAT_TEMPLATE = (
    r"{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    rf"{{{{ '{START}' + message['role'] + '\n' }}}}"
    r"{% if message['role'] == 'assistant' %}"
    rf"{{% generation %}}{{{{ message['content'] + '{END}' }}}}{{% endgeneration %}}"
    rf"{{% else %}}{{{{ message['content'] + '{END}' }}}}{{% endif %}}{{% endfor %}}"
    r"{% if add_generation_prompt %}{% if messages %}{{ '\n' }}{% endif %}"
    rf"{{{{ '{START}assistant\n' }}}}{{% endif %}}"
)

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "chat_template.jinja", "chat_template.json", "config.json")  # fmt: skip
_ANSWERS = ("prefmix probe answer one", "prefmix probe answer two")
_PROBE = [
    {"role": "user", "content": "prefmix probe question one"},
    {"role": "assistant", "content": _ANSWERS[0]},
    {"role": "user", "content": "prefmix probe question two"},
    {"role": "assistant", "content": _ANSWERS[1]},
]


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer that is ready for ChatML, where it came from, and what was done to it.

    `commit` is that on the Hub (None for a folder). `sha256` is the digest of the tokenizer itself, added tokens
    included, and of nothing beside it: neither a path nor the chat template. `added` names the ChatML tokens, in the
    order of their ids, for which the base has no embeddings. `notes` says, a sentence each, what was changed.
    """

    tokenizer: PreTrainedTokenizerFast
    commit: str | None
    sha256: str
    added: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def start_id(self) -> int:
        """The id of `<|im_start|>`."""
        return self.tokenizer.added_tokens_encoder[START]

    @property
    def end_id(self) -> int:
        """The id of `<|im_end|>`, which is the eos."""
        return self.tokenizer.added_tokens_encoder[END]


def load_tokenizer(base: str, revision: str, root: Path, *, add_tokens: bool = False) -> ChatTokenizer:
    """The tokenizer in the folder `base` (relative to `root`), else of the Hub repository `base`, ready for ChatML.

    `add_tokens` gives it the ChatML tokens that it does not have.

    Raises:
        TrainError: no fast tokenizer; no single ids for the ChatML tokens; a chat template of its own that leaves
            answers without a stop token; no token to pad with.
        HubError: the Hub refused, is out of reach, or has no such repository or revision.
    """
    folder, commit = _located(base, revision, root)
    tokenizer = _read(base, folder)
    notes = _own_template(base, tokenizer)
    embeddings = _embeddings(folder)
    added, promoted = _chatml_ids(base, tokenizer, embeddings, add_tokens)
    notes += promoted
    if tokenizer.eos_token != END:
        notes.append(f"The end of a text was {tokenizer.eos_token}; it is {END} now.")
    tokenizer.eos_token = END
    if (pad := _pad(base, tokenizer, embeddings)) != tokenizer.pad_token:
        notes.append(f"The padding was {tokenizer.pad_token}; it is {pad} now.")
    tokenizer.pad_token = pad
    tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.num_special_tokens_to_add():
        notes.append("It puts special tokens around plain text; under the chat template there are none but ChatML's.")
    digest = sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return ChatTokenizer(tokenizer, commit, digest, added, tuple(notes))


def _located(base: str, revision: str, root: Path) -> tuple[Path, str | None]:
    """The folder with the tokenizer's files, and the commit when it is a snapshot of the Hub."""
    folder, commit = root / base, None
    if folder.is_dir():
        found = (folder / "tokenizer.json").is_file()
    else:
        from prefmix import hub

        commit = hub.resolve_revision(base, revision, repo_type="model")
        there = set(hub.list_files(base, commit, repo_type="model"))
        if found := "tokenizer.json" in there:
            paths = hub.download(base, commit, [name for name in _FILES if name in there], repo_type="model")
            folder = paths[0].parent
    if not found:
        raise TrainError(f"{base} has no fast tokenizer (no tokenizer.json). Save one with transformers: "
                         f"AutoTokenizer.from_pretrained(...).save_pretrained(folder).")  # fmt: skip
    return folder, commit


def _read(base: str, folder: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises a bare Exception
        reason = str(error).strip().partition("\n")[0]
        raise TrainError(f"{base}: tokenizer.json is not a tokenizer that can be read ({reason}). Save it again with "
                         f"transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder).") from error  # fmt: skip
    tokenizer.split_special_tokens = False
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    return tokenizer


def _own_template(base: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Notes on the template that the tokenizer came with. Raises TrainError where that leaves an answer without a stop
    token: a model that was trained with it has not learnt to stop there."""
    if tokenizer.chat_template in (None, CHAT_TEMPLATE):
        return []
    try:
        text = str(tokenizer.apply_chat_template(_PROBE, tokenize=False))
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        return [f"Its own chat template, which cannot be rendered ({error}), is replaced."]
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    stops = (END,) if START in text else tuple({*specials, *filter(None, [tokenizer.eos_token])})
    for answer in _ANSWERS:
        _, found, behind = text.partition(answer)
        if found and not behind.lstrip().startswith(stops):
            stop = END if START in text else "a stop token"
            raise TrainError(
                f"{base}: its own chat template does not write {stop} behind an answer, so a model trained with it does "
                f"not learn to end its turn. Correct the template (chat_template in tokenizer_config.json, or "
                f"chat_template.jinja) in a copy of the base, or remove it there: prefmix brings its own."
            )
    return ["Its own chat template is replaced by plain ChatML, without a default system prompt."]


def _embeddings(folder: Path) -> int | None:
    """The number of tokens that the base has embeddings for, by its config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sizes = (config.get("vocab_size"), (config.get("text_config") or {}).get("vocab_size"))
    return next((size for size in sizes if isinstance(size, int)), None)


def _chatml_ids(
    base: str, tokenizer: PreTrainedTokenizerFast, embeddings: int | None, add_tokens: bool
) -> tuple[tuple[str, ...], list[str]]:
    """Makes both ChatML tokens single special ids; gives those without embeddings, and notes."""
    known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    missing = [token for token in (END, START) if token not in known]
    remedy = "Set `add_tokens = true` in [train], which adds and trains them, or take a base that knows ChatML."
    if missing and not add_tokens:
        pieces = [len(tokenizer.encode(token, add_special_tokens=False)) for token in missing]
        raise TrainError(f"{base}: its tokenizer splits {_list(missing)} into {_list(pieces)} ids, where ChatML needs one "
                         f"special token each. {remedy}")  # fmt: skip
    plain = [token for token in known if token in (START, END) and not known[token].special]
    special = [AddedToken(token, special=True, normalized=False) for token in [*missing, *plain]]
    tokenizer.add_tokens(special, special_tokens=True)
    rendered = "\n".join(f"{START}{turn['role']}\n{turn['content']}{END}" for turn in _PROBE) + "\n" + ANSWER_HEADER
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    by_token = tokenizer.added_tokens_encoder
    if ids.count(by_token[START]) != len(_PROBE) + 1 or ids.count(by_token[END]) != len(_PROBE):
        raise TrainError(f"{base}: its tokenizer does not give {START} and {END} one id each inside a conversation. "
                         f"Mark both as special tokens, without `single_word`, in a copy of its tokenizer.json.")  # fmt: skip
    beyond = [token for token in (START, END) if embeddings is not None and by_token[token] >= embeddings]
    if not add_tokens and beyond:
        raise TrainError(f"{base}: the model has {embeddings} embeddings (vocab_size in config.json), none for "
                         f"{_list(beyond)} (id {_list([by_token[token] for token in beyond])}). {remedy}")  # fmt: skip
    added = sorted({*missing, *beyond}, key=lambda token: by_token[token])
    notes = [f"{_list(plain)} was no special token and is one now."] if plain else []
    return tuple(added), notes


def _pad(base: str, tokenizer: PreTrainedTokenizerFast, embeddings: int | None) -> str:
    """The token to pad with: its own unless that is a ChatML token, else another special one. It has an embedding."""
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    own = [token for token in (tokenizer.pad_token, tokenizer.unk_token) if token]
    spare = ["<|endoftext|>"] if "<|endoftext|>" in specials else []
    for token in [*own, *spare, *(token for token in specials if token != tokenizer.bos_token)]:
        number = tokenizer.backend_tokenizer.token_to_id(token)
        if token not in (START, END) and number is not None and (embeddings is None or number < embeddings):
            return token
    raise TrainError(f"{base}: its tokenizer has no token to pad with but {END}, which must not be masked. Give a copy of "
                     f"it one: tokenizer.add_special_tokens({{'pad_token': '<|pad|>'}}), then save_pretrained.")  # fmt: skip


def _list(items: Sequence[Any]) -> str:
    return " and ".join(map(str, items))
