from __future__ import annotations

import pytest

from prismserve.cluster.settings import Settings
from prismserve.cluster.share import worker_share
from prismserve.core.cores import share_of


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("cores", [2, 7, 16])
def test_all_workers_of_one_machine_fit_on_it_and_share_its_cores(workers, cores):
    share = worker_share(Settings(decode_replicas=workers - 1), float(cores), 0.0)
    assert share.threads is None
    assert share.on_node({"CPU": float(cores)}) == workers
    assert workers * share_of(cores, share.on_node({"CPU": float(cores)})) <= max(cores, workers)


def test_on_several_machines_a_worker_shares_with_those_that_fit_beside_it():
    share = worker_share(Settings(prefill_replicas=2, decode_replicas=2), 32.0, 0.0)
    assert share.on_node({"CPU": 16.0}) == 2
    assert share.on_node({"CPU": 32.0}) == 4
    assert share.on_node({}) == 1


def test_gpus_bound_how_many_workers_fit():
    share = worker_share(Settings(prefill_replicas=4, decode_replicas=4, num_gpus_per_worker=1), 128.0, 8.0)
    assert share.on_node({"CPU": 64.0, "GPU": 2.0}) == 2


@pytest.mark.parametrize(
    ("given", "threads"),
    [({"threads_per_worker": 6}, 6), ({"cpus_per_worker": 3.5}, 3), ({"cpus_per_worker": 0.5}, 1),
     ({"threads_per_worker": 2, "cpus_per_worker": 4}, 2)],
)  # fmt: skip
def test_what_is_set_goes_before_what_is_found(given, threads):
    assert worker_share(Settings(**given), 8.0, 0.0).threads == threads
