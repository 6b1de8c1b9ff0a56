"""Tables on disk: complete, continued after a kill, never another one's, and small in memory."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from sublimate.training.shards import INDEX, Shards, table

ROW_BYTES = 4 * 6 + 8


def compute(row):
    return {"x": torch.full((2, 3), float(row)), "n": torch.tensor(row)}


def make(folder, rows=10, function=compute, key=None, shard_bytes=3 * ROW_BYTES):
    options = {"shard_bytes": shard_bytes, "progress": False}
    return table(folder, rows, lambda missing: map(function, missing), key or {"a": 1}, **options)


def assert_whole(found, rows=10):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    read = found.rows([*order, order[0]])
    assert read["n"].tolist() == [*order, order[0]]
    assert torch.equal(read["x"], torch.stack([compute(row)["x"] for row in [*order, order[0]]]))


def test_rows_come_back_in_any_order(tmp_path):
    found = make(tmp_path / "t")
    assert len(found) == 10 and [rows for _, rows in found.files] == [3, 3, 3, 1]
    assert_whole(found)
    assert_whole(Shards(tmp_path / "t"))


def test_a_finished_table_is_not_computed_again(tmp_path):
    make(tmp_path / "t")
    assert_whole(make(tmp_path / "t", function=None))
    # ... nor locked, so that it may lie where nobody can write.
    (tmp_path / "t" / ".lock").unlink()
    make(tmp_path / "t", function=None)
    assert not (tmp_path / "t" / ".lock").exists()


def test_what_was_read_can_be_changed(tmp_path):
    found = make(tmp_path / "t")
    found.rows([4])["x"].zero_()
    assert_whole(found)
    assert_whole(Shards(tmp_path / "t"))


@pytest.mark.parametrize("broken", range(10))
def test_a_run_that_failed_goes_on_with_the_shard_it_was_at(tmp_path, broken):
    def fails(row):
        if row == broken:
            raise RuntimeError("no power")
        return compute(row)

    with pytest.raises(RuntimeError):
        make(tmp_path / "t", function=fails)
    assert not (tmp_path / "t" / INDEX).exists()
    asked = []
    # A shard size of its own does not matter to what was begun.
    assert_whole(make(tmp_path / "t", function=lambda row: asked.append(row) or compute(row), shard_bytes=1))
    # The first row says how many a shard has.
    assert asked == [0] * (broken == 0) + list(range(broken // 3 * 3, 10))


def test_another_table_of_that_name_is_refused(tmp_path):
    make(tmp_path / "t")
    with pytest.raises(ValueError, match="holds something else: delete it"):
        make(tmp_path / "t", key={"a": 2})
    with pytest.raises(ValueError, match="holds something else"):
        make(tmp_path / "t", rows=9)


def test_damage_is_named(tmp_path):
    make(tmp_path / "t")
    shard = tmp_path / "t" / "00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="a file was cut off: delete it"):
        make(tmp_path / "t")
    shard.write_bytes(b"\xff" * len(content))
    with pytest.raises(ValueError, match=r"00001\.safetensors is damaged"):
        make(tmp_path / "t").rows([4])
    (tmp_path / "t" / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"The cache .* is damaged"):
        make(tmp_path / "t")


def test_shards_measure_what_was_asked_for(tmp_path):
    for size in (1, ROW_BYTES, 4 * ROW_BYTES, 10**6):
        make(tmp_path / str(size), shard_bytes=size)
        for file in (tmp_path / str(size)).glob("*.safetensors"):
            assert file.stat().st_size <= max(size, ROW_BYTES) + 400  # the header
        names = {path.name for path in (tmp_path / str(size)).iterdir()}
        assert all(name.endswith(".safetensors") or name in (INDEX, ".lock") for name in names)


PRELUDE = """
import sys, time
from pathlib import Path
import torch
from sublimate.training.shards import table
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
def compute(row):
    with log.open("a") as file:
        file.write(f"{row}\\n")
    time.sleep(0.02)
    return {"x": torch.full((2, 3), float(row)), "n": torch.tensor(row)}
"""


def started(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_share_the_work_and_when_one_is_killed_the_other_takes_over(tmp_path):
    code = PRELUDE + 'table(folder, 80, lambda rows: map(compute, rows), {"a": 1}, shard_bytes=96, progress=False)'
    logs = [tmp_path / "log0", tmp_path / "log1"]
    workers = [started(code, tmp_path / "t", log) for log in logs]
    while not all(log.exists() and len(log.read_text().split()) > 8 for log in logs):
        assert all(worker.poll() is None for worker in workers)
    os.kill(workers[0].pid, signal.SIGKILL)
    _, errors = workers[1].communicate(timeout=120)
    assert workers[1].returncode == 0, errors
    workers[0].communicate(timeout=120)
    assert_whole(make(tmp_path / "t", rows=80, function=None), rows=80)
    killed, other = ([int(row) for row in log.read_text().split()] for log in logs)
    # Twice computed are what the killed one had not written, and the row that said how many a shard has.
    assert {*killed} | {*other} == {*range(80)}
    twice = {*killed} & {*other} - {0}
    assert len(twice) <= 3 and not {*killed[:6]} & {*other} - {0}
    assert not list((tmp_path / "t").glob(".*.partial")) and not list((tmp_path / "t").glob(".0*"))


@pytest.mark.slow
def test_processes_that_share_the_work_leave_nothing_behind(tmp_path):
    code = PRELUDE + "table(folder, 40, lambda rows: map(compute, rows), {}, shard_bytes=96, progress=False)"
    workers = [started(code, tmp_path / "t", tmp_path / f"log{i}") for i in range(3)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    hidden = {path.name for path in (tmp_path / "t").iterdir() if not path.name.endswith(".safetensors")}
    assert hidden <= {INDEX, ".lock"}


def test_each_of_several_processes_finds_some_shards(tmp_path):
    found = table(
        tmp_path / "t", 30, lambda rows: map(compute, rows), {}, shard_bytes=10**6, processes=3, progress=False
    )
    assert [rows for _, rows in found.files] == [3] * 10
    assert_whole(found, rows=30)


def test_rows_that_do_not_come_are_missed(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        table(tmp_path / "t", 9, lambda rows: map(compute, rows[:1]), {}, shard_bytes=96, progress=False)
    assert not [*(tmp_path / "t").glob("*.safetensors")]


def test_a_shard_of_another_size_is_refused_before_the_others_are_computed(tmp_path):
    make(tmp_path / "t")
    (tmp_path / "t" / INDEX).unlink()
    (tmp_path / "t" / "00003.safetensors").unlink()
    asked = []
    with pytest.raises(ValueError, match="holds 3 rows instead of 5: delete its folder"):
        make(tmp_path / "t", function=lambda row: asked.append(row) or compute(row), shard_bytes=5 * ROW_BYTES)
    assert asked == [0]


MEMORY = """
import sys, re
from pathlib import Path
import torch
from sublimate.training.shards import table
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
rows, size, peak = 60, 2**20, 0
def compute(row):
    global peak
    peak = max(peak, anonymous())
    return {"x": torch.full((size // 4,), float(row))}
compute(0)
torch.zeros(2**22).clone()
start = anonymous()
found = table(Path(sys.argv[1]), rows, lambda missing: map(compute, missing), {}, shard_bytes=8 * size, progress=False)
written = peak - start
for row in range(rows):
    found.rows([row])
    peak = max(peak, anonymous())
print(written / (8 * size), (anonymous() - start) / (8 * size))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded_by_the_shard(tmp_path):
    # Freed memory goes back to the system at once, so that what is held can be measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, tmp_path / "t"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written, kept = map(float, done.stdout.split())
    # 60 MB went through shards of 8 MB: one is in memory while it is written, and the copy that safetensors makes.
    assert written < 2.5 and kept < 0.5, done.stdout
