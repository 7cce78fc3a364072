"""Several processes, launched as the files of recipes/launch do it: on a CPU, over gloo, two "nodes" as two agents of torchrun
on loopback. What they train is what one process trains, each row goes to one of them once an epoch, one of them speaks."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets.table import MemoryMappedTable
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import byte_tokenizer, micro_llama

from prefmix.build import build
from prefmix.errors import TrainError
from prefmix.recipe import load_recipe
from prefmix.store import open_mixture
from prefmix.train import processes
from prefmix.train.loop import conversations
from prefmix.train.run import train
from prefmix.train.steps import best_fit, by_budget, plan_steps, share_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

LAUNCH = Path(__file__).parent.parent / "recipes" / "launch"
BESIDE = Path(sys.executable).parent  # torchrun, accelerate, prefmix
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
RECIPE = """
name = "tiny"
[sources.pairs]
path = "pairs.jsonl"
format = "orca_dpo_pairs"
[sources.chats]
path = "chats.jsonl"
format = "openhermes"
[splits]
test = 0.2
[train]
base = "base"
quantization = "none"
dtype = "float32"
lora = { r = 4, alpha = 8, dropout = 0.0 }
eos = { prompts = 2, max_new_tokens = 3, min_stop_rate = 0.0 }
[[train.stages]]
name = "dpo"
method = "dpo"
batch_size = 7
learning_rate = 1e-2
token_budget = 200
loss = ["sigmoid", "sft"]
loss_weights = [1.0, 0.1]
checkpoint_every = 1
[[train.stages]]
name = "eos"
method = "sft"
epochs = 2.0
batch_size = 5
learning_rate = 1e-2
token_budget = 200
eval_every = 4
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two sources of our own words, a recipe, its mixture, and the runs of one process in `one`."""
    home = tmp_path_factory.mktemp("home")
    micro_llama(home / "base", tokenizer=byte_tokenizer(tmp_path_factory.mktemp("bytes")))
    pairs = [
        {"system": "", "question": f"Count to {word} by {step}.", "chosen": f"{word} " * step, "rejected": "No" * step}
        for word in WORDS
        for step in (1, 2, 3)
    ]
    chats = [
        {"instruction": f"What comes after {word}?", "input": "", "output": after} for word, after in pairwise(WORDS)
    ] + [{"instruction": f"Spell {word}.", "input": "", "output": "-".join(word)} for word in WORDS]
    for name, rows in (("pairs", pairs), ("chats", chats)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "recipe.toml").write_text(RECIPE)
    build(home / "recipe.toml", store=home / "store")
    train(load_recipe(home / "recipe.toml", [f"train.output={json.dumps(str(home / 'one'))}"]), store=home / "store")
    return home


@dataclass(frozen=True)
class Said:
    """What a launched command said, and what its processes were seen to do, by rank."""

    code: int
    out: str
    err: str
    seen: dict[str, list[dict]]

    @property
    def told(self) -> list[str]:
        """The lines of stderr that are not of torch's own log."""
        return [line for line in self.err.splitlines() if not re.match(r"\[?[WIE]\d{4} ", line)]

    def all(self, key: str) -> list[tuple[str, dict]]:
        """(rank, line) of all that was seen of one sort."""
        return [(rank, line) for rank, lines in self.seen.items() for line in lines if key in line]


def launched(runs: Path, cwd: Path, *commands: Sequence[str], **environment: str) -> list[Said]:
    """Runs commands at the same time, one for each node, beside the spy. `runs` is the folder of what they train."""
    spy = runs.parent / f"{runs.name}-spied-{time.monotonic_ns()}"
    spy.mkdir(parents=True)
    known = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    known |= {
        "PATH": f"{BESIDE}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parent / "launch_spy"),
        "OMP_NUM_THREADS": "1",
        "SPY": str(spy),
        "SPY_RUNS": str(runs),
        **environment,
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [subprocess.Popen(list(command), cwd=cwd, env=known, **pipes) for command in commands]
    try:
        said = [agent.communicate(timeout=600) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    seen = {path.stem: lines(path) for path in sorted(spy.glob("*.jsonl"))}
    return [Said(agent.returncode, out, err, seen) for agent, (out, err) in zip(agents, said, strict=True)]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def free_port() -> int:
    """A port that nobody listens on, among those that slurm.sbatch makes of a job's number."""
    for port in range(29500 + os.getpid() % 500, 30500):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("all ports are taken")


def asked(runs: Path, *words: str) -> list[str]:
    """The arguments of `prefmix train`."""
    return ["recipe.toml", "--store", "store", "--set", f"train.output={json.dumps(str(runs))}", *words]


def one_node(home: Path, runs: Path, *words: str, **environment: str) -> list[Said]:
    command = [str(LAUNCH / "one-node.sh"), *asked(runs, *words)]
    return launched(runs, home, command, PROCESSES="2", **environment)


def several_nodes(home: Path, runs: Path, *words: str, **environment: str) -> list[Said]:
    command = [str(LAUNCH / "several-nodes.sh"), *asked(runs, *words)]
    meeting = {"HEAD": "127.0.0.1", "NODES": "2", "PROCESSES": "1", "PORT": str(free_port())}
    return launched(runs, home, command, command, **meeting, **environment)


def slurm(home: Path, runs: Path, *words: str, **environment: str) -> list[Said]:
    """The job's script, with stand-ins for SLURM's commands: its two nodes are two processes of this machine."""
    bin = runs.parent / "slurm-bin"
    bin.mkdir(exist_ok=True)
    told = '[ "$1" = --kill-on-bad-exit=1 ] || exit 64; shift; "$@" & first=$!; "$@"; second=$?; wait $first && exit $second'
    for name, text in (("srun", told), ("scontrol", '[ "$*" = "show hostnames 127.0.0.[1-2]" ] && echo 127.0.0.1')):
        (bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "127.0.0.[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    job |= {"SLURM_JOB_ID": str(free_port() - 29500 + 4_000), "PATH": f"{bin}:{BESIDE}:{os.environ['PATH']}"}
    return launched(runs, home, ["sh", str(LAUNCH / "slurm.sbatch"), *asked(runs, *words)], **job, **environment)


def accelerate(home: Path, runs: Path, *words: str) -> list[Said]:
    config = LAUNCH / "accelerate-one-node.yaml"
    command = ["accelerate", "launch", "--config_file", str(config), "--num_processes", "2", "--main_process_port", "0"]
    return launched(runs, home, [*command, "-m", "prefmix", "train", *asked(runs, *words)])


def accelerate_several(home: Path, runs: Path, *words: str) -> list[Said]:
    config = LAUNCH / "accelerate-several-nodes.yaml"
    command = ["accelerate", "launch", "--config_file", str(config), "--num_processes", "2"]
    command += ["--main_process_port", str(free_port()), "--main_process_ip", "127.0.0.1", "--machine_rank"]
    nodes = [[*command, rank, "-m", "prefmix", "train", *asked(runs, *words)] for rank in ("0", "1")]
    return launched(runs, home, *nodes)


LAUNCHED = {
    "one-node.sh": one_node,
    "several-nodes.sh": several_nodes,
    "slurm.sbatch": slurm,
    "accelerate-one-node.yaml": accelerate,
    "accelerate-several-nodes.yaml": accelerate_several,
}


def test_every_launch_file_is_launched_here_and_is_short():
    assert {path.name for path in LAUNCH.iterdir()} == set(LAUNCHED)
    assert all(len(path.read_text().splitlines()) <= 20 for path in LAUNCH.iterdir())


def rows_of(home: Path, subset: str) -> list[str]:
    return open_mixture("tiny", home / "store").scan(subset, "train").collect()["id"].to_list()


def check_same_run(home: Path, runs: Path) -> None:
    """The steps, losses, measurements and weights of a run are those of one process."""
    for stage in ("dpo", "eos"):
        one, several = home / "one" / "tiny" / stage, runs / "tiny" / stage
        record, found = (json.loads((folder / "run.json").read_text()) for folder in (one, several))
        assert (record["hardware"]["processes"], found["hardware"]["processes"]) == (1, 2)
        assert all(found[key] == record[key] for key in ("rows", "steps", "epochs", "tokens", "left_out"))
        metrics = [lines(folder / "metrics.jsonl") for folder in (one, several)]
        for expected, line in zip(*metrics, strict=True):
            for name in (
                "rewards/accuracies",
                "rows_per_s",
                "tokens_per_s",
            ):  # a sign, of margins that begin at 0; times
                expected.pop(name, None)
            assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)
        adapter = "adapter/adapter_model.safetensors"
        expected, weights = load_file(one / adapter), load_file(several / adapter)
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=2e-3, atol=2e-4)


def check_rows(home: Path, said: Said) -> None:
    """Every row went to one process once an epoch, and both processes had their share."""
    for stage, subset, epochs in (("dpo", "preference", 1), ("eos", "sft", 2)):
        lines = [(rank, line) for rank, line in said.all("stage") if line["stage"] == stage]
        count = Counter(row for _, line in lines for row in line["rows"])
        assert count == dict.fromkeys(rows_of(home, subset), epochs)
        shares = Counter(rank for rank, line in lines for _ in line["rows"])
        steps = len({line["step"] for _, line in lines})
        assert set(shares) == {"0", "1"}
        assert abs(shares["0"] - shares["1"]) <= steps, "they differ by a row in each step at most"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAUNCHED if name != "slurm.sbatch"])  # that one is killed below
def test_a_launch_file_trains_what_one_process_trains(home: Path, tmp_path: Path, name: str):
    shutil.rmtree(home / "store" / "tiny" / ".tokens")
    as_json = ["--json"] if name == "accelerate-one-node.yaml" else []
    runs = tmp_path / "runs"
    first, *others = LAUNCHED[name](home, runs, *as_json)
    for said in (first, *others):
        assert (said.code, said.told) == (0, []), said.err
    if as_json:
        assert json.loads(first.out)["stages"][1]["run"]["hardware"]["processes"] == 2
    else:
        told = [said.out for said in (first, *others) if said.out]
        assert len(told) == 1, "one process reports"
        assert told[0].count("trained on tiny@v1") == told[0].count("Next:") == 1
    check_same_run(home, runs)
    check_rows(home, first)
    tokens = Counter(line["tokens"] for _, line in first.all("tokens"))
    assert set(tokens.values()) == {1}, "each token file was made by one of them, the others mapped it"
    assert len(tokens) == 4
    if name.startswith("accelerate-one"):  # nobody has made them before
        assert {rank for rank, _ in first.all("tokens")} == {"0"}
    assert {rank for rank, _ in first.all("wrote")} == {"0"}, (
        "the others write their random states, from Rust, and no more"
    )


@pytest.mark.slow
def test_when_a_process_is_killed_the_other_node_says_so_and_ends_and_both_resume(home: Path, tmp_path: Path):
    runs = tmp_path / "runs"
    (said,) = slurm(home, runs, SPY_KILL="1 dpo 2")
    ended = time.time()
    assert said.code != 0
    ((_, line),) = said.all("killed")
    assert ended - line["killed"] < 60
    assert "Signal 9 (SIGKILL)" in said.err
    errors = [line for line in said.told if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith("error: process 0: another process of this run has ended")
    assert "--resume goes on" in errors[0]
    assert said.out == ""

    (resumed,) = slurm(home, runs, "--resume")
    assert (resumed.code, resumed.told) == (0, []), resumed.err
    assert resumed.out.count("trained on tiny@v1") == 1
    check_same_run(home, runs)
    steps = {line["step"] for _, line in resumed.all("stage") if line["stage"] == "dpo"}
    assert min(steps) == 2, "it went on where the last checkpoint was"


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_makes_the_tokens_ends_the_run(home: Path, tmp_path: Path):
    shutil.rmtree(home / "store" / "tiny" / ".tokens")
    command = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "prefmix", "train", *asked(tmp_path / "runs")]
    (said,) = launched(tmp_path / "runs", home, command, SPY_KILL="0 tokens")
    assert said.code == 1
    assert "Signal 9 (SIGKILL)" in said.err
    ((_, line),) = said.all("killed")
    assert time.time() - line["killed"] < 60
    assert not any((home / "store" / "tiny" / ".tokens").glob("*.arrow"))


def test_a_mistake_in_a_recipe_is_told_once_with_its_line_and_exit_code_2(home: Path, tmp_path: Path):
    (said,) = one_node(home, tmp_path / "runs", "--set", "train.stages.0.beat=0.1")
    assert (said.code, said.out, len(said.told)) == (2, "", 1)
    assert re.match(r"error: .*train\.stages\.0\.beat.*: unknown key \(did you mean `beta`\?\)", said.told[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "train.stages.0.beat=0.1"), "unknown key (did you mean `beta`?)"),
        (("--mixture", "tiny@v9"), "tiny@v9 does not exist"),
    ],
)
def test_what_all_processes_find_wrong_is_told_by_one(home: Path, tmp_path: Path, words: Sequence[str], message: str):
    command = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "prefmix", "train"]
    (said,) = launched(tmp_path / "runs", home, [*command, *asked(tmp_path / "runs", *words)])
    assert said.code == 1, "torchrun gives no other"
    assert said.out == ""
    errors = [line for line in said.told if line.startswith("error:")]
    assert len(errors) == 1
    assert said.err.count(message) == 1
    assert said.told[0] == errors[0], "above what torchrun adds"


@pytest.mark.slow
def test_nodes_that_share_no_disk_for_the_run_are_refused(home: Path, tmp_path: Path):
    """Each node has the recipe, the base and the mixture in a folder of its own, and `runs` is relative to it."""
    port = free_port()
    command = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=apart"]
    command += [f"--rdzv-endpoint=127.0.0.1:{port}", "-m", "prefmix", "train", "recipe.toml", "--store", "store"]
    for node in ("a", "b"):
        shutil.copytree(home, tmp_path / node, ignore=shutil.ignore_patterns("one", ".tokens"))
    script = f'cd "$0" && exec {" ".join(command)}'
    nodes = launched(tmp_path / "x", tmp_path, *(["sh", "-c", script, node] for node in ("a", "b")))
    assert [said.code for said in nodes] == [1, 1]
    told = [line for said in nodes for line in said.told if "does not see the folder runs/tiny of process 0" in line]
    assert len(told) in (1, 2)
    assert all(
        re.match(r"error: (process 1: )?Process 1 on \S+ does not see .*--set train.output", line) for line in told
    )
    assert not any(path.is_file() for node in ("a", "b") for path in (tmp_path / node).glob("runs/**/*"))


def test_processes_that_do_not_reach_each_other_are_told_to_name_their_network(monkeypatch: pytest.MonkeyPatch):
    def unreachable():
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:152] Connection refused, remote=[127.0.1.1]:1")

    monkeypatch.setattr(processes, "wait", unreachable)
    with pytest.raises(TrainError, match="GLOO_SOCKET_IFNAME"):
        processes.join()


@given(
    rows=st.integers(1, 60),
    world=st.integers(1, 9),
    batch=st.integers(1, 20),
    epochs=st.integers(1, 3),
    budget=st.integers(1, 400),
    packs=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_row_goes_to_one_process_once_an_epoch_whatever_the_numbers(
    rows: int, world: int, batch: int, epochs: int, budget: int, packs: bool, seed: int
):
    lengths = np.random.default_rng(seed).integers(1, 100, rows)
    ids = [f"{number:032x}" for number in range(rows)]
    steps = plan_steps(ids, seed=seed, stage="dpo", batch_size=batch, epochs=epochs)
    trained: Counter[int] = Counter()
    for step in range(len(steps)):
        numbers = steps.rows(step)
        for rank in range(world):
            mine = numbers[share_of(lengths[numbers], rank, world)]
            sizes = lengths[mine]
            for micro in best_fit(sizes, budget) if packs else by_budget(sizes, budget):
                trained.update(mine[micro].tolist())
    assert trained == dict.fromkeys(range(rows), epochs)


def tokens_in(path: Path, labels: Sequence[Sequence[int]], a_batch: int) -> datasets.Dataset:
    """A memory-mapped table as train/data.py writes it."""
    schema = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, len(labels), a_batch):
            part = pa.array(labels[start : start + a_batch], pa.list_(pa.int32()))
            ids = [str(start + number) for number in range(len(part))]
            writer.write_batch(pa.record_batch([pa.array(ids), part, part], schema=schema))
    return datasets.Dataset(MemoryMappedTable.from_file(str(path)), fingerprint="tokens")


@given(st.lists(st.lists(st.sampled_from([-100, 7]), min_size=1, max_size=9), min_size=1, max_size=30), st.data())
def test_the_answers_of_each_row_are_counted_in_every_part_of_a_table(tmp_path_factory, labels, data):
    table = tokens_in(tmp_path_factory.mktemp("rows") / "t.arrow", labels, data.draw(st.integers(1, 8)))
    kept = data.draw(st.integers(1, len(labels)))
    rows = conversations(table.select(range(kept)))
    assert rows.answers.tolist() == [row.count(7) for row in labels[:kept]]
    assert rows.lengths.tolist() == [len(row) for row in labels[:kept]]


def test_a_process_keeps_numbers_of_the_rows_in_memory_and_not_their_tokens(tmp_path: Path):
    table = tokens_in(tmp_path / "tokens.arrow", [[number % 100] * 1000 for number in range(4096)], 64)
    tokens = 4096 * 1000
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    rows = conversations(table)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.answers.sum() == tokens
    assert peak + pa.total_allocated_bytes() - before < tokens, (
        "less than a byte a token, where one takes eight on the disk"
    )
