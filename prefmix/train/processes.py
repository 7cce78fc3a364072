"""The processes of a run, one for each GPU, on one node or on several: torchrun or accelerate has started them.

What one of them finds or makes for all is told to the others, so that no two decide differently. While one works the
others wait in a group of their own: NCCL gives up after minutes, and does not see that a process has ended.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import accelerate
import torch
from accelerate.utils import broadcast_object_list, gather_object

from prefmix.errors import TrainError
from prefmix.mixture import Mixture
from prefmix.train.weights import device

Result = TypeVar("Result")
#: Longer than anything takes that one process does for all: tokenising, verifying, downloading a base.
_PATIENCE = timedelta(days=2)
#: More than processes that have started need to connect.
_MEETING = timedelta(minutes=1)


def join() -> accelerate.PartialState:
    """The place of this process among those of the run, which meet here. Raises TrainError where they do not reach each
    other."""
    try:
        state = accelerate.PartialState(cpu=device().type == "cpu")  # unasked, it sees no other process on a CPU
        wait()
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise TrainError(f"The processes do not reach each other from {socket.gethostname()} under the names of their machines. "
                         f"Name the network between them on all nodes: GLOO_SOCKET_IFNAME=eth0.") from error  # fmt: skip
    return state


def leave() -> None:
    """Ends what `join` began. Nothing can be trained in this process afterwards."""
    if accelerate.PartialState().num_processes > 1:
        accelerate.PartialState().destroy_process_group()


def wait() -> None:
    """Returns when all processes are here. Raises RuntimeError ("closed by peer") where one has ended."""
    if accelerate.PartialState().num_processes > 1:
        torch.distributed.barrier(group=_waiting_room())


@cache
def _waiting_room() -> Any:
    torch.distributed.new_group(backend="gloo", timeout=_MEETING)  # with patience they would try to connect for days
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def first_of_its_node() -> Generator[None]:
    """The first process of each node goes through the block, then its others: what it leaves on the disk they find."""
    first = accelerate.PartialState().is_local_main_process
    if not first:
        wait()
    yield
    if first:
        wait()


def from_main(find: Callable[[], Result]) -> Result:
    """What the main process finds, in all of them."""
    found: list[Any] = [find() if accelerate.PartialState().is_main_process else None]
    wait()
    return broadcast_object_list(found)[0]


def check_common(mixture: Mixture, folder: Path) -> None:
    """Raises TrainError where a process has another mixture than the main one, or does not see the folder that the main one
    writes to. The mixture may lie on a disk of each node; the folder of a run has to be on one that all of them share."""
    state = accelerate.PartialState()
    if state.num_processes == 1:
        return
    digest, mark = from_main(lambda: (mixture.digest, f".{token_hex(8)}"))
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / mark).touch()
    wait()
    here = (state.process_index, socket.gethostname(), mixture.digest, (folder / mark).is_file())
    found = gather_object([here])
    if state.is_main_process:
        (folder / mark).unlink()
    for rank, host, has, sees in found:
        if has != digest:
            raise TrainError(f"Process {rank} on {host} has another {mixture.name} (digest {has[:12]}) than process 0 "
                             f"({digest[:12]}). Copy the mixture of process 0 there, or name it with --mixture.")  # fmt: skip
        if not sees:
            raise TrainError(f"Process {rank} on {host} does not see the folder {folder} of process 0. Give the run a "
                             f'folder on a disk that all nodes share (--set train.output="...").')  # fmt: skip
