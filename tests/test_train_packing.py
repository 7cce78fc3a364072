"""Packed runs against padded runs: the same curves; and what happens where packing would be wrong."""

from __future__ import annotations

import pytest
from test_train_run import changed, home, timeless  # noqa: F401 (a fixture)

from prefmix.errors import TrainError
from prefmix.train import packed
from prefmix.train.run import Watcher, train
from prefmix.train.sft import ConversationTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

SETTINGS = ("[train]\n", "[train]\npacking = {}\n")
QUIET = ("eval_every = 2\ncheckpoint_every = 1\n", "")


class Notes(Watcher):
    def __init__(self):
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def packing(value: str) -> tuple[str, str]:
    return SETTINGS[0], SETTINGS[1].format(value)


def test_fifty_steps_packed_and_padded_have_the_same_curves(home, tmp_path):  # noqa: F811
    steps = [("max_steps = 4", "max_steps = 50"), ("learning_rate = 1e-2", "learning_rate = 2e-3"), QUIET]
    smooth = ("dropout = 0.1", "dropout = 0.0")
    curves = {}
    for value in ("true", "false"):
        done = train(changed(home, tmp_path / value, *steps, smooth, packing(value)), store=home / "store")
        assert [stage.run["packed"] for stage in done.stages] == [value == "true"] * 2
        curves[value] = [timeless(stage.folder / "metrics.jsonl") for stage in done.stages]
    for dpo_and_sft in zip(curves["true"], curves["false"], strict=True):
        steps_of = [[line for line in lines if "loss" in line] for lines in dpo_and_sft]
        for one, other in zip(*steps_of, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-4)
            if "rewards/margins" in one:
                assert one["rewards/margins"] == pytest.approx(other["rewards/margins"], rel=1e-2, abs=1e-3)
    losses = [line["loss"] for line in curves["true"][0] if "loss" in line]
    assert losses[-1] < losses[0] - 0.05, "the curve is one of a model that learns"


def test_in_nf4_packed_and_padded_runs_have_the_same_curves(home, tmp_path):  # noqa: F811
    nf4 = ('quantization = "none"', 'quantization = "nf4"')
    runs = [
        train(
            changed(home, tmp_path / value, nf4, ("dropout = 0.1", "dropout = 0.0"), packing(value)),
            store=home / "store",
        )
        for value in ("true", "false")
    ]
    for one, other in zip(*(run.stages for run in runs), strict=True):
        for packed_line, padded_line in zip(
            *(timeless(each.folder / "metrics.jsonl") for each in (one, other)), strict=True
        ):
            for name in ("loss", "eval_loss", "grad_norm"):
                if name in packed_line:
                    assert packed_line[name] == pytest.approx(padded_line[name], rel=1e-3, abs=1e-4)


def test_a_packed_pass_that_is_wrong_is_noticed_and_not_used(home, tmp_path, monkeypatch):  # noqa: F811
    right = packed.sees

    def blind(rows, parts, positions, query, key, window):  # the rejected answer sees the chosen one
        return right(rows, parts * 0, positions, query, key, window) | right(rows, parts, positions, query, key, window)

    monkeypatch.setattr(packed, "sees", blind)
    notes = Notes()
    done = train(changed(home, tmp_path / "auto"), store=home / "store", watcher=notes)
    assert done.stages[0].run["packed"] is False
    assert any("other likelihoods" in text for text in notes.told)
    with pytest.raises(TrainError, match="cannot be packed"):
        train(changed(home, tmp_path / "told", packing("true")), store=home / "store")


def test_a_model_that_cannot_be_packed_is_trained_padded_unless_the_recipe_insists(home, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(packed, "refused", lambda config: "its attention is of another kind")
    notes = Notes()
    done = train(changed(home, tmp_path / "auto"), store=home / "store", watcher=notes)
    assert [stage.run["packed"] for stage in done.stages] == [False, False]
    assert any("padded path: its attention is of another kind" in text for text in notes.told)
    with pytest.raises(TrainError, match="another kind"):
        train(changed(home, tmp_path / "told", packing("true")), store=home / "store")


def test_a_wrong_pass_and_rounding_are_told_apart_over_enough_tokens(home, tmp_path, monkeypatch):  # noqa: F811
    """Over two rows of a few tokens bf16 alone can differ by more than the bound."""
    tried = []
    likelihoods = ConversationTrainer.likelihoods

    def noted(self, batch):
        tried.append(sum(label != -100 for row in batch for label in row["labels"]))
        return likelihoods(self, batch)

    monkeypatch.setattr(ConversationTrainer, "likelihoods", noted)
    done = train(changed(home, tmp_path), store=home / "store")
    assert done.stages[1].run["packed"]
    assert len(tried) == 2, "once packed, once padded"
    assert tried[0] == tried[1] >= 64
