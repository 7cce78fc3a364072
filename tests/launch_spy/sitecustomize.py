"""Python imports this at the start of every process of a launched run (tests/test_train_launch.py puts it on PYTHONPATH).

Into $SPY/<rank>.jsonl it writes the rows that a process takes into the loss of a step, the token files that it makes and
the files below $SPY_RUNS that it writes. $SPY_KILL ("<rank> <stage> <step>", or "<rank> tokens") is where a process ends itself.
"""

import importlib.util
import json
import os
import signal
import sys
import time
from importlib.abc import MetaPathFinder

RANK, FOLDER, RUNS = os.environ.get("RANK", "alone"), os.environ["SPY"], os.environ["SPY_RUNS"]
KILL = os.environ.get("SPY_KILL", "").split()


def tell(**what):
    with open(f"{FOLDER}/{RANK}.jsonl", "a") as file:  # noqa: PTH123 (pathlib is not imported for it)
        file.write(json.dumps(what) + "\n")


def may_end(*place):
    if [RANK, *place] == KILL:
        tell(killed=time.time())
        os.kill(os.getpid(), signal.SIGKILL)


def watch_trainers(module):
    for trainer in (module.PairTrainer, module.ConversationTrainer):

        def micro_loss(self, model, batch, rows, tokens, own=trainer.micro_loss):
            stage, step = self.args.run_name.rpartition("-")[2], self.state.global_step
            may_end(stage, str(step))
            if model.training and rows > 0:
                tell(stage=stage, step=step, rows=[row["id"] for row in batch])
            return own(self, model, batch, rows, tokens)

        trainer.micro_loss = micro_loss


def watch_tokens(module):
    own = module._write

    def write(path, *rest):
        may_end("tokens")
        tell(tokens=path.name)
        own(path, *rest)

    module._write = write


class Spy(MetaPathFinder):
    """Finds two modules as usual, and changes them once they have run."""

    watched = {"prefmix.train.trainers": watch_trainers, "prefmix.train.data": watch_tokens}  # noqa: RUF012

    def find_spec(self, name, path, target=None):
        watch = self.watched.pop(name, None)
        if watch is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), watch(module))
        return spec


def audit(event, arguments):
    writes = event in ("os.mkdir", "os.rename") or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if writes and str(arguments[0]).startswith(f"{RUNS}/"):
        tell(wrote=str(arguments[0]).removeprefix(f"{RUNS}/"))


sys.meta_path.insert(0, Spy())
sys.addaudithook(audit)
