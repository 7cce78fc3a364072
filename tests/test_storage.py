"""Sources and stores at addresses, against a real S3-compatible server on loopback: moto's, over HTTP, with s3fs."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import polars as pl
import pytest

from prefmix import storage
from prefmix.build import build
from prefmix.errors import MixtureError, SourceError, StorageError
from prefmix.files import SourceFile, find, find_file, find_files, here, schema
from prefmix.mixture import MANIFEST
from prefmix.recipe import load_recipe
from prefmix.sources import resolve
from prefmix.store import Store, open_mixture

moto_server = pytest.importorskip("moto.server", reason='no S3-compatible server: pip install "moto[server]"')
pytest.importorskip("s3fs", reason="no client for s3://: pip install s3fs")
boto3 = pytest.importorskip("boto3", reason="no client to look into the buckets with: pip install boto3")

KEY, SECRET = "AKIAPREFMIXTEST00001", "not/A+real/Secret+Key0123456789abcdefghij"
SHIPPED = Path(__file__).parents[1] / "recipes"


class Bucket:
    """A bucket of the server, looked into with boto3."""

    def __init__(self, name: str, endpoint: str) -> None:
        self.name, self.endpoint = name, endpoint
        self.client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
        )
        self.client.create_bucket(Bucket=name)

    def put(self, key: str, content: bytes) -> str:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)
        return f"s3://{self.name}/{key}"

    def objects(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket that the environment has the credentials of, and an empty cache."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "PREFMIX_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("PREFMIX_CACHE", str(tmp_path / "cache"))
    return Bucket(f"bucket-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}", endpoint)


def process(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; nothing that it prints may hold a credential."""
    words = [sys.executable, "-c", code] if code else [sys.executable, "-m", "prefmix"]
    done = subprocess.run(
        [*words, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    for secret in (SECRET, KEY):
        assert secret not in done.stdout + done.stderr
    return done


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def quickstart(bucket: Bucket, folder: Path) -> tuple[Path, Path]:
    """The quickstart over a Parquet folder, a compressed file and a glob, with a benchmark and an empty list of rows to
    leave out: a recipe of these files in a folder, and one of the same files in the bucket."""
    shipped, data = SHIPPED / "quickstart", folder / "local" / "data"
    for name in ("hermes", "orca/part-1"):
        (data / name).mkdir(parents=True)
    rows = [
        row for row in json.loads((shipped / "openhermes.json").read_text("utf-8")) if isinstance(row["output"], str)
    ]
    for number, part in enumerate((rows[:40], rows[40:])):
        pl.DataFrame(part).write_parquet(data / "hermes" / f"train-{number:05d}.parquet")
    (data / "hermes" / ".hidden.parquet").write_bytes(b"not read")
    (data / "hermes" / "README.md").write_bytes(b"not read")
    (data / "ultrafeedback.jsonl.gz").write_bytes(gzip.compress((shipped / "ultrafeedback.jsonl").read_bytes()))
    (data / "orca" / "part-1" / "orca.jsonl").write_bytes((shipped / "orca.jsonl").read_bytes())
    (data / "benchmark.csv").write_bytes((shipped / "benchmark.csv").read_bytes())
    (data / "leave-out.txt").write_bytes(b"\n")
    for name, content in files_below(data).items():
        bucket.put(f"data/{name}", content)
    recipes = []
    for at, place in (
        ("data", folder / "local" / "quickstart.toml"),
        (f"s3://{bucket.name}/data", folder / "shared.toml"),
    ):
        text = (SHIPPED / "quickstart.toml").read_text("utf-8")
        for name, path in (
            ("orca.jsonl", "orca/part-*/*.jsonl"),
            ("ultrafeedback.jsonl", "ultrafeedback.jsonl.gz"),
            ("openhermes.json", "hermes"),
            ("benchmark.csv", "benchmark.csv"),
        ):
            assert f'"quickstart/{name}"' in text
            text = text.replace(f'"quickstart/{name}"', f'"{at}/{path}"')
        excluding = f'exclude = "{at}/leave-out.txt"\n\n[sources.ultrafeedback]'
        place.write_text(text.replace("[sources.ultrafeedback]", excluding), "utf-8")
        recipes.append(place)
    return recipes[0], recipes[1]


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Sources


def test_a_build_from_a_bucket_into_a_bucket_is_the_local_build(bucket, tmp_path):
    here_recipe, recipe = quickstart(bucket, tmp_path)
    local, store = build(here_recipe, store=tmp_path / "local store"), f"s3://{bucket.name}/shared/mixtures"
    made = process("build", str(recipe), "--store", store)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.startswith(f"quickstart@v1  digest {local.digest[:12]}")
    build12 = json.loads(bucket.get("shared/mixtures/quickstart/versions.json"))["v1"]["build"]
    assert f"\n{store}/quickstart/{build12}\n" in made.stdout
    assert str(tmp_path / "cache") not in made.stdout

    again = process("build", str(recipe), "--store", store)
    assert again.stdout.split() == ["quickstart@v1", "is", "up", "to", "date", f"{store}/quickstart/{build12}"]

    elsewhere = {"PREFMIX_STORE": store, "PREFMIX_CACHE": str(tmp_path / "another machine")}
    shown = process("show", "quickstart", "--json", **elsewhere)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["digest"] == local.digest
    assert json.loads(shown.stdout)["folder"] == f"{store}/quickstart/{build12}"
    dropped = process("show", "quickstart@v1", "--sample", "2", "--reason", "filter/tie", **elsewhere)
    assert (dropped.returncode, dropped.stderr) == (0, "")

    opened = open_mixture("quickstart", store)
    opened.verify()
    sources = opened.manifest["sources"]
    assert [file["path"] for file in sources["openhermes"]["files"]] == [
        f"s3://{bucket.name}/data/hermes/train-{number:05d}.parquet" for number in range(2)
    ]
    assert sources["orca"]["files"][0]["path"] == f"s3://{bucket.name}/data/orca/part-1/orca.jsonl"
    named = opened.drops.select("source_file").unique().collect().to_series().to_list()
    assert all(name.startswith(f"s3://{bucket.name}/data/") for name in named)

    for key in bucket.objects("shared/"):
        content = bucket.get(key)
        assert SECRET.encode() not in content
        assert KEY.encode() not in content
    for folder in (tmp_path / "cache", tmp_path / "another machine"):
        for name, content in files_below(folder).items():
            assert SECRET.encode() not in content
            assert not name.endswith(".part")


def test_a_build_in_parts_from_a_bucket_through_a_bucket_into_a_bucket(bucket, tmp_path):
    local, recipe = quickstart(bucket, tmp_path)
    expected = build(local, store=tmp_path / "store")
    scratch, store = f"s3://{bucket.name}/scratch", f"s3://{bucket.name}/mixtures"
    words = [
        "build",
        str(recipe),
        "--store",
        store,
        "--scratch",
        scratch,
        "--engine",
        "disk",
        "--memory",
        "20MB",
        "--json",
    ]
    killed = subprocess.Popen([sys.executable, "-m", "prefmix", *words], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(bucket.objects("scratch/")) < 30 and time.monotonic() < until:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert len(bucket.objects("scratch/")) >= 30
    assert not bucket.objects("mixtures/")
    done = process(*words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["digest"] == expected.digest
    assert sum(stage["done_before"] for stage in result["stages"].values())
    assert not bucket.objects("scratch/")
    there = open_mixture("quickstart", store)
    there.verify()
    ledgers = [each.drops.drop("source_file", "detail").collect() for each in (there, expected)]  # they name files
    assert ledgers[0].equals(ledgers[1])


def test_a_scratch_folder_out_of_reach_is_told(bucket, tmp_path):
    recipe, _ = quickstart(bucket, tmp_path)
    words = [
        "build",
        str(recipe),
        "--store",
        str(tmp_path / "store"),
        "--engine",
        "disk",
        "--memory",
        "20MB",
        "--scratch",
    ]
    missing = process(*words, f"s3://{bucket.name}-missing/scratch")
    assert missing.returncode == 1
    assert "bucket" in missing.stderr
    assert f"s3://{bucket.name}-missing/scratch" in missing.stderr
    secret = process(*words, f"s3://{KEY}:{SECRET}@{bucket.name}/scratch")
    assert secret.returncode == 1
    assert "holds a user, a password or a query" in secret.stderr
    assert not list(tmp_path.rglob("mixture.json"))


def test_a_source_that_has_changed_is_fetched_again_and_makes_a_new_version(bucket, tmp_path):
    (_, recipe), store = quickstart(bucket, tmp_path), f"s3://{bucket.name}/mixtures"
    first = build(recipe, store=store)
    assert not build(recipe, store=store).is_new
    rows = (SHIPPED / "quickstart" / "orca.jsonl").read_bytes().splitlines(keepends=True)
    bucket.put("data/orca/part-1/orca.jsonl", b"".join(rows[:-20]))
    second = build(recipe, store=store)
    assert (first.version, second.version) == ("v1", "v2")
    assert first.digest != second.digest
    assert list(Store(store).versions("quickstart")) == ["v1", "v2"]


LAYOUT = [
    "a/train-0.jsonl", "a/train-1.jsonl", "a/test-0.jsonl", "a/b/train-2.jsonl", "a/b/c/x.jsonl.gz", "a/.hid/x.jsonl",
    "a/.x.jsonl", "a/notes.txt", "a/dataset_info.json", "mix/mixture.json", "mix/sft/train-0.arrow", "mix/drops/drops.parquet",
    "two/mixture.json", "two/sft/train-0.arrow", "two/preference/train-0.arrow", "x[1].jsonl",
]  # fmt: skip


PATTERNS = [
    "a", "a/", "a/*.jsonl", "a/**/*.jsonl", "a/**", "**/*.jsonl", "*/train-[01].jsonl", "a/b/*", "a/*/*", "a/.x.jsonl", "a/.hid/*",
    "mix", "two", "two/sft", "a/train-0.jsonl", "a/notes.txt", "a/*.txt", "a/nothing*", "nothing", "a/trian-0.jsonl", "x[1].jsonl",
    "?/train-0.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_an_address_means_the_files_that_the_path_means(bucket, tmp_path, split):
    for name in LAYOUT:
        bucket.put(f"in/{name}", b"{}")
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"{}")

    def meant(pattern: str) -> list[str] | str:
        try:
            return [each.name.removeprefix(f"s3://{bucket.name}/") for each in find(pattern, tmp_path, split)]
        except SourceError as error:
            return str(error).partition(": ")[2][:20]

    for pattern in PATTERNS:
        assert meant(f"s3://{bucket.name}/in/{pattern}") == meant(f"in/{pattern}"), pattern
    assert sum(isinstance(meant(f"in/{pattern}"), list) for pattern in PATTERNS) > 4


def test_files_of_both_kinds_are_one_list_sorted_by_name(bucket, tmp_path):
    (tmp_path / "z.jsonl").write_bytes(b"{}")
    address = bucket.put("y.jsonl", b"{}")
    assert [each.name for each in find(["z.jsonl", address, address], tmp_path)] == [address, "z.jsonl"]


def test_a_missing_file_says_what_is_there(bucket, tmp_path):
    bucket.put("data/orca.jsonl", b"{}")
    with pytest.raises(
        SourceError,
        match=r"s3://.*/data/orka.jsonl: no such file, searched in .*/data \(there: orca.jsonl\): correct `path`",
    ):
        find_files(f"s3://{bucket.name}/data/orka.jsonl", tmp_path)
    with pytest.raises(SourceError, match=r"\*\.parquet: no such file, searched in s3://.*/data \(there: orca.jsonl\)"):
        find_files(f"s3://{bucket.name}/data/*.parquet", tmp_path)
    spec = {"path": bucket.put("x.jsonl", lines([{"id": "1"}])), "exclude": f"s3://{bucket.name}/no.txt"}
    from prefmix import recipe

    fitting = bucket.put("sft.jsonl", lines([{"instruction": "a", "input": "", "output": "b"}]))
    with pytest.raises(SourceError, match=r"no.txt: no such file: correct `exclude`"):
        resolve("x", recipe.Source.model_validate(spec | {"path": fitting}), tmp_path)


def test_what_is_wrong_in_a_file_is_told_by_its_address(bucket, tmp_path):
    address = bucket.put("data/bad.parquet", b"PAR1 but no more")
    path = find_files(address, tmp_path)[0]
    with pytest.raises(SourceError, match=rf"^{address}: the file is truncated") as told:
        schema(path)
    assert str(tmp_path) not in str(told.value)
    empty = find_files(bucket.put("data/empty.jsonl", b""), tmp_path)[0]
    with pytest.raises(SourceError, match=r"^s3://.*/empty.jsonl: the file is empty"):
        schema(empty)


def test_rows_of_an_exclude_file_in_a_bucket_are_left_out_and_its_content_counts(bucket, tmp_path):
    rows = [{"instruction": f"Question {number}?", "input": "", "output": f"Answer {number}."} for number in range(4)]
    (tmp_path / "r.toml").write_text(
        f'name = "r"\nseed = 1\n[sources.a]\nformat = "openhermes"\npath = "{bucket.put("rows.jsonl", lines(rows))}"\n'
        f'exclude = "s3://{bucket.name}/ids.txt"\n',
        "utf-8",
    )
    bucket.put("ids.txt", b"\n")
    everything = build(tmp_path / "r.toml", store=tmp_path / "store")
    ids = everything.scan("sft").select("id").collect()["id"].to_list()
    bucket.put("ids.txt", f"{ids[0]}\n".encode())
    fewer = build(tmp_path / "r.toml", store=tmp_path / "store")
    assert set(ids) - set(fewer.scan("sft").select("id").collect()["id"]) == {ids[0]}
    recorded = tomllib.loads((fewer.folder / "recipe.toml").read_text("utf-8"))
    assert recorded["sources"]["a"]["exclude"] == f"s3://{bucket.name}/ids.txt"


# The cache


def test_a_file_is_fetched_once_and_anew_when_it_has_changed(bucket, monkeypatch):
    gets: list[str] = []
    download = storage.download
    monkeypatch.setattr(storage, "download", lambda remote, path: (gets.append(remote.address), download(remote, path)))
    address = bucket.put("x.txt", b"one")
    assert storage.fetched(address).read_bytes() == b"one"
    assert storage.fetched(address).read_bytes() == b"one"
    assert len(gets) == 1
    bucket.put("x.txt", b"two")  # as long as before, in the same second
    assert storage.fetched(address).read_bytes() == b"two"
    assert len(gets) == 2


def test_a_worker_elsewhere_gets_the_file_that_was_found_or_an_error(bucket, tmp_path, monkeypatch):
    address = bucket.put("x.jsonl", b'{"a": 1}')
    file = find_file(address, tmp_path)
    monkeypatch.setenv("PREFMIX_CACHE", str(tmp_path / "another machine"))
    shutil.rmtree(tmp_path / "cache")
    assert here(file).read_bytes() == b'{"a": 1}'
    assert here(file).is_relative_to(tmp_path / "another machine")
    bucket.put("x.jsonl", b'{"a": 2}')
    shutil.rmtree(tmp_path / "another machine")
    with pytest.raises(StorageError, match="changed"):
        here(file)
    assert here(SourceFile("local", tmp_path / "y")) == tmp_path / "y"


def test_several_processes_fetch_a_file_at_once(bucket, tmp_path):
    content = os.urandom(3 * 2**20)
    address = bucket.put("big.bin", content)
    code = "import sys; from prefmix import storage; print(storage.fetched(sys.argv[1]))"
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: process(address, code=code), range(4)))
    assert [each.returncode for each in done] == [0] * 4
    assert len({each.stdout for each in done}) == 1
    assert Path(done[0].stdout.strip()).read_bytes() == content
    assert not [name for name in files_below(tmp_path / "cache") if name.endswith((".part", ".lock"))]


def test_a_fetch_that_fails_leaves_nothing_half_written(bucket, tmp_path, monkeypatch):
    address = bucket.put("x.bin", b"x" * 1000)
    client, _ = storage.open_fs(address)

    def full(there: str, path: str) -> None:
        Path(path).write_bytes(b"x" * 10)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(client, "get_file", full)
        with pytest.raises(
            StorageError, match=r"cannot be written: No space left on device: make room, or set PREFMIX_CACHE"
        ):
            storage.fetched(address)
    with monkeypatch.context() as patch:
        patch.setattr(client, "get_file", lambda there, path: Path(path).write_bytes(b"x" * 10))
        with pytest.raises(StorageError, match="changed while it was fetched"):
            storage.fetched(address)
    assert [name for name in files_below(tmp_path / "cache") if not name.endswith(".address")] == []
    assert storage.fetched(address).read_bytes() == b"x" * 1000


def test_what_a_killed_fetch_left_is_swept(bucket, tmp_path):
    left = tmp_path / "cache" / "files" / ".0123-4567.part"
    fresh = left.with_name(".89ab-cdef.part")
    left.parent.mkdir(parents=True)
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (time.time() - 2 * 86400,) * 2)
    storage.fetched(bucket.put("x.bin", b"x"))
    assert (left.exists(), fresh.exists()) == (False, True)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("PREFMIX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / "prefmix"
    monkeypatch.setenv("PREFMIX_CACHE", str(tmp_path / "own"))
    assert storage.cache_folder() == tmp_path / "own"


def test_any_protocol_of_fsspec_will_do(bucket, tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/box/a.jsonl", b"{}")
    try:
        (found,) = find("memory://box/*.jsonl", tmp_path)
        assert (found.name, found.path.read_bytes()) == ("memory://box/a.jsonl", b"{}")
        store = Store("memory://box/mixtures")
        assert publish(store, "a" * 12).version == "v1"
        assert publish(store, "b" * 12).version == "v2"
        store.remove(store.find("mix", "v1"))
        assert list(store.versions("mix")) == ["v2"]
    finally:
        fsspec.filesystem("memory").rm("/box", recursive=True)


# The store


def publish(store: Store, build: str, name: str = "mix", content: str = "rows", label: str | None = None):
    """A mixture of one small file."""
    with store.staging(name) as folder:
        (folder / "README.md").write_text(content, "utf-8")
        entry = {"path": "README.md", "bytes": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}
        manifest = {"format": 1, "name": name, "build": build, "digest": build[0] * 64, "subsets": {}, "records": [entry],
                    "funnel": [{"out": 1}]}  # fmt: skip
        return store.publish(folder, manifest, label)


@pytest.fixture
def store(bucket) -> Store:
    return Store(f"s3://{bucket.name}/mixtures/")


def another(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str = "another") -> Store:
    """The same store as another machine sees it."""
    monkeypatch.setenv("PREFMIX_CACHE", str(tmp_path / name))
    return Store(store.place)


def test_versions_are_numbered_and_a_build_that_exists_adds_nothing(store, bucket, monkeypatch, tmp_path):
    assert publish(store, "a" * 12).version == "v1"
    assert publish(store, "b" * 12).version == "v2"
    again = publish(another(store, monkeypatch, tmp_path), "a" * 12)
    assert (again.version, again.is_new) == ("v1", False)
    assert publish(store, "c" * 12, label="release").version == "release"
    assert sorted(store.versions("mix")) == ["release", "v1", "v2"]
    assert store.names() == ["mix"]
    assert bucket.objects() == [
        *(f"mixtures/mix/{letter * 12}/{name}" for letter in "abc" for name in ("README.md", "mixture.json")),
        "mixtures/mix/versions.json",
    ]


def test_list_and_rm_fetch_no_files(store, bucket, tmp_path):
    publish(store, "a" * 12)
    publish(store, "b" * 12)
    elsewhere = {"PREFMIX_STORE": store.place, "PREFMIX_CACHE": str(tmp_path / "another")}
    listed = process("list", "--json", **elsewhere)
    assert [(each["version"], each["size_bytes"] > 100) for each in json.loads(listed.stdout)] == [
        ("v1", True),
        ("v2", True),
    ]
    asked = process("rm", "mix@v1", **elsewhere)
    assert (asked.returncode, f"{store.place}/mix/{'a' * 12}" in asked.stderr) == (2, True)
    removed = process("rm", "mix@v1", "--yes", **elsewhere)
    assert (removed.returncode, removed.stderr.startswith("Removed mix@v1 (1 rows, ")) == (0, True)
    assert f"{store.place}/mix/{'a' * 12}" in removed.stderr
    assert not any("a" * 12 in key for key in bucket.objects())
    assert "README.md" not in "".join(files_below(tmp_path / "another"))
    with pytest.raises(MixtureError, match="v1 was removed on"):
        store.find("mix", "v1")
    assert publish(store, "c" * 12).version == "v3"
    gone = process("show", "mux", **elsewhere)
    assert f"There is no mixture mux in the store {store.place}. It has: mix." in gone.stderr


def test_a_damaged_version_is_named_can_be_removed_and_is_replaced_by_a_build(store, bucket, monkeypatch, tmp_path):
    publish(store, "a" * 12)
    key = f"mixtures/mix/{'a' * 12}/README.md"
    bucket.put(key, b"towr")
    away = another(store, monkeypatch, tmp_path)
    with pytest.raises(MixtureError, match=rf"{key} is not the file that was written \(its sha256 differs\)"):
        away.find("mix")
    assert not [name for name in files_below(tmp_path / "another") if ".staging-" in name]
    bucket.delete(key)
    for each in (store, away):  # the copy of the one that built it does not hide it
        with pytest.raises(MixtureError, match=rf"{key} is missing"):
            each.find("mix")
    assert publish(away, "a" * 12).version == "v1"
    assert store.find("mix").is_whole()
    bucket.put(f"mixtures/mix/{'a' * 12}/{MANIFEST}", b"{")
    done = process("rm", "mix@v1", "--yes", "--store", store.place)
    assert (done.returncode, "Removed mix@v1 (damaged)" in done.stderr) == (0, True), done.stderr
    assert bucket.objects() == ["mixtures/mix/versions.json"]


@pytest.mark.parametrize("path", ["../../escaped", "/escaped", "a/../../escaped", "..\\escaped", ".hidden/x", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(store, bucket, monkeypatch, tmp_path, path):
    publish(store, "a" * 12)
    key = f"mixtures/mix/{'a' * 12}/{MANIFEST}"
    manifest = json.loads(bucket.get(key))
    manifest["records"][0]["path"] = path
    bucket.put(key, json.dumps(manifest).encode())
    with pytest.raises(MixtureError, match="cannot be read"):
        another(store, monkeypatch, tmp_path).find("mix")
    assert not [name for name in files_below(tmp_path) if "escaped" in name]


def test_a_label_that_leads_out_of_the_store_is_refused_and_removes_nothing(store, bucket):
    publish(store, "a" * 12)
    kept = publish(store, "b" * 12, name="other")
    labels = {"v1": {"build": "../other", "digest": "d" * 64, "created": "now"}}
    bucket.put("mixtures/mix/versions.json", json.dumps(labels).encode())
    with pytest.raises(MixtureError, match="is no build"):
        store.find("mix")
    assert process("rm", "mix@v1", "--yes", "--store", store.place).returncode == 2
    store.remove(store.labelled("mix", "v1"))
    assert kept.is_whole()
    assert store.find("other").is_whole()


def test_two_builders_on_two_machines_do_not_lose_a_label(store, monkeypatch, tmp_path):
    machines = [another(store, monkeypatch, tmp_path, f"machine {number}") for number in range(4)]
    builds = [f"{digit}" * 12 for digit in "abcd1234"]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda place: publish(machines[place % 4], builds[place]), range(8)))
    versions = store.versions("mix")
    assert {each.version: each.build for each in made} == {label: entry["build"] for label, entry in versions.items()}
    assert list(versions) == [f"v{number}" for number in range(1, 9)]


def test_labels_are_not_overwritten_when_somebody_else_was_faster(bucket):
    address = f"s3://{bucket.name}/labels"
    assert storage.write(address, b"1", None)
    assert not storage.write(address, b"2", None)
    content, known = storage.read(address)
    assert content == b"1"
    bucket.put("labels", b"theirs")
    assert not storage.write(address, b"2", known)
    assert bucket.get("labels") == b"theirs"
    assert storage.write(address, b"2", storage.read(address)[1])
    bucket.delete("labels")
    assert not storage.write(address, b"3", known)


def test_a_versions_file_that_cannot_be_read_is_an_error_that_names_it(store, bucket):
    publish(store, "a" * 12)
    bucket.put("mixtures/mix/versions.json", b"not json")
    with pytest.raises(MixtureError, match=rf"{store.place}/mix/versions.json cannot be read"):
        store.find("mix")


DYING = """
import os, signal, sys
from prefmix import storage
left = int(sys.argv.pop(1))

def dying(call):
    def counted(*arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return counted

storage.put, storage.write = dying(storage.put), dying(storage.write)
from prefmix.__main__ import main
main()
"""


@pytest.mark.parametrize("sent", [0, 4, 8, 9], ids=["first file", "in the middle", "manifest", "label"])
def test_a_build_that_is_killed_leaves_the_store_as_it_was_and_can_be_built_again(bucket, tmp_path, sent):
    store = f"s3://{bucket.name}/mixtures"
    recipe = str(SHIPPED / "quickstart.toml")
    first = build(recipe, store=store)
    before = {key: bucket.get(key) for key in bucket.objects()}
    command = ("build", recipe, "--store", store, "--set", "filter.min_margin=1.0")
    killed = process(str(sent), *command, code=DYING)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {key: bucket.get(key) for key in before} == before
    assert list(Store(store).versions("quickstart")) == ["v1"]
    assert open_mixture("quickstart", store).digest == first.digest
    again = process(*command, "--json")
    assert again.returncode == 0, again.stderr
    second = open_mixture("quickstart", store)
    second.verify()
    assert second.version == "v2"
    assert json.loads(again.stdout)["digest"] == second.digest != first.digest
    sent_files = {file["path"] for file in second.manifest["records"]} | {MANIFEST}
    sent_files |= {file["path"] for splits in second.manifest["subsets"].values() for entry in splits.values() for file in entry["files"]}  # fmt: skip
    new = {key.removeprefix(f"mixtures/quickstart/{second.build}/") for key in set(bucket.objects()) - set(before)}
    assert new == sent_files
    left = [name for name in files_below(tmp_path / "cache") if ".staging-" in name]
    assert not [name for name in left if not name.endswith(".lock")]


def test_files_of_a_dead_upload_are_swept_after_a_day_and_not_before(store, bucket, monkeypatch):
    publish(store, "a" * 12)
    bucket.put(f"mixtures/mix/{'d' * 12}/README.md", b"half a mixture")
    publish(store, "b" * 12)
    assert any("d" * 12 in key for key in bucket.objects())
    later = (datetime.now(UTC) + timedelta(days=1, hours=1)).timestamp()
    monkeypatch.setattr(time, "time", lambda: later)
    publish(store, "c" * 12)
    assert not any("d" * 12 in key for key in bucket.objects())
    assert list(store.versions("mix")) == ["v1", "v2", "v3"]


def test_the_token_ids_of_training_lie_in_the_mirror_and_go_with_their_version(store):
    made = publish(store, "a" * 12)
    tokens = made.folder.parent / ".tokens"
    tokens.mkdir()
    (tokens / f"{made.digest[:12]}-0.arrow").write_text("ids")
    store.remove(made)
    assert list(tokens.iterdir()) == []


# What can go wrong


@pytest.fixture
def guarded(bucket) -> Iterator[dict[str, str]]:
    """The server checks every signature meanwhile; gives the credentials of a user who may do nothing."""
    where = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    iam = boto3.client("iam", endpoint_url=bucket.endpoint, **where)
    iam.create_user(UserName=bucket.name)
    made = iam.create_access_key(UserName=bucket.name)["AccessKey"]

    def unchecked(requests: str) -> None:
        url = f"{bucket.endpoint}/moto-api/reset-auth"
        with urlopen(Request(url, requests.encode(), {"Content-Type": "text/plain"}), timeout=60) as answer:
            assert answer.status == 200

    unchecked("0")
    yield {"AWS_ACCESS_KEY_ID": made["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"]}
    unchecked("inf")


def test_wrong_credentials_are_told_without_them(bucket, guarded, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'name = "r"\nseed = 1\n[sources.a]\npath = "s3://{bucket.name}/x/*.jsonl"\n', "utf-8")
    powerless = guarded
    wrong_secret = {**powerless, "AWS_SECRET_ACCESS_KEY": SECRET}
    cases = [
        ({}, "InvalidAccessKeyId|403"), (wrong_secret, "SignatureDoesNotMatch|403"), (powerless, "AccessDenied|403"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials were found"),
    ]  # fmt: skip
    for environment, words in cases:
        for command in (("check", str(recipe)), ("list", "--store", f"s3://{bucket.name}/mixtures")):
            done = process(*command, **environment, PREFMIX_DEBUG="1")
            said = done.stdout + done.stderr
            assert done.returncode == 1, said
            error = said[said.rindex("error:" if "error:" in said else "s3://") :]
            assert any(word in error for word in words.split("|")), said
            assert f"s3://{bucket.name}/" in error
            assert "AWS_ACCESS_KEY_ID" in error
            for secret in (*powerless.values(), "Signature="):
                assert secret not in said
            assert "botocore" not in said


def test_an_upload_that_is_refused_leaves_nothing(bucket, guarded, tmp_path, monkeypatch):
    store = Store(f"s3://{bucket.name}/mixtures")
    for name, value in guarded.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="access was refused"):
        publish(store, "a" * 12)
    assert not [name for name in files_below(tmp_path / "cache") if "README" in name]


def test_a_missing_bucket_is_named(bucket, tmp_path):
    for call in (
        lambda: find("s3://no-such-bucket/x/*.jsonl", tmp_path),
        lambda: find("s3://no-such-bucket/x.jsonl", tmp_path),
        lambda: Store("s3://no-such-bucket/mixtures").names(),
        lambda: Store("s3://no-such-bucket/mixtures").versions("mix"),
        lambda: publish(Store("s3://no-such-bucket/mixtures"), "a" * 12),
    ):
        with pytest.raises(
            StorageError, match=r"^s3://no-such-bucket/.*: there is no bucket no-such-bucket: correct the"
        ):
            call()


def test_a_server_that_does_not_answer_is_told_in_seconds(bucket, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{taken.getsockname()[1]}"
    started = time.monotonic()
    done = process("list", "--store", f"s3://{bucket.name}/mixtures", AWS_ENDPOINT_URL=refused)
    assert time.monotonic() - started < 30
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: s3://{bucket.name}/mixtures: out of reach: check the connection and AWS_ENDPOINT_URL.\n"
    )


def test_without_its_package_an_address_names_the_extra(bucket, tmp_path):
    code = "import sys; sys.modules['s3fs'] = None\nfrom prefmix.__main__ import main\nmain()"
    done = process("list", "--store", f"s3://{bucket.name}/mixtures", code=code)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the package for s3:// is not installed: pip install 'prefmix[s3]'" in done.stderr
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(StorageError, match=r"pip install 'prefmix\[gs\]'"):
            find("gs://bucket/x.jsonl", tmp_path)


HOSTILE = [
    "s3://AKIAKEY:{0}@bucket/x.jsonl",
    "s3://AKIAKEY:a/{0}@bucket/x.jsonl",
    "s3://AKIAKEY:a@b?{0}@bucket/x.jsonl",
    "s3://bucket/x.jsonl?X-Amz-Credential=AKIAKEY&X-Amz-Signature={0}",
    "https://host/x.jsonl?sig={0}",
    "https://host/x.jsonl?{0}",
    "https://host/x.jsonl#token={0}",
    "https://{0}@host/x.jsonl",
    "ftp://user:{0}@host/x.jsonl",
    "S3://AKIAKEY:{0}@bucket/x.jsonl",
    "nonsense://user:{0}@host/x",
    "s3://user:p\n{0}@bucket/x",
]


@pytest.mark.parametrize("address", HOSTILE)
def test_an_address_with_a_credential_is_refused_without_it(address, tmp_path):
    secret = "hunter2secret"
    for call in (
        lambda: find(address.format(secret), tmp_path),
        lambda: find_file(address.format(secret), tmp_path),
        lambda: Store(address.format(secret)),
        lambda: storage.fetched(address.format(secret)),
    ):
        with pytest.raises(StorageError, match="the address holds a user, a password or a query") as told:
            call()
        for each in (told.value, told.value.__cause__):
            assert secret not in str(each)
            assert "AKIAKEY" not in str(each)
    assert secret not in storage.shown(address.format(secret))


@pytest.mark.parametrize("address", HOSTILE[:6])
def test_nothing_that_a_client_says_is_repeated(address):
    class NoSuchBucket(Exception):
        response = {"Error": {"Code": "NoSuchBucket", "Message": "hunter2secret"}}  # noqa: RUF012

    class Odd(Exception):
        code = "hunter2secret in a code"

    errors = [NoSuchBucket("hunter2secret"), Odd("hunter2secret"), PermissionError("hunter2secret"), ValueError("hunter2secret"),
              FileNotFoundError("hunter2secret"), TimeoutError("hunter2secret"), KeyError("hunter2secret")]  # fmt: skip
    for error in errors:
        with pytest.raises(StorageError) as told, storage.reaching(address.format("hunter2secret")):
            raise error
        assert "hunter2secret" not in str(told.value)
        assert told.value.__suppress_context__


def test_a_recipe_with_a_credential_in_an_address_writes_nothing(bucket, tmp_path):
    recipe = tmp_path / "r.toml"
    address = f"s3://{KEY}:{SECRET}@{bucket.name}/x.jsonl"
    recipe.write_text(f'name = "r"\nseed = 1\n[sources.a]\npath = "{address}"\n', "utf-8")
    for command in ("build", "check"):
        done = process(command, str(recipe), PREFMIX_STORE=str(tmp_path / "store"), PREFMIX_DEBUG="1")
        assert done.returncode == 1
        assert "the address holds a user, a password or a query" in done.stdout + done.stderr
    assert not (tmp_path / "store").exists()


def test_what_is_an_address(tmp_path):
    for text in (
        "s3://bucket/x",
        "gs://bucket",
        "memory://x",
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://b/*.parquet",
    ):
        assert storage.is_address(text)
        assert storage.shown(text) == text
    for text in ("hub:user/repo@v2", "C:\\data\\x.jsonl", "C://data", "data/x.jsonl", "/data//x.jsonl", "mix@v2", ""):
        assert not storage.is_address(text)
    for text, words in (
        ("s4://b/x", "no protocol s4"),
        ("file:///x.jsonl", "by its path"),
        ("hf://datasets/a/b", "with `hub`"),
    ):
        with pytest.raises(StorageError, match=words):
            find(text, tmp_path)


def test_nothing_of_it_is_imported_for_local_files():
    code = "import sys, prefmix.store, prefmix.plan; print([m for m in ('fsspec', 's3fs', 'botocore') if m in sys.modules])"
    assert process(code=code).stdout.strip() == "[]"


def test_the_recipe_keeps_the_addresses_as_they_are_written(bucket, tmp_path):
    recipe = load_recipe(quickstart(bucket, tmp_path)[1])
    assert recipe.sources["orca"].path == f"s3://{bucket.name}/data/orca/part-*/*.jsonl"
