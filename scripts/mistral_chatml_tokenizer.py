"""Writes the tokenizer of OpenHermes-2.5-Mistral-7B (Mistral 7B's with ChatML's two tokens) into a folder, without the Hub.

    pip install transformers sentencepiece protobuf && pip install --no-deps mistral_common
    python scripts/mistral_chatml_tokenizer.py FOLDER

The vocabulary is in the mistral_common wheel. `<|im_end|>` is 32000 and `<|im_start|>` 32001, as in the model.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path


def main(folder: str) -> None:
    from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

    package = find_spec("mistral_common")
    if package is None or package.origin is None:
        sys.exit("mistral_common is not installed: pip install --no-deps mistral_common")
    with tempfile.TemporaryDirectory() as work:
        shutil.copy(Path(package.origin).parent / "data" / "tokenizer.model.v1", Path(work) / "tokenizer.model")
        mistral = LlamaTokenizerFast.from_pretrained(work, legacy=True)
    mistral.add_special_tokens({"eos_token": "<|im_end|>"})
    mistral.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    ids = mistral.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    if ids != [32000, 32001]:
        sys.exit(f"the ChatML tokens got the ids {ids}, not 32000 and 32001")
    # Saved as a Llama tokenizer it would reload with other ids; the plain class keeps tokenizer.json as it is.
    plain = PreTrainedTokenizerFast(tokenizer_object=mistral.backend_tokenizer, eos_token="<|im_end|>", bos_token="<s>")
    plain.save_pretrained(folder)
    sys.stdout.write(f"{folder}: {len(plain)} tokens\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
