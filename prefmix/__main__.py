"""The command line as a process: `prefmix` and `python -m prefmix`.

Until `main` runs, Ctrl-C is Python's own traceback: this module imports nothing that Python has not imported itself.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_INTERRUPTED = 130


def main() -> NoReturn:
    """Runs the command line and exits: 0 ok, 1 expected failure, 2 usage or recipe, 3 gate failed, 130 interrupted."""
    try:
        import signal

        # No KeyboardInterrupt before `run_beside` asks for it: NumPy, for one, makes an ImportError of it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _leave)
        from prefmix.cli.main import run
        from prefmix.cli.screen import replace_unwritable
    except KeyboardInterrupt:
        _leave()
    replace_unwritable()
    code = run(sys.argv[1:])
    if code == _INTERRUPTED:
        os._exit(code)  # at once: work may be going on in a thread
    sys.exit(code)


def _leave(*_: object) -> NoReturn:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
