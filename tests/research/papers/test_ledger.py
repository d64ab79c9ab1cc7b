"""One schema for all results: what it refuses, how seeds are merged, and every file that is committed."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from residrop.common.errors import RunError
from residrop.research import ledger

RESULTS = sorted((Path(__file__).parents[3] / "results").glob("*.json"))
VERSIONS = {"torch": "2.9", "threads": "2"}


def paper(**changes):
    return {
        "kind": "paper",
        "id": "swapout/table-2/0.5-0.5-stochastic",
        "metric": "sampled_error",
        "published": 6.69,
        "measured": [7.0],
        "seeds": [0],
        "scale": 1.0,
        "epochs": 256,
        "recipe": "0123456789abcdef",
        "variant": None,
        "wall_seconds": [100.0],
        "note": "",
        **changes,
    }


def made(*entries, **changes):
    return {
        "schema": 1,
        "what": "Table 2",
        "command": "residrop reproduce swapout/table-2",
        "date": "2026-11-21",
        "device": "cpu (x86)",
        "versions": dict(VERSIONS),
        "entries": list(entries) or [paper()],
        **changes,
    }


def put(folder, *entries, device="cpu (x86)", versions=VERSIONS, **changes):
    given = {"what": "Table 2", "command": "residrop reproduce swapout/table-2 --seeds {seeds}", **changes}
    return ledger.record(folder, "swapout/table-2", entries, device=device, found=versions, **given)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_are_documents(path):
    found = json.loads(path.read_text())
    ledger.check(found, path.name)
    assert found["entries"]


def test_there_are_results():
    assert len(RESULTS) > 20


def test_right_documents_pass():
    ledger.check(made())
    ledger.check(made(paper(published=None, recipe=None, epochs=None, standard_errors=[0.1])))
    ledger.check(made({"kind": "measurement", "a": 1, "b": None, "c": True, "d": "x / y", "e": [1.5, "z", None]}))
    assert ledger.document("what", "how", [{"a": {"b": 1}}], device="cpu")["entries"] == [
        {"kind": "measurement", "a.b": 1}
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema is 2; give 1"),
        ({"what": ""}, "what is ''; give a text"),
        ({"date": "21.11.2026"}, "date is '21.11.2026'"),
        ({"versions": {"torch": 2}}, "versions.torch is 2"),
        ({"entries": []}, "entries is"),
        ({"entries": [{"kind": "other"}]}, r"entries\[0\]: kind is 'other'"),
        ({"more": 1}, "more unknown"),
        ({"command": "residrop train --data /home/me/cifar"}, "command holds a path"),
        ({"device": "cpu (~/x)"}, "device holds a path"),
    ],
)
def test_wrong_documents_are_refused(changes, message):
    with pytest.raises(RunError, match=f"^somewhere.*{message}"):
        ledger.check(made(**changes), "somewhere")


def test_missing_fields_are_named():
    document = made()
    del document["device"]
    with pytest.raises(RunError, match="device missing"):
        ledger.check(document)
    with pytest.raises(RunError, match="is list; give a JSON object"):
        ledger.check([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "table-2/key"}, 'give "paper/table/row"'),
        ({"id": "swapout//key"}, 'give "paper/table/row"'),
        ({"scale": 0.0}, r"in \(0, 1\]"),
        ({"scale": 1.5}, r"in \(0, 1\]"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 2.5}, "epochs is 2.5"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [0, 0], "measured": [1.0, 2.0], "wall_seconds": [1.0, 1.0]}, "different whole numbers"),
        ({"measured": [1.0, 2.0]}, "one number per seed, 1 in all"),
        ({"measured": [math.nan]}, "finite"),
        ({"measured": [True]}, "finite"),
        ({"wall_seconds": []}, "wall_seconds is"),
        ({"standard_errors": [1.0, 2.0]}, "standard_errors is"),
        ({"published": "6.69"}, "published is '6.69'"),
        ({"variant": ""}, "variant is ''"),
        ({"host": "box"}, "host unknown"),
        ({"note": "see /var/run/x"}, "note holds a path"),
    ],
)
def test_wrong_paper_entries_are_refused(changes, message):
    with pytest.raises(RunError, match=rf"entries\[0\].*{message}"):
        ledger.check(made(paper(**changes)))


@pytest.mark.parametrize(
    ("entry", "message"),
    [({}, "empty"), ({"a": {"b": 1}}, "nested"), ({"a": [[1]]}, "nested"), ({"a": math.inf}, "finite")],
)
def test_wrong_measurements_are_refused(entry, message):
    with pytest.raises(RunError, match=message):
        ledger.check(made({"kind": "measurement", **entry}))


def test_one_row_twice_is_refused():
    with pytest.raises(RunError, match="is there twice"):
        ledger.check(made(paper(), paper(seeds=[1])))
    ledger.check(made(paper(), paper(scale=0.5), paper(variant="nesterov"), paper(recipe="f"), paper(metric="error")))


def test_flat():
    row = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "f": [{"g": 1}, {"g": 2}], "h": (1, 2), "i": [[1], [2]]}
    assert ledger.flat(row) == {
        "a": 1,
        "b.c": [1, 2],
        "b.d.e": None,
        "f.0.g": 1,
        "f.1.g": 2,
        "h": [1, 2],
        "i.0": [1],
        "i.1": [2],
    }


def test_command_of_a_document_makes_the_seeds_that_it_holds(tmp_path):
    """`--seeds 2` is seeds 0 and 1; a document of other versions may hold the second alone."""
    put(tmp_path, paper(seeds=[1]))
    assert ledger.read(tmp_path)[0]["command"] == "residrop reproduce swapout/table-2 --seeds 2"


def test_record_names_merges_and_reads(tmp_path):
    path = put(tmp_path / "results", paper())
    assert path.name == "swapout_table-2_cpu_scale1.json"
    again = put(tmp_path / "results", paper(seeds=[2, 1], measured=[9.0, 8.0], wall_seconds=[1.0, 2.0], note="new"))
    assert again == path
    (entry,) = ledger.read(tmp_path / "results")
    assert (entry["seeds"], entry["measured"], entry["wall_seconds"]) == ([0, 1, 2], [7.0, 8.0, 9.0], [100.0, 2.0, 1.0])
    assert entry["command"] == "residrop reproduce swapout/table-2 --seeds 3"
    assert (entry["device"], entry["versions"], entry["file"]) == ("cpu (x86)", VERSIONS, path.name)
    put(tmp_path / "results", paper(measured=[6.0]))
    assert ledger.read(tmp_path / "results")[0]["measured"] == [6.0, 8.0, 9.0]
    # no temporary file is left
    assert {file.name for file in (tmp_path / "results").iterdir()} == {path.name, ".lock"}


def test_what_must_not_be_mixed_is_apart(tmp_path):
    names = {
        put(tmp_path, paper()).name,
        put(tmp_path, paper(scale=0.05, epochs=13)).name,
        put(tmp_path, paper(variant="nesterov")).name,
        put(tmp_path, paper(), device="cuda (H200)").name,
        put(tmp_path, paper(), device="cpu (arm)").name,
        put(tmp_path, paper(), versions={"torch": "2.10", "threads": "2"}).name,
    }
    assert names == {
        "swapout_table-2_cpu_scale1.json",
        "swapout_table-2_cpu_scale0.05.json",
        "swapout_table-2_nesterov_cpu_scale1.json",
        "swapout_table-2_cuda_scale1.json",
        "swapout_table-2_cpu_scale1_2.json",
        "swapout_table-2_cpu_scale1_3.json",
    }
    put(tmp_path, paper(recipe="another"))
    assert put(tmp_path, paper(), versions={"torch": "2.9", "threads": "1"}).name == "swapout_table-2_cpu_scale1.json"
    entries = ledger.read(tmp_path)
    assert len(entries) == 7
    assert all(entry["seeds"] == [0] for entry in entries)


def test_standard_errors_are_merged_where_all_have_them(tmp_path):
    put(tmp_path, paper(standard_errors=[0.1]))
    put(tmp_path, paper(seeds=[1], standard_errors=[0.2]))
    assert ledger.read(tmp_path)[0]["standard_errors"] == [0.1, 0.2]
    put(tmp_path, paper(seeds=[2]))
    assert "standard_errors" not in ledger.read(tmp_path)[0]


def test_curves_are_replaced(tmp_path):
    curve = {"kind": "measurement", "figure": "swapout/figure-2-left", "curve": "a", "y": [1.0], "scale": 1.0,
             "variant": None, "recipe": "f"}  # fmt: skip
    put(tmp_path, curve, {**curve, "curve": "b"})
    put(tmp_path, {**curve, "y": [2.0]})
    assert {entry["curve"]: entry["y"] for entry in ledger.read(tmp_path)} == {"a": [2.0], "b": [1.0]}


def test_a_curve_is_not_replaced_by_less_of_it(tmp_path):
    curve = {"kind": "measurement", "figure": "swapout/figure-2-left", "curve": "a", "x": [1.0, 2.0], "y": [3.0, 4.0],
             "seeds": [0, 1], "scale": 1.0, "variant": None, "recipe": "f"}  # fmt: skip
    put(tmp_path, curve)
    put(tmp_path, {**curve, "y": [5.0, 6.0], "seeds": [0]})
    put(tmp_path, {**curve, "x": [1.0], "y": [7.0]})
    put(tmp_path, {**curve, "y": [7.0, None]})
    assert ledger.read(tmp_path)[0]["y"] == [3.0, 4.0]
    put(tmp_path, {**curve, "y": [8.0, 9.0]})
    assert ledger.read(tmp_path)[0]["y"] == [8.0, 9.0]


def test_times_of_other_threads_are_apart(tmp_path):
    one_thread = {"torch": "2.9", "threads": "1"}
    timed = paper(recipe=None, epochs=None, metric="milliseconds")
    assert put(tmp_path, timed).name != put(tmp_path, timed, versions=one_thread).name
    assert put(tmp_path, {**timed, "seeds": [1]}, versions=one_thread).name.endswith("_2.json")
    (entry,) = ledger.pooled(ledger.read(tmp_path))
    assert (entry["seeds"], entry["versions"]) == ([0, 1], one_thread)  # the newest, not both


# Several documents


def test_seeds_of_several_versions_are_one_entry(tmp_path):
    put(tmp_path, paper(seeds=[0, 1], measured=[7.0, 8.0], wall_seconds=[1.0, 1.0]))
    put(tmp_path, paper(seeds=[1, 2], measured=[9.0, 10.0], wall_seconds=[1.0, 1.0]), versions={"torch": "2.10"})
    put(tmp_path, paper(measured=[1.0]), device="cuda (H200)")
    put(tmp_path, paper(measured=[2.0], scale=0.5, epochs=128))
    found = ledger.pooled(ledger.read(tmp_path))
    assert [(entry["device"], entry["scale"], entry["seeds"], entry["measured"]) for entry in found] == [
        ("cpu (x86)", 0.5, [0], [2.0]),
        ("cpu (x86)", 1.0, [0, 1, 2], [7.0, 9.0, 10.0]),
        ("cuda (H200)", 1.0, [0], [1.0]),
    ]
    assert found[1]["file"] == "swapout_table-2_cpu_scale1_2.json"


def test_of_curves_the_newest_counts_and_measurements_stay(tmp_path):
    curve = {"kind": "measurement", "figure": "f", "curve": "a", "x": [1.0], "y": [1.0], "scale": 1.0, "variant": None,
             "recipe": "r", "device": "cpu", "date": "2026-11-21"}  # fmt: skip
    other = {"kind": "measurement", "value": 1, "device": "cpu", "date": "2026-11-21"}
    newer = {**curve, "y": [2.0], "date": "2026-11-22"}
    assert ledger.pooled([newer, other, other, curve]) == [newer, other, other]
    longer = {**curve, "x": [1.0, 2.0], "y": [3.0, 4.0]}
    assert ledger.pooled([longer, newer]) == [longer]


RECORDING = """
import sys
from pathlib import Path
from residrop.research import ledger
folder, mine = Path(sys.argv[1]), int(sys.argv[2])
(folder / f"ready-{mine}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    pass
for seed in range(40):
    number = 100 * mine + seed
    entry = {"kind": "paper", "id": f"swapout/table-2/row-{number}", "metric": "error", "published": None, "epochs": 1,
             "measured": [1.0], "seeds": [0], "scale": 1.0, "recipe": "r", "variant": None, "wall_seconds": [1.0],
             "note": ""}
    ledger.record(folder, "swapout/table-2", [entry], what="w", command="c", device="cpu", found={})
"""


@pytest.mark.slow
def test_processes_wait_for_one_another(tmp_path):
    command = [sys.executable, "-c", RECORDING, str(tmp_path)]
    running = [subprocess.Popen([*command, str(number)]) for number in range(2)]
    assert [one.wait(timeout=120) for one in running] == [0, 0]
    assert len(ledger.read(tmp_path)) == 80


def test_nothing_is_written_that_is_no_entry(tmp_path):
    path = put(tmp_path, paper())
    before = path.read_text()
    with pytest.raises(RunError, match="finite"):
        put(tmp_path, paper(measured=[math.inf]))
    assert path.read_text() == before


def test_damaged_files_are_named(tmp_path):
    assert ledger.read(tmp_path / "missing") == []
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RunError, match=r"x.json cannot be read .* measure again"):
        ledger.read(tmp_path)
    broken = copy.deepcopy(made())
    broken["entries"][0]["scale"] = 2
    (tmp_path / "x.json").write_text(json.dumps(broken))
    with pytest.raises(RunError, match=r"x.json: entries\[0\]: scale is 2"):
        ledger.read(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written .* choose another --ledger"):
        put(tmp_path / "file", paper())
