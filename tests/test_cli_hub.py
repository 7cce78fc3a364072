"""`prefmix push` and `prefmix pull` as they are typed, and the real clients (`datasets`, `hf`, Xet) in processes of their
own against our stand-in for the Hub."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import polars as pl
import pytest
from hub.clients import built, pair, process, python
from hub.loopback import LoopbackHub

from prefmix.cli.main import run
from prefmix.mixture import Mixture
from prefmix.store import Store, open_mixture

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "someone/mix"
ROWS = [pair(number) for number in range(40)]
PREFMIX = [sys.executable, "-m", "prefmix"]


@pytest.fixture
def cli(loopback_hub: LoopbackHub, tmp_path: Path, capsys, monkeypatch):
    """Runs a command in this process, over LFS, on the store in tmp_path; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    monkeypatch.setenv("PREFMIX_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        captured = capsys.readouterr()
        assert loopback_hub.token not in captured.out + captured.err
        return code, captured.out, captured.err

    return call


def two_mixtures(folder: Path) -> tuple[Mixture, Mixture]:
    """mix@v1 with 40 rows and a tie in its ledger, and mix@v2 with 30 rows, in `folder/store`."""
    return built(folder, [*ROWS, pair(99, score=1.0)]), built(folder, ROWS[:30])


@pytest.fixture
def two(tmp_path: Path) -> tuple[Mixture, Mixture]:
    return two_mixtures(tmp_path)


# The commands


def test_push_lists_what_was_sent_and_says_how_to_get_it(cli, loopback_hub, two) -> None:
    code, page, complaints = cli("push", "mix@v1", REPO)
    assert (code, complaints) == (0, "")
    first, address, *_ = page.splitlines()
    assert re.fullmatch(rf"hub:someone/mix@v1  digest {two[0].digest[:12]}  pushed in [\d.]+ s", first)
    assert address == f"{loopback_hub.url}/datasets/someone/mix/tree/v1"
    assert re.search(r"^Files   6 files, [\d.]+ kB, none of it on the Hub before$", page, re.MULTILINE)
    assert re.search(r"^preference/train-00000-of-00001.parquet +[\d.]+ kB$", page, re.MULTILINE)
    assert "  prefmix pull someone/mix@v1  get it on another machine" in page
    assert [line for line in page.splitlines() if line != line.rstrip()] == []


def test_a_dry_run_of_push_gives_the_command_that_does_it(cli, loopback_hub, two) -> None:
    code, page, _ = cli("push", "mix@v1", REPO, "--dry-run", "--private", "--tag", "first")
    assert code == 0
    assert "would be pushed: nothing was sent" in page
    assert "prefmix push mix@v1 someone/mix --tag first --private  send it" in page
    assert loopback_hub.repos == {}


def test_push_says_what_was_there_already(cli, loopback_hub, two) -> None:
    cli("push", "mix@v1", REPO)
    assert cli("push", "mix@v1", REPO)[1].startswith("hub:someone/mix@v1  is there already: digest ")
    loopback_hub.repos["dataset", REPO].tags.clear()
    assert "the tag would be made" in cli("push", "mix@v1", REPO, "--dry-run")[1]
    assert cli("push", "mix@v1", REPO)[1].startswith("hub:someone/mix@v1  was there, the tag is new: digest ")
    page = cli("push", "mix@v2", REPO)[1]
    assert re.search(r"6 files, [\d.]+ kB, [\d.]+ k?B of it on the Hub before", page)


def test_quiet_prints_the_reference_only(cli, two) -> None:
    assert cli("push", "mix@v1", REPO, "-q") == (0, "hub:someone/mix@v1\n", "")
    assert cli("pull", "someone/mix@v1", "-q", "--name", "mine") == (0, "mine@v1\n", "")


def test_pull_shows_where_it_is_and_then_that_it_is_there(cli, two, tmp_path) -> None:
    cli("push", "mix@v1", REPO)
    store = str(tmp_path / "other")
    code, page, complaints = cli("pull", "someone/mix@v1", "--store", store)
    assert (code, complaints) == (0, "")
    assert re.match(rf"mix@v1  digest {two[0].digest[:12]}  pulled in [\d.]+ s\n", page)
    assert "preference  train    40" in page
    assert f"prefmix show mix@v1 --store {store}" in page
    assert re.match(r"mix@v1 is up to date  ", cli("pull", "hub:someone/mix@v1", "--store", store)[1])


def test_a_label_that_is_taken_is_said(cli, two, tmp_path) -> None:
    cli("push", "mix@v1", REPO)
    built(tmp_path, ROWS[:5], name="mine")
    code, page, complaints = cli("pull", "someone/mix@v1", "--name", "mine")
    assert (code, page[:7]) == (0, "mine@v2")
    assert complaints == "warning: mine@v1 is another mixture in this store: what was pulled is called mine@v2\n"


def test_show_diff_drops_and_why_take_a_reference_to_the_hub(cli, two, tmp_path) -> None:
    for version in ("mix@v1", "mix@v2"):
        cli("push", version, REPO)
    store = ("--store", str(tmp_path / "other"))
    assert cli("show", "hub:someone/mix@v1", *store)[1].startswith("mix@v1  40 preference rows\n")
    assert "10 went" in cli("diff", "hub:someone/mix@v1", "hub:someone/mix@v2", *store)[1]
    assert "filter/tie" in cli("drops", "hub:someone/mix@v1", *store)[1]
    assert json.loads(cli("why", "hub:someone/mix@v1", "after 7?", "--json", *store)[1])["found"] == 1
    assert list(Store(tmp_path / "other").versions("mix")) == ["v1", "v2"]


def test_what_cannot_be_meant_is_2_and_what_failed_is_1(cli, loopback_hub, two, monkeypatch) -> None:
    assert cli("pull", "mix@v1")[0] == 2
    assert cli("pull", "someone/mix@v1", "--name", "../x")[0] == 2
    assert cli("push", "mix@v9", REPO)[0] == 1
    code, _, complaint = cli("pull", "someone/mix@v1")
    assert (code, complaint[:6]) == (1, "error:")
    cli("push", "mix@v1", REPO)
    code, _, complaint = cli("push", "mix@v2", REPO, "--tag", "v1")
    assert (code, "tags are not moved" in complaint) == (1, True)
    loopback_hub.fail("POST", "/commit/", status=503)
    code, _, complaint = cli("push", "mix@v2", REPO)
    assert (code, "run the push again" in complaint) == (1, True)


def test_json_of_both_is_one_document(cli, two, tmp_path) -> None:
    pushed = json.loads(cli("push", "mix@v1", REPO, "--json")[1])
    assert (pushed["digest"], pushed["tag"], pushed["is_new_commit"]) == (two[0].digest, "v1", True)
    assert pushed["bytes"] == sum(file["bytes"] for file in pushed["files"])
    pulled = json.loads(cli("pull", "someone/mix@v1", "--json", "--store", str(tmp_path / "other"))[1])
    assert (pulled["digest"], pulled["up_to_date"], pulled["hub"]["commit"]) == (
        two[0].digest,
        False,
        pushed["commit"],
    )


def test_nothing_is_left_where_temporary_files_go(cli, two, tmp_path, monkeypatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert cli("push", "mix@v1", REPO)[0] == 0
    assert cli("push", "mix@v1", "other/mix")[0] == 1
    assert list((tmp_path / "temporary").iterdir()) == []


def test_an_interrupted_push_makes_no_tag_and_leaves_no_files(loopback_hub, two, tmp_path) -> None:
    (tmp_path / "temporary").mkdir()
    loopback_hub.fail("POST", "/commit/", hangs=True)
    environment = {
        **os.environ, "HF_TOKEN": loopback_hub.token, "HF_HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "temporary"),
    }  # fmt: skip
    command = [*PREFMIX, "push", "mix@v1", REPO, "--store", str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as push:
        while loopback_hub.faults[0].times:
            time.sleep(0.05)
        push.send_signal(signal.SIGINT)
        out, complaint = push.communicate(timeout=30)
    assert (push.returncode, out) == (130, "")
    assert complaint == "interrupted: no tag was made; run it again to go on\n"
    assert loopback_hub.repos["dataset", REPO].tags == {}
    assert list((tmp_path / "temporary").glob("prefmix*")) == []


def test_bars_are_drawn_on_a_terminal_only_and_are_ours(loopback_hub, two, tmp_path) -> None:
    environment = {
        **os.environ, "HF_TOKEN": loopback_hub.token, "HF_HOME": str(tmp_path / "home"), "TERM": "xterm-256color",
    }  # fmt: skip
    ours, theirs = pty.openpty()
    command = [*PREFMIX, "push", "mix@v1", REPO, "--store", str(tmp_path / "store")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True)
    os.close(theirs)
    drawn = os.read(ours, 100_000).decode(errors="replace")
    os.close(ours)
    assert "sending" in drawn
    assert "Processing Files" not in drawn
    assert done.stdout.startswith(b"hub:someone/mix@v1")


# docs/


ROOT = Path(__file__).parents[1]


def comparable(text: str) -> list[str]:
    """Lines without what differs from run to run: seconds, the port, sizes that the version of pyarrow decides."""
    text = re.sub(r"\d[\d.]* (k?B|s)\b", r"N \1", re.sub(r"127\.0\.0\.1:\d+", "HUB", text))
    return [re.sub(r" +N", " N", line).rstrip() for line in text.strip().splitlines()]


def test_docs_hub_shows_what_the_commands_print(cli, loopback_hub, tmp_path, monkeypatch) -> None:
    loopback_hub.user = "user"
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFMIX_STORE")
    for changes in ((), ("--set", "filter.min_margin=1.0")):
        assert run(["build", "recipes/quickstart.toml", "-q", *changes]) == 0
    page = (ROOT / "docs" / "hub.md").read_text("utf-8")
    shown = re.findall(r"```console\nprefmix (.*?)\n```\n\n```text\n(.*?)```", page, re.DOTALL)
    shown = [(command, output) for command, output in shown if " runs/" not in command]  # test_walkthrough.py has those
    assert len(shown) == 8
    cli("--version")  # empties what the builds printed
    for command, output in shown:
        if command.endswith("@v3"):
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        _, page, complaint = cli(*command.split())
        assert comparable(page + complaint) == comparable(output), command


@pytest.mark.parametrize("command", ["push", "pull"])
def test_json_documents_have_the_keys_that_docs_cli_gives(command: str, cli, two, tmp_path) -> None:
    documents = {
        "push": json.loads(cli("push", "mix@v1", REPO, "--json")[1]),
        "pull": json.loads(cli("pull", "someone/mix@v1", "--json", "--store", str(tmp_path / "other"))[1]),
    }
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| `{command} --json`"))
    assert list(documents[command]) == re.findall(r"`(\w+)`", row.split(" | ")[1].partition(";")[0])


# The clients as they come, over Xet


@dataclass(frozen=True)
class World:
    """A Hub after `prefmix push` of mix@v1 and mix@v2, each in a process of its own, with Xet; and the two mixtures."""

    hub: LoopbackHub
    mixtures: tuple[Mixture, Mixture]
    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"


def world(folder: Path) -> World:
    hub, mixtures = LoopbackHub(), two_mixtures(folder)
    for mixture in mixtures:
        command = [*PREFMIX, "push", str(mixture), REPO, "--store", str(folder / "store")]
        done = process(command, hub, folder / "home")
        assert (done.returncode, done.stderr) == (0, "")
    assert any(path.startswith("/v1/xorbs/") for _, path in hub.requests)
    return World(hub, mixtures, folder)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = world(tmp_path_factory.mktemp("world"))
    yield made
    made.hub.close()


def blocks_of_the_card(made: World) -> list[str]:
    """The Python of the card at v2: prefmix, datasets, polars, TRL."""
    repo = made.hub.repos["dataset", REPO]
    text = repo.commits[repo.tags["v2"]].files["README.md"].decode()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_datasets_loads_the_rows_of_each_tag(pushed: World, tmp_path: Path) -> None:
    code = f"""
        import datasets
        for label in ("v1", "v2"):
            rows = datasets.load_dataset("{REPO}", "preference", split="train", revision=label)
            rows.to_parquet(f"{tmp_path}/{{label}}.parquet")
    """
    python(code, pushed.hub, pushed.home)
    for mixture in pushed.mixtures:
        loaded = pl.read_parquet(tmp_path / f"{mixture.version}.parquet")
        assert loaded.equals(mixture.scan("preference", "train").collect())


def test_the_code_of_the_card_runs_as_it_is(pushed: World, tmp_path: Path) -> None:
    ours, load, scan, train = blocks_of_the_card(pushed)
    code = f"{ours}\nprint(mixture.digest)\n{load}\nprint(rows.num_rows)\n{scan}\nprint(rows.collect().height)"
    printed = python(code, pushed.hub, pushed.home, PREFMIX_STORE=str(tmp_path / "other"))
    assert printed.split() == [pushed.mixtures[1].digest, "30", "30"]
    compile(train, "card", "exec")


@pytest.mark.slow
def test_the_code_of_the_card_trains_with_trl(pushed: World, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    *_, train = blocks_of_the_card(pushed)
    model = """
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<|im_start|>", "<|im_end|>", "<pad>"]
        tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special))
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
        fast.save_pretrained("model")
        LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, eos_token_id=1, pad_token_id=2)).save_pretrained("model")
    """
    config = 'DPOConfig("out", max_steps=1, use_cpu=True, bf16=False, report_to=[])'
    code = "\n".join(
        [
            f"import os\nos.chdir({str(tmp_path)!r})",
            textwrap.dedent(model),
            train.replace("MODEL", '"model"').replace('DPOConfig("out")', config),
            'trainer.train()\nprint("steps", trainer.state.global_step)',
        ]
    )
    assert python(code, pushed.hub, pushed.home, OMP_NUM_THREADS="1").splitlines()[-1] == "steps 1"


def test_hf_downloads_what_prefmix_pushed(pushed: World, tmp_path: Path) -> None:
    hf = shutil.which("hf", path=str(Path(sys.executable).parent))
    if hf is None:
        pytest.skip("the hf command of huggingface_hub is not beside this Python")
    command = [hf, "download", REPO, "--repo-type", "dataset", "--revision", "v1", "--local-dir", str(tmp_path)]
    done = process(command, pushed.hub, pushed.home)
    assert done.returncode == 0, done.stderr
    frame = pl.read_parquet(f"{tmp_path}/preference/train-*.parquet")
    assert frame.equals(pushed.mixtures[0].scan("preference", "train").collect())


@pytest.mark.parametrize("how", ["offline", pytest.param("down", marks=pytest.mark.slow)])
def test_without_the_hub_prefmix_serves_the_version_that_was_asked_for_where_load_dataset_serves_another(
    how: str, pushed: World, tmp_path: Path
) -> None:
    if how == "down":
        pushed = world(tmp_path)
    counts = f"""
        import datasets

        def rows(revision):
            try:
                return datasets.load_dataset("{REPO}", "preference", split="train", revision=revision).num_rows
            except Exception as error:
                return type(error).__name__

        print(*map(rows, ["v1", "v2", "v3"]))
    """
    store = str(tmp_path / "other")
    pulls = [[*PREFMIX, "pull", f"{REPO}@{label}", "-q", "--store", str(tmp_path / "first")] for label in ("v1", "v2")]
    assert python(counts, pushed.hub, pushed.home).split() == ["40", "30", "DatasetNotFoundError"]
    assert [process(pull, pushed.hub, pushed.home).stdout for pull in pulls] == ["mix@v1\n", "mix@v2\n"]
    environment = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {}
    if how == "down":
        pushed.hub.close()
    # datasets 5.2, as it comes: v1 is served as v2, and so is v3, which never was. No error.
    assert python(counts, pushed.hub, pushed.home, **environment).split() == ["30", "30", "30"]
    for mixture in pushed.mixtures:
        pull = [*PREFMIX, "pull", f"{REPO}@{mixture.version}", "--store", store, "-q"]
        done = process(pull, pushed.hub, pushed.home, **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{mixture}\n", "")
        assert open_mixture(str(mixture), store).digest == mixture.digest
    done = process([*PREFMIX, "pull", f"{REPO}@v3", "--store", store], pushed.hub, pushed.home, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert '"v3" is no tag that was fetched before; fetched were: v1, v2' in done.stderr


@pytest.mark.parametrize("pattern", ["/v1/xorbs/", "/v1/shards", "/xet-write-token/"])
def test_after_a_fault_of_xet_a_second_push_completes_it(
    pattern: str, loopback_hub: LoopbackHub, two: tuple, tmp_path: Path
) -> None:
    method = "GET" if "token" in pattern else "POST"
    loopback_hub.fail(method, pattern, status=403, times=99)
    command = [*PREFMIX, "push", "mix@v1", REPO, "--store", str(tmp_path / "store")]
    done = process(command, loopback_hub, tmp_path / "home")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert re.search(r"^error: someone/mix.*run the push again", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr
    assert loopback_hub.token not in done.stderr
    assert loopback_hub.repos["dataset", REPO].tags == {}
    loopback_hub.faults.clear()
    assert process(command, loopback_hub, tmp_path / "home").returncode == 0
    repo = loopback_hub.repos["dataset", REPO]
    assert len(repo.history(repo.branches["main"])) == 2
    assert repo.tags == {"v1": repo.branches["main"]}


# Size


def texts(random: np.random.Generator, words: np.ndarray, mean: int, count: int) -> list[str]:
    lengths = np.clip(random.lognormal(np.log(mean), 0.5, count).astype(int), 3, None)
    weights = 1 / np.arange(1, len(words) + 1)
    drawn = words[random.choice(len(words), int(lengths.sum()), p=weights / weights.sum())]
    return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]


@pytest.mark.slow
def test_of_100000_rows_each_byte_is_sent_once_and_new_scores_for_1_percent_send_little(
    loopback_hub: LoopbackHub, tmp_path: Path
) -> None:
    """Measured on the wire of Xet: xorbs and shards. docs/hub.md says why new texts for 1 % send nearly everything."""
    random = np.random.default_rng(0)
    words = np.array(["".join(map(chr, random.integers(97, 123, random.integers(2, 10)))) for _ in range(20_000)])
    parts = (texts(random, words, mean, 100_000) for mean in (40, 110, 90))
    rows = [
        {"instruction": a, "chosen_response": b, "rejected_response": c, "chosen_avg_rating": 4.0, "source": "x",
         "rejected_avg_rating": 1.0, "chosen_model": "m"}
        for a, b, c in zip(*parts, strict=True)
    ]  # fmt: skip
    first = built(tmp_path, rows)
    changed = random.choice(len(rows), 1000, replace=False)
    for number in changed:
        rows[number]["chosen_avg_rating"] = 4.25
    built(tmp_path, rows)
    for number in changed:
        rows[number]["chosen_response"] += " Edited."
    built(tmp_path, rows)
    sent = []
    for version in ("mix@v1", "mix@v2", "mix@v3"):
        before = loopback_hub.uploaded
        command = [*PREFMIX, "push", version, REPO, "--store", str(tmp_path / "store"), "--json"]
        done = process(command, loopback_hub, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        size = json.loads(done.stdout)["bytes"]
        sent.append((loopback_hub.uploaded - before) / size)
    assert size > 50e6
    xorbs = [path for _, path in loopback_hub.requests if path.startswith("/v1/xorbs/")]
    assert len(xorbs) == len(set(xorbs))
    assert 0.9 < sent[0] <= 1.01
    assert sent[1] < 0.1
    assert 0.5 < sent[2] <= 1.01  # as docs/hub.md says
    done = process([*PREFMIX, "pull", f"{REPO}@v1", "--store", str(tmp_path / "other"), "-q"],
                   loopback_hub, tmp_path / "fresh")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert open_mixture("mix@v1", tmp_path / "other").digest == first.digest


@pytest.mark.network
def test_the_real_hub_takes_a_mixture_and_gives_it_back(tmp_path: Path) -> None:
    """Needs a token that may write: makes a private repository below its name, and removes it again."""
    from huggingface_hub import HfApi

    from prefmix.publish import pull, push

    api = HfApi()
    repo = f"{api.whoami()['name']}/prefmix-test-{time.time_ns()}"
    mixture = built(tmp_path, ROWS)
    try:
        push(mixture, repo, private=True)
        assert push(mixture, repo, private=True).is_new_commit is False
        assert pull(f"{repo}@v1", tmp_path / "other").digest == mixture.digest
    finally:
        api.delete_repo(repo, repo_type="dataset", missing_ok=True)
