"""Two writers at once: each directory has one, the other is told who it is, and nothing is lost or doubled."""

import json

import pytest

RECIPE = (
    *("--network", "resnet-8", "--limit", "200", "--epochs", "2", "--samples", "0", "--precision", "fp32"),
    *("--device", "cpu", "--quiet"),
)
TOLD = ("is in use by", "already holds a")


def check(process, codes, least_done=1):
    """All ended well but those that were told of another writer."""
    assert codes.count(0) >= least_done, [process.said(number) for number in range(len(codes))]
    for number, code in enumerate(codes):
        if code:
            said = process.said(number)
            assert code == 2, said
            assert said.startswith("residrop: error: "), said
            assert said.count("\n") == 1, said
            assert any(text in said for text in TOLD), said


def assert_whole(run, weights):
    assert (run / "model.safetensors").read_bytes() == weights
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert not (run / "run.lock").exists()


@pytest.mark.slow  # tests/common/test_lock.py has what runs by default
@pytest.mark.timeout(1800)
def test_two_writers(commands, tmp_path, record_property):
    send, whole = commands(*RECIPE)
    weights, tried = (whole / "model.safetensors").read_bytes(), 0
    for number in range(10):
        out = tmp_path / f"one-{number}"
        train = ["train", *RECIPE, "--out", str(out)]
        for command in (train, [*train, "--resume"]):  # into one directory; resuming it
            process = send(command, command, command)
            check(process, process.codes())
            assert_whole(out, weights)
            tried += 1
        before = {path.name for path in (tmp_path / "work" / "runs").glob("*")}
        process = send(["train", *RECIPE], ["train", *RECIPE], ["train", *RECIPE])  # without a directory
        codes = process.codes()
        assert codes == [0, 0, 0], [process.said(number) for number in range(3)]
        new = {path.name for path in (tmp_path / "work" / "runs").glob("*")} - before
        assert len(new) == 3
        for name in new:
            assert_whole(tmp_path / "work" / "runs" / name, weights)
        both = ["compare", *RECIPE, "--rules", "constant", "--out", str(tmp_path / f"both-{number}")]
        process = send(both, both)
        check(process, process.codes())
        assert len(json.loads((tmp_path / f"both-{number}" / "compare.json").read_text())) == 1
        process = send([*both, "--resume"], [*both, "--resume"])
        check(process, process.codes())
        readers = [["evaluate", str(out), "--samples", "0"], ["recalibrate", str(out), "--batches", "1"]]
        process = send([*train, "--resume"], readers[0], readers[1], readers[1])  # beside those that read it
        assert process.codes() == [0, 0, 0, 0], [process.said(number) for number in range(4)]
        assert_whole(out, weights)
        tried += 4
    record_property("tried", tried)
