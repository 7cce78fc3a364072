"""`prefmix train` as a user meets it: reports, errors with their remedies, exit codes, Ctrl-C and --resume, the EOS gate."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub.loopback import LoopbackHub
from small_models import micro_llama, smollm2_tokenizer
from test_docs import documented_keys

from prefmix.cli.main import run
from prefmix.cli.runs import advice
from prefmix.cli.training import figures_of
from prefmix.errors import TrainError
from prefmix.recipe import Train

#: Subject, a question about it, a good answer and a poor one.
FACTS = [
    (
        "kettle",
        "Why does a kettle whistle?",
        "Steam is pressed through a small gap, and the gap sings.",
        "It is happy.",
    ),
    ("bread", "What makes bread rise?", "Yeast eats sugar and gives off gas, which the dough holds.", "Magic, mostly."),
    ("moss", "Where does moss like to grow?", "On the damp, shaded sides of stones and trees.", "On the sun."),
    ("tides", "What pulls the tides?", "Above all the moon, with some help of the sun.", "Large fish pull them."),
    ("piano", "How many keys has a piano?", "Eighty-eight on most, black ones and white ones.", "As many as you like."),
    ("bees", "How do bees tell each other of flowers?", "They dance, and the angle shows the way.", "By telephone."),
    ("rust", "What is rust?", "Iron that has joined with oxygen, helped by water.", "A sort of brown paint."),
    ("maps", "Why is north up on a map?", "By habit: old map makers settled on it.", "Because north is heavier."),
    ("soap", "How does soap clean?", "One end of it holds fat and the other one water.", "It frightens the dirt."),
    ("owls", "Why do owls fly so quietly?", "Soft fringes on their feathers break up the air.", "They tiptoe."),
    ("snow", "Why is snow white?", "Its many crystals scatter all colours alike.", "Nobody has painted it yet."),
    ("cork", "Where does cork come from?", "From the bark of an oak that grows around the sea.", "From bottles."),
]


def write_data(folder: Path) -> None:
    """36 pairs in pairs.jsonl and 36 conversations in chats.jsonl, all different."""
    pairs, chats = [], []
    for number, way in enumerate(("Tell me: ", "For a child: ", "In short: ")):
        for subject, question, good, poor in FACTS:
            pairs.append({"prompt": way + question, "chosen": good, "rejected": f"{poor} Really."})
            turns = [question, f"{good} That is all about {subject}.", f"And number {number}?", "The same again."]
            roles = ("user", "assistant") * 2
            chats.append({"messages": [{"role": r, "content": way + c} for r, c in zip(roles, turns, strict=True)]})
    for name, rows in (("pairs", pairs), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


RECIPE = """\
name = "tiny"
[sources.pairs]
path = "pairs.jsonl"
[sources.chats]
path = "chats.jsonl"
[splits]
test = 0.2
"""
TRAIN = """\
[train]
base = "micro"
quantization = "none"
lora = { r = 4, alpha = 8, dropout = 0.0 }
eos = { prompts = 4, max_new_tokens = 8 }
"""
DPO = """\
[[train.stages]]
name = "dpo"
method = "dpo"
max_steps = 2
batch_size = 4
learning_rate = 1e-3
max_length = 128
"""
SFT = DPO.replace('"dpo"', '"sft"')


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Training takes one core, and its collections of garbage do not look through the libraries."""
    import torch

    import prefmix.train.run  # noqa: F401

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> Path:
    """A folder with data, a small base model, a recipe, the mixture of it in `store`, and a run in `finished`."""
    from prefmix.build import build
    from prefmix.recipe import load_recipe
    from prefmix.train.run import train

    folder = tmp_path_factory.mktemp("workshop")
    tokenizer = smollm2_tokenizer(tmp_path_factory.getbasetemp() / "smollm2-tokenizer")
    micro_llama(folder / "micro", tokenizer=tokenizer)
    write_data(folder)
    (folder / "tiny.toml").write_text(RECIPE + TRAIN + DPO + SFT)
    build(folder / "tiny.toml", store=folder / "store")
    recipe = load_recipe(folder / "tiny.toml", [f"train.output={folder / 'finished'}"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(recipe, store=folder / "store")
    return folder


class Said:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.lines = out.splitlines()


@pytest.fixture
def shop(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workshop as the current folder of this test: all but the token ids, which are beside the mixture, is its own."""
    for name in ("micro", "store", "pairs.jsonl", "chats.jsonl"):
        (tmp_path / name).symlink_to(workshop / name)
    shutil.copy(workshop / "tiny.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFMIX_STORE", "store")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def train(shop: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs `prefmix train` on the tiny recipe."""

    def call(*arguments: object) -> Said:
        code = run(["train", "tiny.toml", *map(str, arguments)])
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def finished(shop: Path, workshop: Path) -> Path:
    """The folder of a run of the tiny recipe that has ended: `--resume` has nothing left to do."""
    return Path(shutil.copytree(workshop / "finished" / "tiny", shop / "runs" / "tiny"))


def recipe_of(shop: Path, *stages: str, train: str = TRAIN) -> None:
    (shop / "tiny.toml").write_text(RECIPE + train + "".join(stages))


# A run


def test_a_run_ends_with_its_stages_the_eos_and_what_to_do_next(train: Callable[..., Said], shop: Path) -> None:
    said = train()
    assert said.code == 0, said.err
    assert re.fullmatch(r"tiny  trained on tiny@v1 in \d+\.\d s, from micro", said.lines[0])
    assert said.lines[1] == "runs/tiny"
    figures = r" +(\d+) +2 +\d+\.\d{4} → \d+\.\d{4} +[\d.]+ +[\d,]+ +\d+\.\d s +[\d.]+ [MG]B"
    rows = {name: re.search(f"^{name}{figures}$", said.out, re.MULTILINE) for name in ("dpo", "sft")}
    assert {name: int(found[1]) for name, found in rows.items() if found} == {"dpo": 30, "sft": 26}
    eos = r" +0\.0000 → 0\.0000 +-1\d\.\d{3} → -1\d\.\d{3} +0\.0% → 0\.0% +8 of 8"
    assert len(re.findall(f"^(?:dpo|sft){eos}$", said.out, re.MULTILINE)) == 2
    assert "Does the model end its turns?   on 4 rows of test" in said.lines
    assert "below: 0.0% of the answers end by themselves; 95.0% are asked for" in said.lines
    note, warning = said.err.splitlines()
    assert note == "note: Its own chat template is replaced by plain ChatML, without a default system prompt."
    assert warning.startswith(
        'warning: the model does not end its turns often enough. What helps: more rows or steps in sft; an "sft" term'
    )
    for stage in ("dpo", "sft"):
        assert (shop / "runs" / "tiny" / stage / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("finished")
def test_every_command_that_a_run_proposes_is_there(train: Callable[..., Said]) -> None:
    said = train("--resume", "--store", "store")
    proposed = [shlex.split(line) for line in said.lines[said.lines.index("Next:") + 1 :]]
    assert [words[1:3] for words in proposed] == [
        *([name, "runs/tiny"] for name in ("chat", "merge")),
        *([name, "tiny@v1"] for name in ("show", "contamination")),
    ]
    assert all(words[words.index("--store") + 1] == "store" for words in proposed if words[1] != "chat")
    assert run(["show", "tiny@v1", "--store", "store"]) == 0


def test_json_is_one_document_with_the_keys_of_the_page(train: Callable[..., Said], finished: Path) -> None:
    said = train("--resume", "--json")
    assert (said.code, said.err) == (0, "")
    document = json.loads(said.out)
    assert list(document) == documented_keys("train --json")
    assert (document["passed"], document["stop_rate"], document["min_stop_rate"]) == (False, 0.0, 0.95)
    assert document["mixture"]["version"] == "v1"
    assert len(document["notes"]) == 1
    for entry, name in zip(document["stages"], ("dpo", "sft"), strict=True):
        folder = finished / name
        assert (entry["folder"], entry["was_there"]) == (f"runs/tiny/{name}", True)
        assert entry["run"] == json.loads((folder / "run.json").read_text())
        assert entry["eos"] == json.loads((folder / "eos.json").read_text())


@pytest.mark.usefixtures("finished")
def test_quiet_is_one_line(train: Callable[..., Said]) -> None:
    below, passed = train("-q", "--resume"), train("-q", "--resume", "--set", "train.eos.min_stop_rate=0")
    assert below.out == "runs/tiny: 0.0% of the answers end by themselves, below the 95.0% that are asked for\n"
    assert passed.out == "runs/tiny: 0.0% of the answers end by themselves, as asked for\n"
    assert below.err == passed.err == ""


@pytest.mark.usefixtures("finished")
def test_the_mixture_that_is_named_is_trained_on(train: Callable[..., Said], shop: Path) -> None:
    build = json.loads((shop / "store" / "tiny" / "versions.json").read_text())["v1"]["build"]
    changed = ("--resume", "--set", "splits.test=0.1")
    assert train("-q", *changed).code == 1
    said = train(*changed, "--mixture", f"store/tiny/{build}")
    assert said.code == 0
    assert f"prefmix show store/tiny/{build}" in said.out


@pytest.mark.usefixtures("finished")
def test_a_mixture_on_the_hub_is_pulled_and_trained_on(
    train: Callable[..., Said], loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefmix.publish import open_mixture, push

    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    push(open_mixture("tiny", "store"), "someone/tiny")
    said = train("--resume", "--mixture", "hub:someone/tiny@v1", "--store", "pulled")
    assert said.code == 0, said.err
    assert "  prefmix show tiny@v1 --store pulled" in said.lines


@pytest.mark.usefixtures("finished")
def test_of_several_processes_one_reports_and_the_others_tell_errors_of_their_own(
    train: Callable[..., Said], shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefmix.cli.trains._GIVE_WAY_S", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    quiet = [train("--resume", *words) for words in ([], ["--json"], ["-q"])]
    assert [(said.code, said.out, said.err) for said in quiet] == [(0, "", "")] * 3
    recipe_of(shop, DPO, SFT, train=GATE)
    assert [train("--resume").code, train("--set", "seed=x").code] == [0, 2], "the gate is told by the first one"
    failed = train("--resume", "--set", "seed=7")
    assert (failed.code, failed.out) == (1, "")
    assert failed.err.startswith("error: process 1: No mixture")
    monkeypatch.setenv("RANK", "0")
    assert "Next:" in train("--resume").lines


def test_a_dry_run_estimates_and_trains_nothing(train: Callable[..., Said], shop: Path) -> None:
    said = train("--dry-run", "--set", "train.stages.0.max_length=28")
    assert said.code == 0
    assert re.fullmatch(r"tiny  an estimate: nothing was trained  \d+\.\d s", said.lines[0])
    assert said.lines[1].startswith("micro: 3,")
    for line in (
        r"dpo +\d+ +2 +[\d.]+ +\d+ +[\d,]+ +\d+ +none",
        r"dpo: left out: tokens/too_long \d+; packed, .*",
        r"weights +([\d.]+ MB) +\1 .*",
        r"in all +[\d.]+ [MG]B +[\d.]+ [MG]B",
        r"micro-batches of at most 1,024 tokens",
        r"H100 80 GB +[\d.]+ GB +[\d,]+ +<1 min +<1 min +<1 min",
    ):
        assert re.search(f"^{line}$", said.out, re.MULTILINE), (line, said.out)
    assert said.lines[-1].startswith("  prefmix train tiny.toml --set train.stages.0.max_length=28  train it")
    assert not (shop / "runs").exists()
    assert re.fullmatch(r"tiny: 4 steps, [\d.]+ [MG]B of memory on cpu\n", train("--dry-run", "-q").out)


@pytest.mark.usefixtures("finished")
def test_json_of_a_dry_run_has_the_keys_of_the_page_and_the_figures_of_the_run(
    train: Callable[..., Said], finished: Path
) -> None:
    document = json.loads(train("--dry-run", "--json").out)
    assert list(document) == documented_keys("train --dry-run --json")
    for stage in document["stages"]:
        run = json.loads((finished / stage["stage"] / "run.json").read_text())
        assert [stage[key] for key in ("rows", "steps", "tokens")] == [run[key] for key in ("rows", "steps", "tokens")]


# What is refused


def test_a_recipe_without_training_or_with_mistakes_is_a_usage_error(train: Callable[..., Said], shop: Path) -> None:
    recipe_of(shop, train="")
    assert train().err == (
        f"error: {(shop / 'tiny.toml').resolve()} has no [train]: name a base model and at least one stage.\n"
    )
    recipe_of(shop, DPO, "beat = 0.1\n")
    wrong = train()
    assert wrong.code == 2
    assert "unknown key (did you mean `beta`?)" in wrong.err
    both = train("--resume", "--force")
    assert (both.code, both.out) == (2, "")
    assert "exclude each other" in both.err


def test_a_recipe_without_a_mixture_is_told_to_be_built(train: Callable[..., Said], shop: Path) -> None:
    told = f"was built from {(shop / 'tiny.toml').resolve()} as it is now. Run `prefmix build` first"
    changed, empty = train("--set", "splits.test=0.1"), train("--store", "nowhere")
    assert (changed.code, empty.code) == (1, 1)
    assert told in changed.err
    assert told in empty.err
    unknown = train("--mixture", "tiny@v9")
    assert unknown.code == 1
    assert "tiny@v9 does not exist. Versions of tiny: v1." in unknown.err
    assert not (shop / "runs").exists()


def test_a_mixture_with_a_flipped_byte_is_not_trained_on(train: Callable[..., Said], shop: Path) -> None:
    (shop / "store").unlink()
    assert run(["build", "tiny.toml", "-q"]) == 0
    (file,) = shop.glob("store/tiny/*/preference/train-*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = train()
    assert said.code == 1
    assert str(file.relative_to(shop)) in said.err
    assert not (shop / "runs").exists()


def test_a_base_that_is_not_there_is_told(train: Callable[..., Said]) -> None:
    said = train("--set", "train.base=nowhere/micro")
    assert said.code == 1
    assert "nowhere/micro" in said.err
    assert "Traceback" not in said.err


def test_a_base_without_chatml_is_refused_with_the_remedy(train: Callable[..., Said], shop: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_tokens(sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.add_special_tokens(["<unk>"])
    shutil.copytree(shop / "micro", shop / "plain", ignore=lambda *_: ["chat_template.jinja"])
    backend.save(str(shop / "plain" / "tokenizer.json"))
    (shop / "plain" / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}')
    said = train("--set", "train.base=plain")
    assert said.code == 1
    assert "`add_tokens = true`" in said.err


@pytest.mark.usefixtures("finished")
def test_a_stage_that_is_there_is_kept_unless_it_is_to_be_resumed_or_replaced(
    train: Callable[..., Said], shop: Path
) -> None:
    again = train()
    assert again.code == 1
    assert again.err.startswith("error: runs/tiny/dpo is there already. Go on with --resume, start again with --force")
    resumed = train("--resume")
    assert resumed.code == 0
    assert resumed.out.count("finished before") == 2
    changed = train("--resume", "--set", "train.stages.0.learning_rate=1e-4")
    assert changed.code == 1
    assert "hyperparameters.learning_rate: was 0.001, is 0.0001" in changed.err
    recipe_of(shop, DPO)
    replaced = train("--force", "--set", "train.stages.0.max_steps=1", "--set", "train.stages.0.max_length=28")
    assert replaced.code == 0
    assert re.search(r"^dpo: left out: tokens/too_long \d+$", replaced.out, re.MULTILINE)
    assert json.loads((shop / "runs/tiny/dpo/run.json").read_text())["steps"] == 1


def test_a_tracker_that_is_not_installed_is_told_before_anything_runs(
    train: Callable[..., Said], shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefmix.cli.trains.find_spec", lambda name: None)
    said = train("--report-to", "trackio")
    assert (said.code, said.out) == (1, "")
    assert (
        said.err
        == "error: --report-to trackio needs trackio, which is not installed. Install it: pip install trackio\n"
    )
    assert not (shop / "runs").exists()


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from prefmix.__main__ import main
main()
"""
INSTALL = 'which is not installed. Install it: pip install "prefmix[train]"'


def test_without_the_extra_it_is_said_what_to_install(shop: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "train", "tiny.toml"]
    done = subprocess.run(command, cwd=shop, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: prefmix train needs torch, {INSTALL}\n"


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ([], 2, "has no [train]: name a base model"),
        (["--set", "splits.test=0.1", "--set", "train.base=micro"], 1, "Run `prefmix build` first"),
        (["--set", "train.base=micro", "--mixture", "tiny@v9"], 1, "tiny@v9 does not exist"),
    ],
)
def test_what_is_wrong_with_the_recipe_or_the_mixture_is_told_before_torch_is_imported(
    shop: Path, changes: list[str], code: int, told: str
) -> None:
    recipe_of(shop, *([DPO] if changes else []), train="")
    command = [sys.executable, "-c", WITHOUT_TORCH, "train", "tiny.toml", *changes]
    done = subprocess.run(command, cwd=shop, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr


def test_a_package_that_is_missed_later_is_named_too(
    train: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    said = train("--json")
    assert (said.code, said.err) == (1, f"error: prefmix train needs bitsandbytes, {INSTALL}\n")


# The gate


GATE = TRAIN.replace("eos = { ", 'eos = { on_fail = "stop", ')
REPAIR = TRAIN.replace("eos = { ", 'eos = { on_fail = "repair", ')


@pytest.mark.usefixtures("finished")
def test_a_gate_that_stops_exits_with_3_after_its_report(train: Callable[..., Said], shop: Path) -> None:
    recipe_of(shop, DPO, SFT, train=GATE)
    said, document = train("--resume"), train("--resume", "--json")
    assert (said.code, document.code) == (3, 3)
    assert "below: 0.0% of the answers end by themselves; 95.0% are asked for" in said.lines
    assert "Next:" in said.lines
    told = (
        "error: 0% of the answers end by themselves, 95% are asked for ([train.eos] min_stop_rate). "
        "The run is in runs/tiny; see eos.json of its stages."
    )
    assert said.err.splitlines()[-1] == told
    assert document.err.splitlines() == [told]
    assert json.loads(document.out)["passed"] is False
    assert train("--resume", "-q", "--set", "train.eos.min_stop_rate=0").code == 0


@pytest.mark.parametrize(("asked", "runs"), [(0.95, True), (0.0, False)])
def test_a_stage_that_repairs_runs_only_when_it_is_needed(
    train: Callable[..., Said], shop: Path, finished: Path, asked: float, runs: bool
) -> None:
    shutil.rmtree(finished / "sft")
    recipe_of(shop, DPO, SFT, "if_needed = true\n", train=REPAIR)
    said = train("--resume", "--set", f"train.eos.min_stop_rate={asked}")
    assert said.code == 0
    assert (finished / "sft").exists() == runs
    assert ("sft: not run, the model ends its turns without it" in said.lines) == (not runs)
    assert ("warning" in said.err) == runs


def test_a_stage_that_repairs_does_not_run_where_the_gate_only_warns(
    train: Callable[..., Said], shop: Path, finished: Path
) -> None:
    shutil.rmtree(finished / "sft")
    recipe_of(shop, DPO, SFT, "if_needed = true\n")
    document = json.loads(train("--resume", "--json").out)
    assert (document["skipped"], document["passed"]) == (["sft"], False)


# Ctrl-C


def started(shop: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "prefmix", "train", "tiny.toml", *arguments],
        cwd=shop,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_says_how_the_run_goes_on_and_it_does(train: Callable[..., Said], shop: Path) -> None:
    recipe_of(shop, SFT)
    longer = ("--set", "train.stages.0.max_steps=40", "--set", "train.stages.0.checkpoint_every=4")
    folder = Path("runs/tiny/sft")
    with started(shop, *longer) as process:
        while not (folder / "checkpoints" / "checkpoint-8").is_dir():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        since = time.monotonic()
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert time.monotonic() - since < 2
    pattern = r"interrupted: in the stage sft, at step (\d+) of 40; `prefmix train (.*)` goes on from (.*)-(\d+)"
    told = re.fullmatch(pattern, err.splitlines()[-1])
    assert told, err
    assert shlex.split(told[2]) == ["tiny.toml", "--resume", *longer]
    assert told[3] == str(folder / "checkpoints" / "checkpoint")
    assert 40 > int(told[1]) >= int(told[4]) >= 8
    before = (folder / "metrics.jsonl").read_text().splitlines()
    assert train("--resume", "-q", *longer).code == 0
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    assert metrics[: int(told[4])] == before[: int(told[4])]  # with their times: these steps were not run again
    assert [line["step"] for line in map(json.loads, metrics) if "loss" in line] == list(range(1, 41))


@pytest.fixture
def _sigint() -> Iterator[None]:
    """Puts back the answer to Ctrl-C, which a command that was interrupted leaves switched off."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize(
    ("moment", "told"),
    [
        (
            ("prefmix.train.stage", "trainer_of"),
            "in the stage dpo, at step 0 of 2; there is no checkpoint of it yet: "
            "`prefmix train tiny.toml --resume` starts this stage again",
        ),
        (("prefmix.train.run", "load_tokenizer"), "nothing was trained"),
    ],
)
def test_ctrl_c_before_the_first_checkpoint_says_so(
    train: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, moment: tuple[str, str], told: str
) -> None:
    let_go = threading.Event()

    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        let_go.wait()
        raise TrainError("this comes too late for anybody to see")

    module, name = moment
    monkeypatch.setattr(sys.modules[module], name, interrupted)
    said = train()
    let_go.set()
    assert (said.code, said.out) == (130, "")
    assert said.err.splitlines()[-1] == f"interrupted: {told}"


# The screen


def test_the_figures_of_a_step_and_of_the_last_measurement() -> None:
    metrics = {
        "loss": 0.51234,
        "rewards/margins": 0.25,
        "rewards/accuracies": 0.875,
        "rows_per_s": 12.34,
        "tokens_per_s": 8123.4,
        "eval_p_eos": 0.9814,
        "eval_stop_rate": 0.95,
        "grad_norm": 1.0,
    }
    step, measured = figures_of(metrics, "pairs")
    assert step == ["loss 0.5123", "margin 0.250", "accuracy 88%", "12.3 pairs/s", "8,123 tokens/s"]
    assert measured == ["P(EOS) 0.981", "stop rate 95%"]
    assert figures_of({"loss": 1.0}, "rows") == (["loss 1.0000"], [])


DPO_STAGE = {"name": "dpo", "method": "dpo"}
SFT_STAGE = {"name": "eos", "method": "sft"}


@pytest.mark.parametrize(
    ("stages", "ways"),
    [
        ([{**DPO_STAGE, "loss": "sigmoid"}], ["an sft stage at the end", 'an "sft" term', "a lower learning rate"]),
        (
            [{**DPO_STAGE, "loss": ["sigmoid", "sft"]}, SFT_STAGE],
            ["more rows or steps in eos", "a lower learning rate"],
        ),
        ([{**DPO_STAGE, "loss": ["sigmoid_norm", "sft"]}], ["an sft stage at the end", "a lower learning rate"]),
    ],
)
def test_what_is_proposed_is_what_the_recipe_does_not_have(stages: list[dict[str, object]], ways: list[str]) -> None:
    settings = Train.model_validate({"base": "b", "stages": stages})
    text = advice(settings, {"cut": 0, "n": 8, "p_eos": 0.2})
    every = ["an sft stage at the end", "more rows or steps in eos", 'an "sft" term', "a lower learning rate"]
    assert [way for way in every if way in text] == sorted(ways, key=every.index)
    assert "max_new_tokens" not in text
    assert "8 of 8 answers were cut at 256 tokens" in advice(settings, {"cut": 8, "n": 8, "p_eos": 0.9})


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_terminal_shows_work_steps_and_figures_and_is_clean_afterwards(shop: Path) -> None:
    import pty

    recipe_of(shop, DPO)
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prefmix", "train", "tiny.toml"]
    with subprocess.Popen(command, cwd=shop, env=environment, stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        shown = b""
        try:
            while chunk := os.read(master, 65536):
                shown += chunk
        except OSError:  # how Linux says that the other side is closed
            pass
        out = process.stdout.read() if process.stdout else b""
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert process.returncode == 0
    assert b"\x1b" not in out
    for part in ("starting", "loading the model", "measuring the EOS", "2/2 steps", "ETA", "loss 0."):
        assert part in text
    bars, warning = text.rsplit("warning: ", 1)
    assert bars.count("note: ") == 1
    assert "━" not in warning
