"""The shipped recipe smollm2 from end to end, as docs/walkthrough.md shows it: real rows and the real model over a Hub, in NF4
on the CPU, with fewer steps and items."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hub.clients import process
from hub.loopback import LoopbackHub
from served import converter_cache, llama_cpp

from prefmix.mixture import Mixture
from prefmix.store import open_mixture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]
ROOT = Path(__file__).parents[1]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS, PROMPTS = 2, 4
#: What two steps may take from P(EOS), and what a forward pass of a row alone rounds otherwise than that of a batch.
LOST, ROUNDED = 0.05, 1e-3


@dataclass(frozen=True)
class Trained:
    """The base as a folder, the mixture that was built, the folder of the run and what the command reported; `hub` and
    `home` are those that it was run with."""

    base: Path
    mixture: Mixture
    folder: Path
    report: str
    hub: LoopbackHub
    home: Path

    def shell(self, line: str, **environment: str) -> str:
        """What a line of the walkthrough prints, in the folder that holds `runs`."""
        line = re.sub(r"\bprefmix\b", f"{shlex.quote(sys.executable)} -m prefmix", line, count=1)
        there = {"OMP_NUM_THREADS": "1", "PREFMIX_STORE": str(self.folder.parents[1] / "store"), **environment}
        line = f"cd {shlex.quote(str(self.folder.parents[1]))} && {line}"
        done = process(["sh", "-c", line], self.hub, self.home, **there)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def read(self, stage: str, file: str) -> dict[str, Any]:
        return json.loads((self.folder / stage / file).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hub(real_data: Path, smollm2_base: Path) -> Iterator[tuple[LoopbackHub, Path]]:
    """A Hub with the two data sets (real rows of their formats) and the model, and the model's folder."""
    hub = LoopbackHub()
    pairs = pl.read_parquet(real_data / "orca_dpo_pairs" / "converted.parquet").head(1000)
    rows = pl.read_parquet(real_data / "openhermes" / "converted_hermes_sources.parquet").gather_every(40)
    hub.commit("Intel/orca_dpo_pairs", {"orca_rlhf.jsonl": pairs.write_ndjson().encode()})
    hub.commit("teknium/openhermes", {"openhermes.json": json.dumps(rows.to_dicts()).encode()})
    hub.commit(BASE, {path.name: path.read_bytes() for path in smollm2_base.iterdir()}, repo_type="model")
    yield hub, smollm2_base
    hub.close()


@pytest.fixture(scope="module")
def trained(hub: tuple[LoopbackHub, Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`prefmix build` and `prefmix train` on the recipe, each in a process of its own."""
    server, base = hub
    folder = tmp_path_factory.mktemp("run")
    keys = [
        "sources.orca.take=40",
        "sources.openhermes.take=40",
        "splits.test=0.1",
        "train.dtype=float32",  # on every machine alike, and bf16 would ask for a wide bound
        *(f"train.stages.{stage}.{key}" for stage in (0, 1) for key in (f"max_steps={STEPS}", "batch_size=4")),
        f"train.output={folder / 'runs'}",
        f"train.eos.prompts={PROMPTS}",
        "train.eos.max_new_tokens=8",
    ]
    words = [str(ROOT / "recipes" / "smollm2.toml"), "--store", str(folder / "store")]
    words += [word for key in keys for word in ("--set", key)]
    for command in ("build", "train"):
        prefmix = [sys.executable, "-m", "prefmix", command, *words]
        done = process(prefmix, server, folder / "home", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    mixture = open_mixture("smollm2", folder / "store")
    return Trained(base, mixture, folder / "runs" / "smollm2", done.stdout, server, folder / "home")


def test_both_stages_run_in_four_bits_and_tell_whether_the_model_ends_its_turn(trained: Trained) -> None:
    for stage in ("dpo", "eos"):
        run, eos = trained.read(stage, "run.json"), trained.read(stage, "eos.json")
        assert run["finished"]
        assert run["packed"], "rounding in bf16 and 4 bits was taken for a wrong pass"
        assert (run["steps"], run["hyperparameters"]["quantization"]) == (STEPS, "nf4")
        assert run["mixture"]["digest"] == trained.mixture.digest
        assert (run["base"]["name"], len(run["base"]["revision"])) == (BASE, 40)
        assert eos["split"] == "test"
        assert {"p_eos", "log_p_eos", "stop_rate", "n"} <= eos["before"].keys() & eos["after"].keys()
    assert trained.read("eos", "eos.json")["before"] == trained.read("dpo", "eos.json")["after"]


def test_the_page_that_the_readme_shows_is_the_one_that_is_printed(trained: Trained) -> None:
    """The README's run had more steps and prompts: the same lines with other numbers."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = (block for block in re.findall(r"```text\n(.*?)```", readme, re.DOTALL) if block.startswith("smollm2  "))
    assert shape(shown) == shape(trained.report)


def shape(page: str) -> list[str]:
    """The words of each line, without numbers, sizes, times and the verdict on them."""
    page = re.sub(r"/\S*/runs/", "runs/", page).partition("Next:")[0]
    page = re.sub(r"^(passes|below|warning):.*", "", page, flags=re.MULTILINE)
    words = (re.sub(r"[−-]?\d[\d.,:]*(%| [kMG]?B\b| s\b)?", "#", line).split() for line in page.splitlines())
    return [" ".join(line) for line in words if line]


def test_the_model_ends_its_turn_as_likely_as_before(trained: Trained) -> None:
    for stage in ("dpo", "eos"):
        measured = trained.read(stage, "eos.json")
        assert measured["before"]["p_eos"] > 0.2  # of an instruct model, at the end of answers that others wrote
        assert measured["after"]["p_eos"] > measured["before"]["p_eos"] - LOST


@pytest.mark.parametrize("stage", ["dpo", "eos"])
def test_the_adapter_that_peft_loads_has_the_log_probabilities_that_were_measured(trained: Trained, stage: str) -> None:
    """Plain transformers and PEFT, a row at a time, from the text of the mixture and the tokenizer beside the adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from prefmix.train.weights import cured

    adapter = trained.folder / stage / "adapter"
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32, quantization_config=four_bits)
    model = PeftModel.from_pretrained(cured(base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)

    def log_p_end() -> float:
        return sum(log_p(text) for text in texts) / len(texts)

    def log_p(text: str) -> float:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits[0, -1].float()
        return logits.log_softmax(dim=-1)[ids[0, -1]].item()

    texts = held_out(trained.mixture)
    assert log_p_end() == pytest.approx(trained.read(stage, "eos.json")["after"]["log_p_eos"], abs=ROUNDED)
    with model.disable_adapter():
        assert log_p_end() == pytest.approx(trained.read("dpo", "eos.json")["before"]["log_p_eos"], abs=ROUNDED)


def held_out(mixture: Mixture) -> list[str]:
    """The texts that the guard measures on: of the test splits, half pairs and half conversations."""
    pairs = mixture.scan("preference", "test").select(text=pl.col("prompt") + pl.col("chosen"))
    rows = mixture.scan("sft", "test").select("text")
    return [text for part in (pairs, rows) for text in part.head(PROMPTS // 2).collect()["text"]]


def shown(start: str) -> tuple[str, str]:
    """The command of docs/walkthrough.md that has these words, and what it shows below."""
    page = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    steps = re.findall(r"```console\n([^`]*?)\n```\n\n```text\n(.*?)```", page, re.DOTALL)
    ((command, output),) = (step for step in steps if start in step[0])
    return command, output


def test_the_walkthrough_goes_from_the_run_to_a_published_model_that_stops_by_itself(
    trained: Trained, real_data: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    openai = pytest.importorskip("openai", reason="the client is not here: pip install openai")
    cache = converter_cache(tmp_path_factory.getbasetemp() / "converter")
    (trained.folder.parents[1] / "benchmarks").symlink_to(real_data / "benchmarks")

    command, output = shown("prefmix merge")
    assert shape(trained.shell(command)) == shape(output)
    check = trained.read("eos", "merged/merge.json")["check"]
    assert abs(check["fp32"]["kl"]) < 1e-5, "on real rows, in fp32"

    command, output = shown("prefmix eval")
    assert shape(trained.shell(command.replace("--limit 20", "--limit 3"))) == shape(
        output.replace("bfloat16", "float32")
    )

    command, output = shown("prefmix export")
    assert shape(trained.shell(command, **cache)) == shape(output)
    gguf = trained.folder / "eos" / "gguf" / "smollm2-q8_0.gguf"
    with llama_cpp(gguf, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model="smollm2", messages=question, max_tokens=60, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" in answer.choices[0].message.content

    command, _ = shown("prefmix chat")
    assert "Paris" in trained.shell(command)

    trained.shell("prefmix push smollm2@v1 someone/smollm2-mix", HF_HUB_DISABLE_XET="1")
    command, output = shown("prefmix push runs/smollm2")
    pushed = trained.shell(command, HF_HUB_DISABLE_XET="1")
    assert shape(pushed.partition("Branches")[2]) == shape(output.partition("Branches")[2])
    repo = trained.hub.repos["model", "someone/smollm2-dpo"]
    card = repo.commits[repo.branches["main"]].files["README.md"].decode()
    assert trained.mixture.digest in card
    assert "|truthfulqa_mc2|" in card
    assert "P(EOS) where held-out answers end" in card
