from __future__ import annotations

import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from hub.loopback import LoopbackHub

from prefmix import hub
from prefmix.errors import HubError, SourceError
from prefmix.sources import resolve
from prefmix.sources.hub_files import choose

PAIRS = pl.DataFrame({"system": [""], "question": ["What is 2 + 2?"], "chosen": ["4"], "rejected": ["5"]})
REPO = "someone/pairs"


def parquet(rows: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    rows.write_parquet(buffer)
    return buffer.getvalue()


def hub_source(repo: str = REPO, **keys: object) -> SimpleNamespace:
    defaults = {"format": None, "hub": repo, "path": None, "revision": "main", "columns": {}, "split": None}
    return SimpleNamespace(**{**defaults, "where": None, "exclude": None, "license": None, "options": {}, **keys})


@pytest.fixture
def commit(loopback_hub: LoopbackHub) -> str:
    return loopback_hub.commit(REPO, {"data/train-00000-of-00001.parquet": parquet(PAIRS), "README.md": b"# Pairs"})


def test_a_branch_and_a_tag_resolve_to_the_commit_they_point_to(loopback_hub: LoopbackHub, commit: str) -> None:
    loopback_hub.tag(REPO, "v1")
    second = loopback_hub.commit(REPO, {"data/train.parquet": parquet(PAIRS)})
    assert hub.resolve_revision(REPO, "main") == second != commit
    assert hub.resolve_revision(REPO, "v1") == commit
    assert hub.resolve_revision(REPO, commit) == commit


def test_downloaded_files_are_those_of_the_commit_in_the_order_asked_for(
    loopback_hub: LoopbackHub, commit: str
) -> None:
    loopback_hub.commit(REPO, {"README.md": b"# Later"})
    assert hub.list_files(REPO, commit) == ["README.md", "data/train-00000-of-00001.parquet"]
    readme, data = hub.download(REPO, commit, ["README.md", "data/train-00000-of-00001.parquet"])
    assert readme.read_bytes() == b"# Pairs"
    assert pl.read_parquet(data).equals(PAIRS)


def test_what_was_fetched_once_is_not_asked_for_again(loopback_hub: LoopbackHub, commit: str) -> None:
    hub.list_files(REPO, commit)
    hub.download(REPO, commit, ["README.md"])
    loopback_hub.requests.clear()
    hub.list_files(REPO, commit)
    hub.download(REPO, commit, ["README.md"])
    assert loopback_hub.requests == []


def test_an_interrupted_download_goes_on_where_it_ended(
    loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    data = bytes(range(256)) * 2**17  # 32 MiB; the client goes on in steps of 10
    commit = loopback_hub.commit(REPO, {"data.bin": data})
    loopback_hub.fail("GET", "/resolve/", halved=True)
    assert hub.download(REPO, commit, ["data.bin"])[0].read_bytes() == data
    assert len(data) < loopback_hub.downloaded < 1.3 * len(data)


def test_files_that_came_before_a_failure_are_not_fetched_again(
    loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    commit = loopback_hub.commit(REPO, {"a.jsonl": b"{}", "b.jsonl": b"[]"})
    loopback_hub.fail("GET", "/resolve/.*/b.jsonl", times=99)
    with pytest.raises(HubError, match=REPO):
        hub.download(REPO, commit, ["a.jsonl", "b.jsonl"])
    loopback_hub.faults.clear()
    loopback_hub.requests.clear()
    paths = hub.download(REPO, commit, ["a.jsonl", "b.jsonl"])
    assert [path.read_bytes() for path in paths] == [b"{}", b"[]"]
    assert not [path for _, path in loopback_hub.requests if "a.jsonl" in path]


def test_a_tokenizer_comes_from_a_model_repository(loopback_hub: LoopbackHub) -> None:
    loopback_hub.commit("someone/model", {"tokenizer.json": b"{}"}, repo_type="model")
    revision = hub.resolve_revision("someone/model", "main", "model")
    assert hub.download("someone/model", revision, ["tokenizer.json"], "model")[0].read_bytes() == b"{}"


@pytest.mark.parametrize("private", [False, True], ids=["missing", "private"])
def test_a_repository_that_cannot_be_seen_says_how_to_log_in(loopback_hub: LoopbackHub, private: bool) -> None:
    if private:
        loopback_hub.commit(REPO, {"a.jsonl": b"{}"}, private=True)
    with pytest.raises(HubError, match=rf"(?s){REPO}: no such repository.*hf auth login.*HF_TOKEN"):
        hub.resolve_revision(REPO, "main")


def test_a_token_opens_a_private_repository(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = loopback_hub.commit(REPO, {"a.jsonl": b"{}"}, private=True)
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    assert hub.resolve_revision(REPO, "main") == commit


def test_a_gated_repository_says_how_to_get_access(loopback_hub: LoopbackHub) -> None:
    commit = loopback_hub.commit(REPO, {"a.jsonl": b"{}"}, gated=True)
    with pytest.raises(HubError, match=r"gated: ask for access"):
        hub.download(REPO, commit, ["a.jsonl"])


def test_an_unknown_revision_and_an_unknown_file_are_named(loopback_hub: LoopbackHub, commit: str) -> None:
    with pytest.raises(HubError, match=r'no revision "v9"'):
        hub.resolve_revision(REPO, "v9")
    with pytest.raises(HubError, match=r"no file missing\.json"):
        hub.download(REPO, commit, ["missing.json"])


def test_a_name_that_is_none_is_refused_with_its_form(loopback_hub: LoopbackHub) -> None:
    with pytest.raises(HubError, match="owner/name"):
        hub.resolve_revision("not a name", "main")


def test_a_hub_out_of_reach_is_named_with_its_address(
    loopback_hub: LoopbackHub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries again several times
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9 is out of reach"):
        hub.resolve_revision(REPO, "main")
    with pytest.raises(HubError, match=rf"{REPO}.*check the connection"):
        hub.download(REPO, commit, ["README.md"])


def test_offline_a_branch_is_refused_though_it_is_in_the_cache_and_its_commit_is_served(
    loopback_hub: LoopbackHub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = resolve("pairs", hub_source(), Path())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loopback_hub.requests.clear()
    with pytest.raises(HubError, match=r'offline.*"main".*full commit'):
        resolve("pairs", hub_source(), Path())
    offline = resolve("pairs", hub_source(revision=commit), Path())
    assert offline.fingerprints() == online.fingerprints()
    assert loopback_hub.requests == []


def test_offline_a_commit_that_was_never_fetched_is_an_error(
    loopback_hub: LoopbackHub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"offline.*not in the cache"):
        hub.list_files(REPO, commit)
    with pytest.raises(HubError, match=r"offline.*not in the cache"):
        hub.download(REPO, commit, ["README.md"])


def test_a_source_on_the_hub_is_read_at_its_commit(loopback_hub: LoopbackHub, commit: str) -> None:
    source = resolve("pairs", hub_source(), Path())
    assert (source.format, source.kind, source.sniffed, source.revision) == (
        "orca_dpo_pairs",
        "preference",
        True,
        commit,
    )
    rows = source.read(seed=0)
    assert rows["source_file"].to_list() == ["data/train-00000-of-00001.parquet"]
    assert source.license is None
    assert rows["chosen"].to_list() == [[{"role": "assistant", "content": "4"}]]
    assert [name for name, _ in source.fingerprints()] == ["data/train-00000-of-00001.parquet"]


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_prefs
    path: data/train_prefs-*
  - split: test_prefs
    path: data/test_prefs-*
- config_name: extra
  data_files: extra/*.jsonl
---
# Card
"""


def test_the_card_says_which_files_a_split_has(loopback_hub: LoopbackHub) -> None:
    other = PAIRS.with_columns(chosen=pl.lit("test"))
    loopback_hub.commit(
        REPO,
        {
            "README.md": CARD.encode(),
            "data/train_prefs-0.parquet": parquet(PAIRS),
            "data/test_prefs-0.parquet": parquet(other),
            "extra/a.jsonl": json.dumps(PAIRS.row(0, named=True)).encode(),
        },
    )
    names = {
        split: [each.name for each in resolve("pairs", hub_source(split=split), Path()).files]
        for split in ("train_prefs", "test_prefs", "extra/train")
    }
    assert names == {
        "train_prefs": ["data/train_prefs-0.parquet"],
        "test_prefs": ["data/test_prefs-0.parquet"],
        "extra/train": ["extra/a.jsonl"],
    }
    assert resolve("pairs", hub_source(split="extra/train"), Path()).license == "mit"
    assert resolve("pairs", hub_source(split="extra/train", license="apache-2.0"), Path()).license == "apache-2.0"
    with pytest.raises(SourceError, match=r'no split "train": set split = one of test_prefs, train_prefs'):
        resolve("pairs", hub_source(), Path())


def test_several_configurations_without_a_default_one_must_be_named() -> None:
    configs = [{"config_name": name, "data_files": f"{name}/*"} for name in ("a", "b")]
    with pytest.raises(SourceError, match=r'configurations a, b: set split = "<configuration>/<split>"'):
        choose(REPO, ["a/x.jsonl", "b/x.jsonl"], configs, None)
    assert choose(REPO, ["a/x.jsonl", "b/x.jsonl"], configs, "b/train") == ["b/x.jsonl"]
    with pytest.raises(SourceError, match='no configuration "c"'):
        choose(REPO, ["a/x.jsonl"], configs, "c/train")


def test_without_a_card_the_train_files_are_meant_else_all_of_them() -> None:
    names = ["README.md", "dataset_infos.json", ".gitattributes", "test.jsonl", "train-1.jsonl", "train-0.jsonl"]
    assert choose(REPO, names, [], None) == ["train-0.jsonl", "train-1.jsonl"]
    assert choose(REPO, names, [], "test") == ["test.jsonl"]
    assert choose(REPO, ["b.parquet", "a.parquet"], [], None) == ["a.parquet", "b.parquet"]
    with pytest.raises(SourceError, match=r'no data file of the split "validation": it has test\.jsonl'):
        choose(REPO, names, [], "validation")


def test_a_card_that_names_files_which_are_not_there_is_an_error() -> None:
    configs = [{"data_files": [{"split": "train", "path": "data/*.parquet"}]}]
    with pytest.raises(SourceError, match=r"no file matches data/\*\.parquet"):
        choose(REPO, ["other.parquet"], configs, None)
