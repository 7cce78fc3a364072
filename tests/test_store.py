from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefmix.errors import MixtureError, UsageError
from prefmix.mixture import MANIFEST
from prefmix.store import Store, open_mixture


def publish(store: Store, build: str, name: str = "mix", digest: str = "d" * 64):
    with store.staging(name) as folder:
        manifest = {
            "format": 1,
            "name": name,
            "build": build,
            "digest": digest,
            "subsets": {},
            "records": [],
            "funnel": [],
        }
        return store.publish(folder, manifest)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def test_versions_are_numbered_and_a_build_that_exists_adds_nothing(store):
    assert publish(store, "a" * 12).version == "v1"
    assert publish(store, "b" * 12).version == "v2"
    again = publish(store, "a" * 12)
    assert (again.version, again.is_new) == ("v1", False)
    assert list(store.versions("mix")) == ["v1", "v2"]


def test_references_name_a_folder_a_version_a_build_or_a_digest(store):
    first = publish(store, "abcd12345678", digest="1234" + "0" * 60)
    publish(store, "ffff12345678", digest="5678" + "0" * 60)
    assert str(open_mixture("mix", store.root)) == "mix@v2"
    assert str(open_mixture(first.folder)) == "mix@v1"
    for reference in ("mix@v1", "mix@abcd", "mix@1234"):
        assert open_mixture(reference, store.root).folder == first.folder


def test_references_that_mean_nothing_or_two_things_are_errors_that_help(store, tmp_path):
    publish(store, "abcd12345678", digest="9" * 64)
    publish(store, "abcdffffffff", digest="9" * 64)
    for reference, words in (("mix@abcd", "could be v1 or v2"), ("mix@v7", "does not exist.*v1, v2"), ("mux", "It has: mix"),
                             ("No Such/Thing", "neither a mixture's folder"), ("mix@abc", "does not exist")):  # fmt: skip
        with pytest.raises(MixtureError, match=words):
            open_mixture(reference, store.root)
    with pytest.raises(MixtureError, match="is empty"):
        open_mixture("mix", tmp_path / "other")
    with pytest.raises(UsageError, match="Hub"):
        open_mixture("hub:user/repo@v2")


def test_a_folder_that_is_broken_or_newer_says_so(tmp_path):
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(MixtureError, match="cannot be read"):
        open_mixture(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 99}))
    with pytest.raises(MixtureError, match="upgrade prefmix"):
        open_mixture(tmp_path)


def test_the_environment_names_the_store(store, monkeypatch, tmp_path):
    publish(store, "a" * 12)
    monkeypatch.setenv("PREFMIX_STORE", str(store.root))
    assert open_mixture("mix").version == "v1"
    monkeypatch.delenv("PREFMIX_STORE")
    monkeypatch.chdir(tmp_path)
    assert Store().root == Path("mixtures")


def test_a_removed_label_never_names_other_rows(store):
    publish(store, "a" * 12)
    store.remove(publish(store, "b" * 12))
    assert list(store.versions("mix")) == ["v1"]
    with pytest.raises(MixtureError, match="v2 was removed on"):
        open_mixture("mix@v2", store.root)
    assert publish(store, "c" * 12).version == "v3"
    assert publish(store, "b" * 12).version == "v4"


def test_the_token_ids_of_a_mixture_go_with_the_last_version_that_has_its_content(store):
    same, other = "1234" * 16, "5678" * 16
    first, second = publish(store, "a" * 12, digest=same), publish(store, "b" * 12, digest=same)
    publish(store, "c" * 12, digest=other)
    tokens = store.root / "mix" / ".tokens"
    tokens.mkdir()
    names = [f"{digest[:12]}-{number}.arrow" for digest in (same, other) for number in range(2)]
    for name in names:
        (tokens / name).write_text("ids")
    store.remove(first)
    assert sorted(path.name for path in tokens.iterdir()) == sorted(names)
    store.remove(second)
    assert sorted(path.name for path in tokens.iterdir()) == sorted(names[2:])


def test_a_build_that_fails_leaves_nothing_behind(store):
    def fail():
        with store.staging("mix") as folder:
            (folder / "half").write_text("written")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in (store.root / "mix").iterdir()] == [".lock"]


def test_what_a_killed_build_left_is_swept_but_not_what_a_living_one_writes(store):
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from prefmix.store import Store
with Store({str(store.root)!r}).staging("mix") as folder:
    print(folder, flush=True)
    sys.stdin.read() or os._exit(9)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        publish(store, "a" * 12)
        assert folder.is_dir()
        other.stdin.close()
        assert other.wait() == 9
    assert folder.is_dir()
    publish(store, "b" * 12)
    assert not folder.exists()
    assert not list((store.root / "mix").glob(".staging-*"))


def test_a_mixture_whose_label_was_not_written_gets_it_back(store):
    first = publish(store, "a" * 12)
    (store.root / "mix" / "versions.json").unlink()
    assert store.versions("mix") == {}
    assert publish(store, "b" * 12).version == "v2"
    assert store.find("mix", "v1").folder == first.folder


def test_a_versions_file_that_cannot_be_read_is_an_error_that_names_it(store):
    publish(store, "a" * 12)
    (store.root / "mix" / "versions.json").write_text("not json")
    with pytest.raises(MixtureError, match=r"versions.json cannot be read"):
        open_mixture("mix", store.root)
