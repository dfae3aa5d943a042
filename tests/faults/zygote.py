"""A process that has imported everything and forks a pretraining run on request.

Importing torch takes seconds, and these tests start a hundred runs. A line of JSON comes in on
standard input, one goes out on standard output:

    {"start": [arguments], "env": {…}, "output": file, "code": ""}   →  {"pid": n}
    {"poll": pid}                                 →  {"code": exit code, −signal or null}

With `code` that Python is run, with the arguments as ARGS, instead of a pretraining.

Every child is a session of its own and is killed when this process ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest's pythonpath has it
sys.path.insert(0, str(Path(__file__).resolve().parent))

import command
import pytest  # noqa: F401  the modules of tests import it

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def start(request: dict[str, Any]) -> int:
    """Fork a run; its output goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        os.setsid()
        # A shell's & ignores the first, nohup the second; a test that wants that says so.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for to, fd in ((0, null), (1, output), (2, output)):
            os.dup2(fd, to)
        os.environ.update(request["env"])
        if request["code"]:
            source = compile(request["code"], "<code>", "exec")
            exec(source, {"__name__": "code", "ARGS": request["start"]})
            code = 0
        else:
            code = command.main(request["start"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def poll(pid: int) -> int | None:
    """The exit code of a child, −signal where one ended it, None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    print(json.dumps({"ready": True}), file=answer, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reply = {"pid": start(request)} if "start" in request else {"code": poll(request["poll"])}
        print(json.dumps(reply), file=answer, flush=True)


if __name__ == "__main__":
    main()
