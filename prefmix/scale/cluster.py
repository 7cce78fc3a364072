"""Pieces of work on a Ray cluster: one that is there, or one of this machine's cores that is started for the build.

Each piece of work is a Ray task. What they share, the job, is put into the object store once a stage; an item and a small
result travel with each task. Texts do not: they are read from and written to files that all nodes see. Tasks, not Ray Data:
an item is a number, and a stage of Ray Data starts a scheduler of its own (docs/scaling.md has what each of them takes).
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from types import ModuleType, TracebackType
from typing import Any

from prefmix.errors import BuildError, PrefmixError, UsageError
from prefmix.scale.job import Job, Result, Task

#: A worker is one of as many as its machine has cores: libraries must not start as many threads each.
_ENVIRONMENT = dict.fromkeys(
    ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"
) | {"TOKENIZERS_PARALLELISM": "false"}
#: On whose versions it depends what is written: workers must have those of this process.
_SAME = ("prefmix", "polars", "numpy")
_RETRIES = 3  # of a piece of work whose process or node died
_AHEAD = 4  # pieces of work for each core that are given out before their results are taken
_REACHED_S = 30.0  # Ray itself tries a dead address for minutes
_HEARD_S = 5.0
_ENDED_S = 10.0
_SEEN = "cluster.json"  # what a node looks for, to know that it sees the scratch folder
_TRIAL = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
except Exception as error:
    sys.exit(" ".join(str(error).split()))
"""


class Cluster:
    """The Ray cluster at `address` ("auto": the one that this machine is a node of; "head:6379"), which is left running;
    without an address one of this machine, which lives as long as the `with`.

    Raises UsageError when Ray is not installed, or for an address that is no such one.
    """

    def __init__(self, address: str | None) -> None:
        if address is not None and "://" in address:
            raise UsageError(
                f"--address {address}: prefmix runs on a machine of the cluster. Start it there, with --address auto, or "
                "with the HOST:PORT that `ray start` was given."
            )
        self._address = address
        self._ray = _ray()
        self._connected = False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connected:  # from a cluster that was there this only takes leave
            self._ray.shutdown()
            self._connected = False

    def map(self, task: Task, job: Job, items: Sequence[Any]) -> Iterator[Result]:
        """As `Engine` has it.

        Raises what the piece of work raised, and BuildError: the cluster cannot be reached or has no cores, a node has other
        versions or does not see the scratch folder, or a piece of work ended its process again and again.
        """
        if not items:
            return
        cores = self._cores(job)
        ray, waiting = self._ray, deque()
        job.scratch.at_work().done(_SEEN, {})
        work, shared, same = _remote(ray), ray.put(job), {name: version(name) for name in _SAME}
        try:
            for item in items:
                # The job in a list and the item as bytes: a worker with other versions must not have to unpickle them.
                waiting.append(work.remote(same, [shared], ray.cloudpickle.dumps((task, item))))
                if len(waiting) > _AHEAD * cores:
                    yield self._result(waiting.popleft(), job, same)
            while waiting:
                yield self._result(waiting.popleft(), job, same)
        finally:
            self._stop(waiting)

    def _cores(self, job: Job) -> int:
        """How many pieces of work the cluster does at a time; connects with it first."""
        if not self._ray.is_initialized():
            self._connect(job.sizes.workers)
        cores = int(self._ray.cluster_resources().get("CPU", 0))
        if not cores:
            raise BuildError(
                "The Ray cluster has no CPUs to work with: start a node with some (`ray start --num-cpus`)."
            )
        return cores

    def _connect(self, workers: int) -> None:
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            settings |= {"address": "local", "num_cpus": workers, "num_gpus": 0, "include_dashboard": False}
        else:
            _reach(self._address)
            settings |= {"address": self._address}
        try:
            self._ray.init(**settings)
        except Exception as error:
            raise BuildError(f"Ray at {self._address or 'this machine'} cannot be used: {_line(error)}") from error
        self._connected = True

    def _result(self, reference: Any, job: Job, same: dict[str, str]) -> Result:
        try:
            what, value = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise BuildError(self._died(error)) from error
        if what == "result":
            return value
        if what == "versions":
            node, found = value
            differ = [
                f"{name} {found[name]} and not {wanted}" if found[name] else f"no {name}"
                for name, wanted in same.items()
                if found[name] != wanted
            ]
            raise BuildError(
                f"Ray's node {node} has {', '.join(differ)}: install the same versions on all nodes as where the build "
                "was started."
            )
        if what == "unseen":
            raise BuildError(
                f"Ray's node {value} does not see the scratch folder {job.scratch}: give one with --scratch that all "
                "nodes share, under the same name."
            )
        error, cause = self._ray.cloudpickle.loads(value)
        raise error from cause

    def _died(self, error: Exception) -> str:
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.WorkerCrashedError | exceptions.OutOfMemoryError | exceptions.NodeDiedError):
            return (
                f"A piece of work ended its process {_RETRIES + 1} times on the Ray cluster, most often for want of memory: "
                "give less --memory, or nodes with more of it for each core."
            )
        return f"The Ray cluster failed: {_line(error)}"

    def _stop(self, waiting: deque[Any]) -> None:
        """Ends what is at work, so that it writes no more."""
        if waiting and self._ray.is_initialized():
            for reference in waiting:
                self._ray.cancel(reference, force=True)
            self._ray.wait(list(waiting), num_returns=len(waiting), timeout=_ENDED_S)


def _ray() -> ModuleType:
    silence = (
        "RAY_DEDUP_LOGS_SKIP_REGEX"  # Ray prints on stdout that a worker has died; it reads this when it is imported
    )
    silent = silence in os.environ or "ray" in sys.modules
    if not silent:
        os.environ[silence] = "."
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray needs Ray: pip install 'prefmix[ray]'") from None
    finally:
        if not silent:
            del os.environ[silence]
    return ray


def _reach(address: str) -> None:
    """Connects once from a process that can be ended: Ray's own attempt takes minutes, and then ends its process.

    Raises BuildError.
    """
    problem = "no Ray cluster answers there"
    with suppress(OSError, ValueError):
        if ":" in address:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=_HEARD_S).close()
        environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
        command = [sys.executable, "-c", _TRIAL, address]
        try:
            tried = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_REACHED_S, check=False
            )
        except subprocess.TimeoutExpired:
            tried = None
        if tried and not tried.returncode:
            return
        if tried and "InvalidAuthToken" in tried.stderr:
            raise BuildError(
                f"--address {address}: the cluster asks for its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the "
                "file that holds it."
            )
        if tried and not (last := tried.stderr.strip().rsplit("\n", 1)[-1]).startswith("["):  # a line of Ray's log
            problem = last.rstrip(".")
    raise BuildError(
        f"--address {address}: {problem}. `ray start --head` starts a cluster; run prefmix on one of its machines."
    )


def _line(error: Exception) -> str:
    """The last line of what Ray says of an error: the others are where in Ray it was."""
    return str(error).strip().rsplit("\n", 1)[-1]


def _remote(ray: ModuleType) -> Any:
    def work(same: dict[str, str], shared: list[Any], item: bytes) -> tuple[str, Any]:
        # This function travels by its code: it must run where prefmix is another one, or none.
        import platform
        from importlib.metadata import PackageNotFoundError, version

        found: dict[str, str | None] = {}
        for name in same:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
        if found != same:
            return "versions", (platform.node(), found)
        from prefmix.scale.cluster import attempt

        return attempt(shared, item)

    settings = {"num_cpus": 1, "max_retries": _RETRIES, "scheduling_strategy": "SPREAD", "name": "prefmix"}
    return ray.remote(**settings, runtime_env={"env_vars": _ENVIRONMENT})(work)


#: The job of the piece of work before, in a worker: most often it is that of the next one.
_latest: dict[str, Job] = {}


def attempt(shared: list[Any], item: bytes) -> tuple[str, Any]:
    """Does a piece of work, in a worker; gives ("result", it), ("error", the exception and its cause) or ("unseen", node)."""
    import platform

    from ray import cloudpickle, get

    try:
        reference = shared[0]
        if reference.hex() not in _latest:
            _latest.clear()  # first: two jobs take twice the room
            _latest[reference.hex()] = get(reference)
        job = _latest[reference.hex()]
        if job.scratch.result(_SEEN) is None:
            return "unseen", platform.node()
        task, inner = cloudpickle.loads(item)
        return "result", task(job, inner)
    except Exception as error:
        error.add_note("".join(["On a worker of the Ray cluster:\n", *traceback.format_exception(error)]))
        return "error", _packed(cloudpickle, error)


def _packed(cloudpickle: ModuleType, error: Exception) -> bytes:
    """An exception with its cause; one that does not come out again as a PrefmixError with its text."""
    for cause in (error.__cause__, None):
        try:
            packed = cloudpickle.dumps((error, cause))
            cloudpickle.loads(packed)
            return packed
        except Exception:
            continue
    return cloudpickle.dumps((PrefmixError(f"{type(error).__name__}: {error}"), None))
