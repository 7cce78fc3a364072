"""Mixtures and runs on the Hub: pushed as one tagged commit, pulled as what they were.

    push(mixture, "user/my-mix")                  # Parquet, card, recipe and ledger in one commit, then the tag v1
    mixture = pull("user/my-mix@v1", store)       # the same digest, build, rows and ledger

to_hub      from a mixture to a tag on the Hub
run_to_hub  from a run to the branches of a repository of models
from_hub    from a tag on the Hub to a version in a store
shards      Arrow here, Parquet there

The mixture.json of a repository lists the Parquet files; a pull checks each of them, writes Arrow, checks the digest, which
is over the content and knows of neither, and writes a mixture.json that lists the Arrow files. The tag is the publish
point: it is made last, and what has one is complete. A push that failed is finished by running it again.
"""

from __future__ import annotations

from pathlib import Path

from prefmix import store as local
from prefmix.mixture import Mixture
from prefmix.publish.from_hub import pull
from prefmix.publish.run_to_hub import PushedRun, push_run, unmerged
from prefmix.publish.to_hub import Pushed, Sent, push

__all__ = ["Pushed", "PushedRun", "Sent", "open_mixture", "pull", "push", "push_run", "unmerged"]


def open_mixture(reference: str | Path, store: str | Path | None = None) -> Mixture:
    """Opens a mixture by reference: a folder, `name` (its last version), `name@v2`, `name@<prefix of build or digest>`,
    or `hub:user/repo@v2`, which is pulled into the store first unless it is there.

    `store` is the folder that holds the mixtures: else the environment's PREFMIX_STORE, else `./mixtures`.
    Raises MixtureError when there is no such mixture, or more than one that it could mean; HubError.
    """
    if str(reference).startswith("hub:"):
        return pull(str(reference), store)
    return local.open_mixture(reference, store)
