from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import pytest
import torch

from prismserve.core.cores import quota_cores, share_of, visible_cores

REPORT = """
import sys, torch
from prismserve.core.cores import share_of, visible_cores
torch.set_num_threads(share_of(visible_cores(), int(sys.argv[1])))
print(torch.get_num_threads(), flush=True)
"""


@pytest.fixture
def hierarchy(tmp_path):
    """Control groups of both versions, and the file that says which of them a process is in."""

    def make(membership, **files):
        for name, text in files.items():
            path = tmp_path / "groups" / name.replace("__", "/").replace("_max", ".max")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "membership").write_text(membership)
        return tmp_path / "membership", tmp_path / "groups"

    return make


def test_the_least_quota_of_a_group_and_those_around_it_counts(hierarchy):
    inner = {"pod__cpu_max": "300000 100000\n", "pod__box__cpu_max": "max 100000\n"}
    assert quota_cores(*hierarchy("0::/pod/box\n", **inner)) == 3.0
    assert quota_cores(*hierarchy("0::/pod/box\n", **inner | {"pod__box__cpu_max": "150000 100000"})) == 1.5


def test_a_group_without_quota_or_no_groups_at_all_limit_nothing(hierarchy, tmp_path):
    assert quota_cores(*hierarchy("0::/a\n", a__cpu_max="max 100000\n")) == math.inf
    assert quota_cores(*hierarchy("0::/elsewhere\n")) == math.inf
    assert quota_cores(tmp_path / "nothing", tmp_path) == math.inf


@pytest.mark.parametrize(("quota", "cores"), [("250000", 2.5), ("-1", math.inf)])
def test_version_1_keeps_quota_and_period_in_files_of_their_own(tmp_path, quota, cores):
    folder = tmp_path / "groups" / "cpu,cpuacct" / "docker" / "1"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "membership").write_text("4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n")
    assert quota_cores(tmp_path / "membership", tmp_path / "groups") == cores


def test_a_pinned_process_sees_the_cores_it_is_pinned_to():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert visible_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= visible_cores() <= len(allowed)


@pytest.mark.parametrize(("cores", "workers", "share"), [(8, 2, 4), (7, 2, 3), (2, 2, 1), (2, 3, 1), (64, 1, 64)])
def test_shares_take_no_more_than_there_is_but_one_each(cores, workers, share):
    assert share_of(cores, workers) == share
    assert share * workers <= max(cores, workers)


def test_two_processes_on_this_machine_take_no_more_threads_than_it_has_cores():
    command = [sys.executable, "-c", REPORT, "2"]
    # Whatever the environment says: a worker's own number is in force.
    environment = {**os.environ, "OMP_NUM_THREADS": "64"}
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    threads = [int(process.communicate(timeout=120)[0]) for process in pair]
    assert sum(threads) <= max(2, visible_cores())


def test_a_number_that_was_set_is_in_force_in_threads_that_begin_later():
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join(10)
    finally:
        torch.set_num_threads(before)
    assert seen == [3]
