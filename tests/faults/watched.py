"""Runs commands one after the other and writes down every packet and connection they try.

    python watched.py REPORT COMMAND... [-- COMMAND...]

Started in a network namespace that leads nowhere, it reads from the kernel how many packets found
no route: of any library, in any process. Python's own calls, refused or not, are reported by name
through an audit hook that every Python process below inherits. Ends with the first failure's
status.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

HOOK = """
import os, sys

def watch(event, args):
    if event not in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
                     "socket.gethostbyname", "socket.bind"):
        return
    target = args[0] if event.startswith("socket.get") else args[1]
    if isinstance(target, (str, bytes)) and not event.startswith("socket.get"):
        return  # a socket in the file system
    host = target[0] if isinstance(target, tuple) else target
    if host in ("127.0.0.1", "::1", "localhost", None):
        return
    with open(os.environ["WATCHED"], "a") as file:
        file.write(f"{event} {target}\\n")

sys.addaudithook(watch)
"""


def unroutable() -> int:
    """Packets of this network namespace that found no route so far."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines()]
    names, values = (line for line in lines if line[0] == "Ip:")
    six = Path("/proc/net/snmp6")
    told = [line.split() for line in six.read_text().splitlines()] if six.exists() else []
    return int(values[names.index("OutNoRoutes")]) + sum(
        int(line[1]) for line in told if line[0] == "Ip6OutNoRoutes"
    )


def main(report: str, words: list[str]) -> int:
    before, status = unroutable(), 0
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(HOOK)
        calls = Path(folder, "calls")
        calls.touch()
        path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "WATCHED": str(calls)}
        for separator, command in groupby(words, lambda word: word == "--"):
            if not separator and not status:
                status = subprocess.run(list(command), env=env).returncode
        seen = {"packets": unroutable() - before, "calls": calls.read_text().splitlines()}
    Path(report).write_text(json.dumps(seen))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
