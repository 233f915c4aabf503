"""Shards of one run, on one shared folder: splitting, refusing, going on, merging."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from processes import Process, wait_until
from results import tree
from small_model import save_picture, small_model

from segcli.cli import main
from segcli.errors import UsageError
from segcli.inference.shards import Shard, parse_shard


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def segcli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def predict(*arguments: object, out: str = "masks") -> int:
    return segcli("predict", "in", "-o", out, "-m", small_model(), "--workers", 0, "-q", *arguments)


def merge(*arguments: object, out: str = "masks") -> int:
    return segcli("runs", "merge", out, *arguments)


def pictures(count: int = 8) -> None:
    for number in range(count):
        save_picture(Path(f"in/{'deep/' * (number % 2)}{number}.png"), 24, 32, number)


def lines(path: str = "masks/_run/manifest.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def told(entry: dict[str, Any]) -> dict[str, Any]:
    """What two runs over the same input say alike: all but durations, and times of files."""
    files = {kind: (content["size"], content["sha256"]) for kind, content in entry["files"].items()}
    return {**entry, "milliseconds": 0, "files": files}


# ---- which input is in which shard ----


def test_every_name_is_in_one_shard_and_shards_are_even() -> None:
    names = [f"folder {number % 7}/image-{number:05}.png" for number in range(16_000)]
    counts = Counter(next(i for i in range(1, 17) if Shard(i, 16).holds(name)) for name in names)
    assert all(sum(Shard(i, 16).holds(name) for i in range(1, 17)) == 1 for name in names[:50])
    assert sorted(counts) == list(range(1, 17))
    # 1000 expected in each, with a standard deviation of 31
    assert max(counts.values()) < 1130
    assert min(counts.values()) > 870


def test_the_split_is_the_same_on_every_machine_and_for_ever() -> None:
    # blake2b("a.png", 8 bytes) = e203797de73bf656, modulo 4 = 2, so the third. A change must not go unseen.
    assert [next(i for i in range(1, 5) if Shard(i, 4).holds(f"{c}.png")) for c in "abcdefgh"] == [
        3,
        2,
        4,
        1,
        3,
        3,
        1,
        3,
    ]


def test_names_that_a_file_system_takes_for_one_are_in_one_shard() -> None:
    for one, other in (("a/B.png", "A/b.png"), ("\u00e9.png", "e\u0301.png")):
        assert [Shard(i, 64).holds(one) for i in range(1, 65)] == [
            Shard(i, 64).holds(other) for i in range(1, 65)
        ]
    assert any(Shard(i, 3).holds("\udcff.png") for i in range(1, 4))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "/4", "a/b", "-1/4", "1/4/5", "1 / 4", "²/4"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UsageError, match=r"--shard .*give I/N, such as 1/16 to 16/16; the first is 1"):
        parse_shard(text)


# ---- running, merging, going on ----


def test_shards_at_the_same_time_make_what_one_run_makes(tmp_path: Path) -> None:
    pictures(5)
    Path("in/bad.jpg").write_text("hello")
    assert predict(out="whole") == 1
    arguments = ["predict", "in", "-o", "masks", "-m", small_model(), "--workers", 0, "--shard"]
    processes = [Process(*arguments, f"{i}/3", folder=tmp_path) for i in (1, 2, 3)]
    codes = [process.wait() for process in processes]
    assert sorted(codes) == [0, 0, 1], [process.errors for process in processes]
    assert "Once all are done: segcli runs merge masks" in processes[0].errors
    assert not Path("masks/_run/manifest.jsonl").exists()
    assert merge() == 0
    assert tree("masks") == tree("whole")
    merged, whole = lines(), lines("whole/_run/manifest.jsonl")
    key = "source"
    assert sorted(map(told, merged), key=lambda e: e[key]) == sorted(map(told, whole), key=lambda e: e[key])
    assert sorted(path.name for path in Path("masks/_run").iterdir()) == [
        "lock",
        "manifest.jsonl",
        "run.json",
    ]
    run = json.loads(Path("masks/_run/run.json").read_text())
    assert (run["state"], run["shards"]) == ("finished", 3)
    assert (run["done"], run["skipped"], run["failed"]) == (5, 0, 1)
    # the plain command, and another split, go on from there
    assert predict() == 1
    assert sorted(line["status"] for line in lines()) == ["failed"] + 5 * ["skipped"]
    for i in (1, 2):
        predict("--shard", f"{i}/2")
        record = lines(f"masks/_run/shards-of-2/{i}/manifest.jsonl")
        assert {line["status"] for line in record} <= {"skipped", "failed"}
    assert merge() == 0
    assert len(lines()) == 6


def test_a_shard_that_is_killed_and_run_again(tmp_path: Path) -> None:
    pictures(300)
    predict(out="whole")
    command = ["predict", "in", "-o", "masks", "-m", small_model(), "--workers", 0, "-q", "--shard"]
    process = Process(*command, "2/2", folder=tmp_path)
    record = Path("masks/_run/shards-of-2/2/manifest.jsonl")
    wait_until(lambda: record.exists() and record.read_bytes().count(b"\n") > 40)
    process.kill_group()
    assert process.wait() == -signal.SIGKILL
    predict("--shard", "1/2")
    Path("masks/.segcli-abcd").write_bytes(b"half")  # what a kill in another moment leaves
    before = len(lines(str(record)))
    share = sum(Shard(2, 2).holds(f"{'deep/' * (n % 2)}{n}.png") for n in range(300))
    assert before < share, "it was faster than the signal"
    assert merge() == 1
    assert predict("--shard", "2/2") == 0
    statuses = Counter(line["status"] for line in lines(str(record)))
    assert statuses == {"skipped": before, "done": share - before}
    assert merge() == 0
    assert tree("masks") == tree("whole")
    assert Counter(line["status"] for line in lines()) == {"skipped": before, "done": 300 - before}
    assert {line["source"] for line in lines()} == {str(p.absolute()) for p in Path("in").rglob("*.png")}


def test_a_merge_says_what_is_missing_or_not_finished(capsys: pytest.CaptureFixture[str]) -> None:
    pictures()
    predict("--shard", "1/4")
    predict("--shard", "3/4")
    run = Path("masks/_run/shards-of-4/3/run.json")
    run.write_text(run.read_text().replace('"finished"', '"interrupted"'))
    capsys.readouterr()
    assert merge() == 1
    assert capsys.readouterr().err.splitlines() == [
        "shard 2/4 is missing: it was never started",
        "shard 3/4 is not finished (interrupted): run it again",
        "shard 4/4 is missing: it was never started",
        "Nothing was changed in masks. With --force what there is would be joined.",
    ]
    assert not Path("masks/_run/manifest.jsonl").exists()
    assert merge("--force") == 1
    done = len(lines())
    assert 0 < done < 8
    assert predict() == 0
    assert Counter(line["status"] for line in lines()) == {"skipped": done, "done": 8 - done}


def test_a_merge_finds_what_two_shards_have(capsys: pytest.CaptureFixture[str]) -> None:
    # "d.jpg" alone becomes d.png, and d.jpg.png when d.png has come: in another shard, as it happens.
    first = next(i for i in (1, 2, 3) if Shard(i, 3).holds("d.png"))
    second = next(i for i in (1, 2, 3) if Shard(i, 3).holds("d.jpg.png"))
    assert first != second
    save_picture(Path("in/d.jpg"), 24, 32)
    assert predict("--shard", f"{first}/3") == 0
    save_picture(Path("in/d.png"), 24, 32, 1)
    for i in {1, 2, 3} - {first}:
        assert predict("--shard", f"{i}/3") == 0
    capsys.readouterr()
    assert merge() == 1
    both = " and ".join(f"{i}/3" for i in sorted((first, second)))
    assert (
        capsys.readouterr().err.splitlines()[0]
        == f"{Path('in/d.jpg').absolute()} is the input of shards {both}"
    )


def test_shards_of_other_settings_are_refused_and_found(capsys: pytest.CaptureFixture[str]) -> None:
    pictures()
    predict("--shard", "1/2")
    capsys.readouterr()
    assert predict("--shard", "2/2", "--size", 32) == 2
    assert "holds results of other settings: size unset, now 32." in capsys.readouterr().err
    assert predict("--shard", "2/2", "--size", 32, "--overwrite") == 0
    capsys.readouterr()
    assert merge() == 1
    finding = "shard 2/2 was made with other settings than shard 1/2: size unset, now 32"
    assert capsys.readouterr().err.splitlines()[0] == finding
    assert predict("--shard", "1/2", "--size", 32, "--overwrite") == 0
    assert merge() == 0
    predict("--size", 32, out="whole")
    assert tree("masks") == tree("whole")


def test_a_shard_and_the_whole_never_write_at_the_same_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures()
    code = (
        "import sys; from pathlib import Path; from segcli.inference.manifest import open_manifest\n"
        "from segcli.inference.shards import parse_shard; from segcli.inference.storage import Folder\n"
        "shard = parse_shard(sys.argv[1]) if sys.argv[1] else None\n"
        "with open_manifest(Folder(Path('masks'), shard.record if shard else '_run'), shard):\n"
        "    print('open', flush=True); sys.stdin.read()"
    )

    def holding(shard: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, shard], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        return process

    with holding("2/3") as holder:
        for command in (["--shard", "2/3"], []):
            assert predict(*command) == 2
        assert merge() == 2
        assert capsys.readouterr().err.count(" is in use by process ") == 2  # the plain one is told to merge
        assert predict("--shard", "1/3") == 0
        holder.kill()
    Path("masks/_run/shards-of-3").rename("elsewhere")
    with holding("") as holder:
        capsys.readouterr()
        assert predict("--shard", "1/3") == 2
        assert f"is in use by process {holder.pid} on" in capsys.readouterr().err
        holder.kill()


def test_another_split_and_the_whole_wait_for_the_merge(capsys: pytest.CaptureFixture[str]) -> None:
    pictures(4)
    predict("--shard", "1/2")
    capsys.readouterr()
    assert predict() == 2
    assert capsys.readouterr().err.splitlines() == [
        "Error: masks holds the work of 2 shards that are not merged yet.",
        "First run: segcli runs merge masks",
    ]
    assert predict("--shard", "1/3") == 2
    assert (
        capsys.readouterr().err.splitlines()[1] == "Go on with --shard I/2, or run: segcli runs merge masks"
    )
    assert predict("--shard", "2/2") == 0


def test_more_shards_than_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    pictures(2)
    for i in range(1, 6):
        assert predict("--shard", f"{i}/5") == 0
    assert merge() == 0
    assert len(lines()) == 2
    assert merge() == 2
    assert "holds no shards that are not merged" in capsys.readouterr().err


def test_runs_show(capsys: pytest.CaptureFixture[str]) -> None:
    pictures(6)
    assert segcli("runs", "show", "masks") == 2
    predict("--shard", "1/2")
    capsys.readouterr()
    assert segcli("runs", "show", "masks", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    mine = sum(Shard(1, 2).holds(f"{'deep/' * (n % 2)}{n}.png") for n in range(6))
    assert document["state"] == "in shards"
    assert document["shards"] == [
        {"shard": "1/2", "state": "finished", "done": mine, "skipped": 0, "failed": 0},
        {"shard": "2/2", "state": "", "done": 0, "skipped": 0, "failed": 0},
    ]
    assert segcli("runs", "show", "masks") == 0
    shown = capsys.readouterr().out.split()
    assert ["shard", "1/2", "finished", str(mine), "0", "0"] == shown[shown.index("shard") :][:6]


# ---- listing ----


def test_list_only_prints_what_a_shard_would_do(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    pictures(10)
    assert predict("--list-only") == 0
    everything = capfdbinary.readouterr().out.splitlines()
    assert sorted(everything) == sorted(str(p).encode() for p in Path("in").rglob("*.png"))
    assert not Path("masks").exists()
    parts = []
    for i in (1, 2, 3):
        assert segcli("predict", "in", "--list-only", "--shard", f"{i}/3") == 0
        said = capfdbinary.readouterr()
        parts.append(said.out.splitlines())
        assert said.err.decode() == f"10 images, {len(parts[-1])} of them in shard {i}/3.\n"
    assert sorted(itertools.chain(*parts)) == sorted(everything)
    predict("--shard", "2/3")
    assert sorted(line["source"] for line in lines("masks/_run/shards-of-3/2/manifest.jsonl")) == sorted(
        str(Path(name.decode()).absolute()) for name in parts[1]
    )


def test_a_list_of_made_up_names_is_listed_in_flat_memory(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def listed(count: int) -> tuple[dict[str, Any], int]:
        with Path("names").open("w") as file:
            file.writelines(f"/made/up/{number // 1000}/{number}.jpg\n" for number in range(count))
        code = (
            "import resource, sys\nfrom segcli.cli import main\n"
            "try: main(['predict', '--list', 'names', '--list-only', '--shard', '7/16', '--json'])\n"
            "except SystemExit as exit: print(exit.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        text, _, last = process.stdout.rstrip().rpartition("\n")
        assert last.split()[0] == "1"  # none of them exists, and that is said
        return json.loads(text), int(last.split()[1])

    small, few = listed(2_000)
    large, many = listed(60_000)
    assert (large["inputs"], large["listed"]) == (60_000, large["unreadable"])
    assert small["inputs"] == 2_000
    assert 3_000 < large["listed"] < 4_500  # a sixteenth is 3750
    assert large["problems"][0]["reason"] == "no such file"
    assert many - few < 12 << 10  # KiB
