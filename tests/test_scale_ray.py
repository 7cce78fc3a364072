"""Builds on Ray: on this machine and on two nodes on loopback, the mixture of the build in memory, whatever dies meanwhile."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from test_scale import BENCHMARK, LITTLE, assert_same, rows, write_lines
from test_tokens import byte_level

import prefmix
from prefmix import scale
from prefmix.build import Means
from prefmix.errors import BuildError, SourceError, UsageError
from prefmix.mixture import Mixture
from prefmix.plan import plan
from prefmix.recipe import load_recipe
from prefmix.scale import cluster
from prefmix.scale.job import Job
from prefmix.scale.scratch import Scratch
from prefmix.store import Store

needs_ray = pytest.mark.skipif(
    not shutil.which("ray", path=str(Path(sys.executable).parent)),
    reason="Ray is not installed: pip install 'prefmix[ray]'",
)
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what processes do is read from /proc")
PREFMIX = (sys.executable, "-m", "prefmix")
RECIPE = """name = "parts"
[sources.table]
path = "table.parquet"
[sources.lines]
path = "lines-*.jsonl"
where = "language != 'de'"
take = 0.6
[sources.chats]
format = "openhermes"
path = "chats.json"
repeat = 2
[filter]
injection = "strip"
[dedupe]
exact = "pair"
prompt_cap = 2
across = true
near = { threshold = 0.7, shingle = 3 }
[decontaminate.against.mine]
path = "benchmark.csv"
fields = ["question"]
[splits]
test = 0.2
[format]
tokenizer = "tokenizer"
"""
DROPPED = {"source/invalid", "source/where", "decontaminate/mine", "dedupe/pair", "dedupe/prompt_cap", "dedupe/near",
           "mix/not_sampled"}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of three file types that repeat one another, a benchmark, and a tokenizer."""
    root = tmp_path_factory.mktemp("sources")
    for number in range(2):
        write_lines(root / f"lines-{number}.jsonl", rows(number, 250), broken=2)
    pl.DataFrame(rows(0, 300)).drop("language").write_parquet(root / "table.parquet", row_group_size=64)
    chats = [{"instruction": row["prompt"], "input": "", "output": row["chosen"]} for row in rows(1, 300)]
    (root / "chats.json").write_text(json.dumps(chats), encoding="utf-8")
    pl.DataFrame({"question": BENCHMARK}).write_csv(root / "benchmark.csv")
    (root / "tokenizer").mkdir()
    byte_level().save(f"{root}/tokenizer/tokenizer.json")
    (root / "parts.toml").write_text(RECIPE, encoding="utf-8")
    return root / "parts.toml"


@pytest.fixture(scope="module")
def in_memory(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    built = prefmix.build(recipe, store=tmp_path_factory.mktemp("memory"), means=Means("memory"))
    assert {reason for stage in built.funnel for reason in stage["dropped"]} >= DROPPED
    return built


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Where Ray of these tests has its files and its token: a short path, for its sockets."""
    with (
        tempfile.TemporaryDirectory(prefix="pr-", dir="/tmp", ignore_cleanup_errors=True) as name,
        pytest.MonkeyPatch.context() as patched,
    ):
        (Path(name) / "token").write_text(secrets.token_hex(16))
        patched.setenv("RAY_AUTH_MODE", "token")
        patched.setenv("RAY_AUTH_TOKEN_PATH", f"{name}/token")
        patched.setenv("RAY_TMPDIR", name)
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.delenv("RAY_ADDRESS", raising=False)
        yield Path(name)
        stop_all(name)


@pytest.fixture(scope="module")
def two_nodes(ray_folder: Path) -> Iterator[str]:
    """The address of a cluster of two nodes with a core each, on loopback."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        address = f"127.0.0.2:{free.getsockname()[1]}"
    head = ["--head", f"--port={address.split(':')[1]}", "--node-ip-address=127.0.0.2", "--include-dashboard=false"]
    nodes = []
    try:
        for arguments in ([*head, f"--temp-dir={ray_folder}"], [f"--address={address}", "--node-ip-address=127.0.0.3"]):
            log = ray_folder / f"node-{len(nodes)}.log"
            with log.open("w") as file:
                nodes.append(subprocess.Popen([*command, *arguments], stdout=file, stderr=subprocess.STDOUT))
            wait_for(lambda log=log: "--block" in log.read_text(), 120, log.read_text)
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(60)


def wait_for(happened: Callable[[], Any], seconds: float, told: Callable[[], str] = lambda: "") -> Any:
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, f"it did not happen in {seconds} s. {told()}"
        time.sleep(0.05)
    return found


def of_ray(folder: str | Path, title: str | tuple[str, ...] = "") -> list[int]:
    """The processes of the Ray instances whose token is in a folder, by what they are called."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            ours = f"RAY_AUTH_TOKEN_PATH={folder}/token".encode() in (process / "environ").read_bytes()
        except OSError:  # ended, or somebody else's
            continue
        is_ray = name.startswith("ray::") or "/ray/" in name.split(" ")[0] or "/ray/_private/" in name
        if ours and is_ray and name.startswith(title):
            found.append(int(process.name))
    return found


def stop_all(folder: str) -> None:
    for process in of_ray(folder):
        os.kill(process, signal.SIGKILL)


WORKING = "ray::prefmix"


def command(recipe: Path, store: Path, *options: str, memory: str = f"{LITTLE}") -> list[str]:
    return [*PREFMIX, "build", str(recipe), "--store", str(store), "--engine", "ray", "--memory", memory, *options]


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, "")
    return json.loads(out)


def started(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@needs_ray
@pytest.mark.slow
def test_ray_on_this_machine_gives_the_mixture_of_the_build_in_memory(
    recipe: Path, in_memory: Mixture, ray_folder: Path, tmp_path: Path
) -> None:
    said = finished(started(command(recipe, tmp_path, "--json")))
    assert said["digest"] == in_memory.digest
    assert said["stages"]["near-buckets"]["pieces"] > 10
    assert_same(Store(tmp_path).find("parts"), in_memory)
    assert not list(tmp_path.rglob("*.scratch*"))
    if Path("/proc").is_dir():
        wait_for(lambda: not of_ray(ray_folder, "ray::"), 20)


def interrupt(build: subprocess.Popen[str], store: Path) -> None:
    """Ctrl-C in the middle."""
    wait_for(lambda: any((store / "parts" / ".scratch").glob("*/done/*")), 120)
    build.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, err = build.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert build.returncode == 130
    assert err.startswith("interrupted: nothing was written; the same command goes on")


@needs_ray
@on_linux
@pytest.mark.slow
def test_ctrl_c_ends_at_once_and_ends_the_ray_that_the_build_started(
    recipe: Path, ray_folder: Path, tmp_path: Path
) -> None:
    before = set(of_ray(ray_folder))
    interrupt(started(command(recipe, tmp_path)), tmp_path)
    # Two agents notice only after some time that their node is gone, and then end too.
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    wait_for(lambda: {*of_ray(ray_folder)} <= {*before, *of_ray(ray_folder, agents)}, 20)


@needs_ray
@pytest.mark.slow
def test_two_nodes_share_the_work_and_give_the_same(
    recipe: Path, in_memory: Mixture, two_nodes: str, tmp_path: Path
) -> None:
    said = finished(started(command(recipe, tmp_path, "--address", two_nodes, "--json")))
    assert said["digest"] == in_memory.digest
    assert_same(Store(tmp_path).find("parts"), in_memory)
    assert worked(two_nodes) == {"127.0.0.2", "127.0.0.3"}


def worked(address: str) -> set[str]:
    """The nodes that pieces of work have run on, as Ray has noted them."""
    code = """
import json, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
time.sleep(2)
print(json.dumps([event["pid"] for event in ray.timeline() if "prefmix" in event["name"]]))
"""
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@needs_ray
@on_linux
@pytest.mark.slow
def test_killed_workers_change_nothing(
    recipe: Path, in_memory: Mixture, two_nodes: str, ray_folder: Path, tmp_path: Path
) -> None:
    build = started(command(recipe, tmp_path, "--address", two_nodes, "--json"))
    killed = set()
    while len(killed) < 2 and build.poll() is None:
        at_work = [process for process in of_ray(ray_folder, WORKING) if process not in killed]
        if at_work and any((tmp_path / "parts" / ".scratch").glob("*/done/*")):
            os.kill(at_work[0], signal.SIGKILL)
            killed.add(at_work[0])
            time.sleep(1)
    assert len(killed) == 2
    assert build.poll() is None  # it was in the middle
    finished(build)
    assert_same(Store(tmp_path).find("parts"), in_memory)


@needs_ray
@on_linux
@pytest.mark.slow
def test_a_node_that_is_lost_changes_nothing(
    recipe: Path, in_memory: Mixture, two_nodes: str, ray_folder: Path, tmp_path: Path
) -> None:
    log = ray_folder / "third.log"
    node = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", f"--address={two_nodes}"]
    with log.open("w") as file:
        third = subprocess.Popen(
            [*node, "--node-ip-address=127.0.0.4"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NODE": "third"},
        )
    try:
        wait_for(lambda: "--block" in log.read_text(), 120, log.read_text)
        build = started(command(recipe, tmp_path, "--address", two_nodes, "--json"))
        wait_for(lambda: [p for p in of_ray(ray_folder, WORKING) if b"NODE=third" in environment(p)], 120)
        for process in of_ray(ray_folder):
            if b"NODE=third" in environment(process):
                os.kill(process, signal.SIGKILL)
        finished(build)
    finally:
        third.kill()
        third.wait(60)
    assert_same(Store(tmp_path).find("parts"), in_memory)


def environment(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return b""


@needs_ray
@on_linux
@pytest.mark.slow
def test_ctrl_c_leaves_a_cluster_that_was_there_and_the_next_build_goes_on(
    recipe: Path, in_memory: Mixture, two_nodes: str, ray_folder: Path, tmp_path: Path
) -> None:
    nodes = set(of_ray(ray_folder, "/"))
    interrupt(started(command(recipe, tmp_path, "--address", two_nodes)), tmp_path)
    wait_for(lambda: not of_ray(ray_folder, WORKING), 30)
    said = finished(started(command(recipe, tmp_path, "--address", two_nodes, "--json")))
    assert_same(Store(tmp_path).find("parts"), in_memory)
    assert said["stages"]["prepare"]["done_before"]
    assert set(of_ray(ray_folder, "/")) == nodes


@needs_ray
@on_linux
@pytest.mark.slow
def test_the_memory_of_the_driver_does_not_grow_with_the_texts(two_nodes: str, tmp_path: Path) -> None:
    sizes, peaks = {}, {}
    for length in (1, 10):
        folder = tmp_path / f"{length}"
        folder.mkdir()
        sizes[length] = write_texts(folder, 20_000, 480 * length)
        # As many pieces of work in both builds: the texts are the only difference.
        options = ["--address", two_nodes, "--json"]
        build = started(command(folder / "texts.toml", folder / "store", *options, memory=f"{25 * length}MB"))
        peaks[length] = peak(build)
        assert finished(build)["funnel"][-1]["out"] == 20_000
    assert sizes[10] - sizes[1] > 80_000_000
    assert peaks[10] - peaks[1] < (sizes[10] - sizes[1]) / 4


def write_texts(folder: Path, count: int, length: int) -> int:
    """A recipe of pairs that all differ; gives the bytes of their texts."""
    texts = [" ".join(secrets.token_hex(7) for _ in range(length // 30)) for _ in range(2 * count)]
    frame = pl.DataFrame(
        {
            "prompt": [f"What is number {number}?" for number in range(count)],
            "chosen": texts[:count],
            "rejected": texts[count:],
            "chosen_score": [2.0] * count,
            "rejected_score": [1.0] * count,
        }
    )
    frame.write_parquet(folder / "texts.parquet", row_group_size=100)
    (folder / "texts.toml").write_text('name = "texts"\n[sources.texts]\npath = "texts.parquet"\n')
    return sum(map(len, texts))


def peak(process: subprocess.Popen[str]) -> int:
    """The most memory that a process had, in bytes, as the kernel counts it."""
    most = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = max([most, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.05)
    return most


@pytest.fixture(scope="module")
def engine(two_nodes: str) -> Iterator[cluster.Cluster]:
    with cluster.Cluster(two_nodes) as connected:
        yield connected


@pytest.fixture
def job(recipe: Path, tmp_path: Path) -> Job:
    planned = plan(load_recipe(recipe))
    return Job(planned, scale.sizes_for(planned, LITTLE), Scratch(tmp_path / "scratch"))


@needs_ray
@pytest.mark.slow
def test_results_come_in_the_order_of_the_items(engine: cluster.Cluster, job: Job) -> None:
    def work(job: Job, item: int) -> dict[str, Any]:
        time.sleep(0.2 if item % 5 == 0 else 0)
        return {"item": item}

    assert list(engine.map(work, job, range(30))) == [{"item": item} for item in range(30)]
    assert list(engine.map(work, job, [])) == []


@needs_ray
@pytest.mark.slow
def test_work_is_given_out_as_results_are_taken(engine: cluster.Cluster, job: Job) -> None:
    def work(job: Job, item: int) -> dict[str, Any]:
        (job.scratch.root / f"item-{item}").touch()
        return {}

    results = engine.map(work, job, range(1000))
    next(results)
    time.sleep(1)
    results.close()
    assert 0 < len(list(job.scratch.root.glob("item-*"))) < 20


@needs_ray
@pytest.mark.slow
def test_a_stage_that_is_left_writes_no_more(engine: cluster.Cluster, job: Job) -> None:
    def work(job: Job, item: int) -> dict[str, Any]:
        for number in range(100 if item else 0):
            (job.scratch.root / f"item-{item}-{number}").touch()
            time.sleep(0.1)
        return {}

    results = engine.map(work, job, range(12))
    next(results)
    wait_for(lambda: list(job.scratch.root.glob("item-*")), 60)
    results.close()
    left = set(job.scratch.root.glob("item-*"))
    time.sleep(1)
    assert set(job.scratch.root.glob("item-*")) == left


@needs_ray
@pytest.mark.slow
def test_the_job_is_stored_once_a_stage(engine: cluster.Cluster, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    stored = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: stored.append(value) or put(value))
    for count in (10, 20):
        known = job.knowing(alive=np.ones(count, bool))
        results = engine.map(lambda job, item: {"rows": len(job.rows["alive"])}, known, range(20))
        assert list(results) == [{"rows": count}] * 20
    assert [len(each.rows["alive"]) for each in stored] == [10, 20]


@needs_ray
@pytest.mark.slow
def test_errors_of_pieces_of_work_come_out_as_themselves(engine: cluster.Cluster, job: Job) -> None:
    def work(job: Job, item: str) -> dict[str, Any]:
        if item == "source":
            try:
                raise FileNotFoundError(errno.ENOENT, "No such file", "rows.jsonl")
            except OSError as error:
                raise SourceError("rows.jsonl, line 3: it is cut off.") from error
        if item == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")
        if item == "odd":
            raise type("Odd", (Exception,), {"__reduce__": lambda self: (int, ("no number",))})("what it says")
        return {}

    with pytest.raises(SourceError) as caught:
        list(engine.map(work, job, ["", "source", ""]))
    assert str(caught.value) == "rows.jsonl, line 3: it is cut off."
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert "in work" in caught.value.__notes__[0]  # where it was, for a traceback
    with pytest.raises(OSError, match="No space left") as full:
        list(engine.map(work, job, ["full"]))
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "shard")
    with pytest.raises(prefmix.PrefmixError, match="Odd: what it says"):
        list(engine.map(work, job, ["odd"]))


@needs_ray
@pytest.mark.slow
def test_work_that_ends_its_process_each_time_is_an_error(
    engine: cluster.Cluster, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(job: Job, item: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    with pytest.raises(BuildError, match="ended its process 4 times on the Ray cluster, most often for want of memory"):
        list(engine.map(work, job, [0]))
    time.sleep(1)
    assert capsys.readouterr() == ("", "")


@needs_ray
@pytest.mark.slow
def test_nodes_must_have_the_versions_of_this_process(
    engine: cluster.Cluster, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = cluster.version
    monkeypatch.setattr(cluster, "version", lambda name: "9.9.9" if name == "polars" else here(name))
    with pytest.raises(BuildError, match=rf"has polars {pl.__version__} and not 9\.9\.9: install the same versions"):
        list(engine.map(lambda job, item: {}, job, [0]))


@needs_ray
@pytest.mark.slow
def test_nodes_must_see_the_scratch_folder(engine: cluster.Cluster, job: Job) -> None:
    class Elsewhere(Scratch):
        def result(self, record: str) -> None:
            return None

    hidden = replace(job, scratch=Elsewhere(job.scratch.root))
    with pytest.raises(BuildError, match=r"does not see the scratch folder .*: give one with --scratch that all nodes"):
        list(engine.map(lambda job, item: {}, hidden, [0]))


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:9", "no Ray cluster answers there"),
        ("no-such-machine.invalid:6379", "no Ray cluster answers there"),
        ("nonsense", "Invalid address format: nonsense"),
    ],
)
def test_an_address_without_a_cluster_is_one_line_soon(
    recipe: Path, ray_folder: Path, tmp_path: Path, address: str, told: str
) -> None:
    build = started(command(recipe, tmp_path, "--address", address))
    out, err = build.communicate(timeout=40)
    assert (build.returncode, out) == (1, "")
    assert err.startswith(f"error: --address {address}: {told}")
    assert err.count("\n") == 1


@needs_ray
def test_an_address_that_is_none_of_a_node_is_refused() -> None:
    with pytest.raises(UsageError, match="--address ray://head:10001: prefmix runs on a machine of the cluster"):
        cluster.Cluster("ray://head:10001")


def test_without_ray_the_extra_is_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--engine ray needs Ray: pip install 'prefmix\[ray\]'"):
        prefmix.build(recipe, store=tmp_path, means=Means("ray"))
    assert not list(tmp_path.rglob("*.arrow"))


def test_two_attempts_at_each_piece_of_work_at_once_change_nothing(
    recipe: Path, in_memory: Mixture, tmp_path: Path
) -> None:
    class Twice(scale.Local):
        def map(self, task: Any, job: Job, items: Sequence[Any]) -> Iterator[dict[str, Any]]:
            results = super().map(task, job, [item for item in items for _ in range(2)])
            for result, _ in zip(results, results, strict=True):
                yield result

    planned, store = plan(load_recipe(recipe)), Store(tmp_path / "store")
    sizes, engine = scale.sizes_for(planned, LITTLE), Twice(4)
    with (
        scale.settled(planned, tmp_path / "scratch", sizes, engine, lambda report: None, lambda *_: None) as settled,
        store.staging("parts") as folder,
    ):
        assert_same(store.publish(folder, scale.write(settled, folder)), in_memory)
