"""Runs commands on disks that are full, have no inodes or may not be written; prints what came of each case.

To be started in a mount namespace of its own (`unshare -rm`), where each case gets a tmpfs; without one ("limit") the
size of files is limited instead.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from residrop.cli import main

torch.set_num_threads(1)
PLACE, HOW, CASES = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
DISK = PLACE / "disk"


def run(arguments, size=None):
    """Exit code and standard error of a command in a process of its own."""
    said = PLACE / "said"
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            code = main(arguments)
        except BaseException as error:
            print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, said.read_text()


def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", DISK], check=True)


def remount(*options):
    subprocess.run(["mount", "-o", ",".join(["remount", *options]), DISK], check=True)


def one(case):
    """What a case came to: the first answer, and that of the same command once there is room."""
    kind, size, first, again, copied = (case[key] for key in ("kind", "size", "first", "again", "copied"))
    if HOW == "limit" and kind != "size":
        return None
    if HOW == "limit":
        subprocess.run(["rm", "-rf", DISK], check=True)
        DISK.mkdir()
    else:
        mount("size=100m")
    if copied:
        subprocess.run(["cp", "-r", copied, DISK / "run"], check=True)
    used = sum(path.stat().st_blocks * 512 for path in DISK.rglob("*"))
    if HOW != "limit":
        remount(*{"size": [f"size={used + size}"], "inodes": [f"nr_inodes={len([*DISK.rglob('*')]) + size + 1}"],
                  "read-only": ["ro"]}[kind])  # fmt: skip
    found = [run(first, size if HOW == "limit" else None)]
    if HOW != "limit":
        remount(*{"size": ["size=100m"], "inodes": ["nr_inodes=100000"], "read-only": ["rw"]}[kind])
    begun = (DISK / "run" / "recipe.json").exists() or (DISK / "run" / "settings.json").exists()
    found.append(run([*again, "--resume"] if begun and again[0] in ("train", "compare") else again))
    left = [
        str(path.relative_to(DISK)) for path in DISK.rglob("*") if ".residrop" in str(path) or path.suffix == ".tmp"
    ]
    kept = PLACE / f"model-{case['number']}"
    for name in ("run/model.safetensors", "run/constant-seed0/model.safetensors"):
        if (DISK / name).exists():
            subprocess.run(["cp", DISK / name, kept], check=True)
    if HOW != "limit":
        subprocess.run(["umount", DISK], check=True)
    return {"answers": found, "left": left}


DISK.mkdir(exist_ok=True)
main(["train", *CASES[0]["first"][1:-1], str(PLACE / "first")])  # imports everything, once for all
results = [one(case) for case in CASES]
(PLACE / "found.json").write_text(json.dumps(results))
