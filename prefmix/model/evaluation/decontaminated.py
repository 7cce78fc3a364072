"""Whether the mixture that a model was trained on was searched for the text of a suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefmix.errors import MixtureError, ModelError
from prefmix.mixture import Mixture
from prefmix.scores.suites import SUITE_OF, Suite
from prefmix.store import open_mixture
from prefmix.train.records import read_json

Mark = Literal["decontaminated", "not decontaminated", "unknown"]


@dataclass(frozen=True)
class TrainingData:
    """The mixture of a model, if it is known; else `why` says why not."""

    mixture: Mixture | None
    why: str = ""

    def mark(self, suite: Suite) -> Mark:
        """A mixture was decontaminated against a suite when it was built with the suite, or with benchmarks of one's own of
        its name or that of each of its tasks."""
        if self.mixture is None:
            return "unknown"
        searched = self.mixture.manifest.get("contamination") or {}
        whole = {suite.name, *(SUITE_OF[task] for task in suite.tasks if len(suite.tasks) == 1 and task in SUITE_OF)}
        done = whole & searched.keys() or set(suite.tasks) <= searched.keys()
        return "decontaminated" if done else "not decontaminated"

    def line(self, suite: Suite) -> str:
        """What is to be said before a suite is asked."""
        mark = self.mark(suite)
        if self.mixture is None:
            return f"{suite.name}: whether its text was in the training data is unknown: {self.why}"
        if mark == "not decontaminated":
            return (f"{suite.name}: {self.mixture} was not decontaminated against it: a score may come from having seen "
                    f"the items")  # fmt: skip
        report = self.mixture.manifest["contamination"].get(suite.name)
        dropped = f", {report['dropped']:,} rows were dropped for it" if report else ""
        return f"{suite.name}: {self.mixture} was decontaminated against it{dropped}"


def run_of(model: str | Path) -> Mapping[str, Any] | None:
    """The run.json of the stage that a folder is the merge of: the one beside it, of the same adapter. None for others."""
    folder = Path(model)
    merge, run = read_json(folder / "merge.json"), read_json(folder.absolute().parent / "run.json")
    return run if merge and run and merge.get("adapter_sha256") == run.get("adapter_sha256") else None


def training_data(run: Mapping[str, Any] | None, reference: str | None, store: str | Path | None) -> TrainingData:
    """The mixture that a run names in its run.json, found in the store by its digest; or the one of `reference`.

    Raises MixtureError when there is no mixture of that reference, ModelError when the run was trained on another one.
    """
    asked = (run or {}).get("mixture")
    if reference is not None:
        mixture = open_mixture(reference, store)
        if asked and asked["digest"] != mixture.digest:
            raise ModelError(f"--mixture {reference} has the digest {mixture.digest[:12]}, and the run was trained on "
                             f"{asked['name']} {asked['digest'][:12]}: name that one, or leave --mixture out.")  # fmt: skip
        return TrainingData(mixture)
    if not asked:
        return TrainingData(None, "no run.json says what it was trained on (--mixture names it)")
    try:
        return TrainingData(open_mixture(f"{asked['name']}@{asked['digest'][:12]}", store))
    except MixtureError:
        return TrainingData(
            None, f"its mixture {asked['name']} {asked['digest'][:12]} is not in the store (--store, --mixture)"
        )
