"""Files of the user: what lies at a path is replaced, followed, written to or refused, and nothing else is left."""

import errno
import json
import multiprocessing
import os
import signal
import stat
import threading
from pathlib import Path

import pytest

from residrop.common.errors import ConfigError
from residrop.common.files import as_json, replacing, write_json, write_text
from residrop.common.output import check_target, write, writing


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# Regular files


def test_readers_see_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        assert temporary.parent != path.parent
        assert mode(temporary.parent) == 0o700
        temporary.write_text("new")
    assert path.read_text() == "new"
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"worse{1 // 0}")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_no_two_temporary_names_are_equal(tmp_path):
    seen = set()
    for _ in range(20):
        with replacing(tmp_path / "a.txt") as temporary:
            seen.add(temporary.parent.name)
    assert len(seen) == 20


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_a_plain_open(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as temporary:
            temporary.unlink()  # as safetensors does, whose new file its owner alone can read
            temporary.touch(0o600)
        (tmp_path / "plain").write_text("")
        write_text(tmp_path / "b", "")
        (tmp_path / "b").chmod(0o640)
        write_text(tmp_path / "b", "again")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == mode(tmp_path / "plain") == 0o666 & ~umask
    assert mode(tmp_path / "b") == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_existing_file_keeps_its_owner(tmp_path):
    path = tmp_path / "a"
    path.write_text("")
    os.chown(path, 1234, 2345)
    write_text(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid, path.read_text()) == (1234, 2345, "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_what_is_read_only_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_text("kept")
    path.chmod(0o444)
    with pytest.raises(PermissionError):
        write_text(path, "new")
    with pytest.raises(ConfigError, match="Permission denied"):
        check_target(path)
    assert path.read_text() == "kept"


# Links, devices, FIFOs


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to("real/a")
    dangling.symlink_to("real/b")
    (tmp_path / "real" / "a").write_text("old")
    check_target(link)
    for path in (link, dangling):
        write_text(path, "new")
        assert path.is_symlink()
        assert path.resolve().read_text() == "new"
    assert names(tmp_path) == ["a", "b", "dangling", "link", "real"]


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="symbolic links"):
        check_target(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "loop", "")
    assert (tmp_path / "loop").is_symlink()


def test_a_fifo_is_written_to(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()))
    reader.start()
    check_target(fifo)
    write_text(fifo, "through\n")
    reader.join(10)
    assert got == ["through\n"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert names(tmp_path) == ["fifo"]


def test_a_device_is_written_to_and_stays_one(tmp_path):
    """Through links, or a failing test run by root would replace the device itself."""
    null, full = tmp_path / "null", tmp_path / "full"
    null.symlink_to("/dev/null")
    full.symlink_to("/dev/full")
    for link in (null, full):
        check_target(link)
    write_text(null, "gone")
    with pytest.raises(OSError, match="No space") as found:
        write_text(full, "too much")
    assert found.value.errno == errno.ENOSPC
    assert null.is_char_device()
    assert full.is_char_device()
    assert names(tmp_path) == ["full", "null"]


def test_a_file_that_is_standard_output_is_written_on(tmp_path, capfd):
    kept = os.dup(1)
    try:
        with (tmp_path / "log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.write(1, b"first\n")
            write("/dev/stdout", [1])
            os.write(1, b"last\n")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert (tmp_path / "log").read_text() == "first\n[\n  1\n]\nlast\n"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "")
    with pytest.raises(ConfigError, match=r"--picture .* cannot be written \(Is a directory\); give another file"):
        check_target(tmp_path, "--picture")
    assert names(tmp_path) == []


# What killed processes leave


def killed_while_writing(path, ready):
    with replacing(path) as temporary:
        temporary.write_bytes(bytes(1000))
        ready.set()
        signal.pause()


def test_what_a_killed_process_leaves_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path, context = tmp_path / "a", multiprocessing.get_context("fork")
    path.write_text("old")
    for _ in range(2):
        ready = context.Event()
        process = context.Process(target=killed_while_writing, args=(path, ready))
        process.start()
        assert ready.wait(20)
        process.kill()
        process.join()
        assert len(list(tmp_path.iterdir())) == 2  # not three: the second removes what the first left
    (tmp_path / ".residrop-killed-before-its-lock.tmp").mkdir()
    with replacing(path) as mine:
        mine.write_text("mine")
        write_text(tmp_path / "b", "other")
        assert {one.name for one in tmp_path.iterdir()} == {mine.parent.name, "a", "b"}
    assert names(tmp_path) == ["a", "b"]
    assert path.read_text() == "mine"


def write_often(path, number):
    for _ in range(200):
        write_json(path, [number] * 100)


def test_writers_at_the_same_time_do_not_harm_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_often, args=(tmp_path / "a", number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(set(json.loads((tmp_path / "a").read_text()))) == 1
    assert names(tmp_path) == ["a"]


# Before the work


@pytest.mark.parametrize(
    "name",
    ["x" * 300, "new/" + "x" * 300, "file/below", "new/" * 3000 + "a", ""],
    ids=["long", "long in a new folder", "below a file", "long path", "empty"],
)
def test_names_that_no_file_can_have_are_refused_before_the_work(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(ConfigError, match=r"^--to .* cannot be written \(.+\); give another file"):
        check_target(name, "--to")
    with pytest.raises(ConfigError, match="cannot be written"), writing(name, "--to") as temporary:
        temporary.write_text("")
    assert names(tmp_path) in (["file"], ["file", "new"])


def test_folders_are_made_and_names_need_not_be_utf8(tmp_path):
    path = tmp_path / "new" / os.fsdecode(b"\xff.json")
    check_target(str(path))
    write(str(path), [os.fsdecode(b"\xff")])
    assert json.loads(path.read_bytes()) == ["\udcff"]
    write_text(path, os.fsdecode(b"\xff"))
    assert path.read_bytes() == b"\\udcff"


def test_json_has_null_for_what_is_no_number():
    value = {"a": [float("nan"), (float("inf"), 1.5)], "b": True, "c": None, "d": "nan"}
    assert json.loads(as_json(value)) == {"a": [None, [None, 1.5]], "b": True, "c": None, "d": "nan"}
