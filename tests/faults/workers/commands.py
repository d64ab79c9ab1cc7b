"""Runs commands of residrop in processes of their own, forked from one that has imported everything already.

Reads one line of JSON at a time: [[arguments, file for standard error], ...]. Answers with the numbers of the
processes as soon as they have started, and with their exit codes when all have ended.
"""

import json
import os
import sys

import torch

from residrop.cli import main

torch.set_num_threads(1)
assert main(["train", *sys.argv[2:], "--out", sys.argv[1]]) == 0
sys.stdout.flush()


def start(arguments, said):
    """Fork a process that runs a command; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.setpgrp()
        code = main(arguments)
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


print("ready", flush=True)
for line in sys.stdin:
    started = [start(*one) for one in json.loads(line)]
    print(json.dumps(started), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]), flush=True)
