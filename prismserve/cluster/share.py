"""What each worker gets of the machines: what it asks Ray for, and how many threads it computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prismserve.cluster.settings import Settings

# Shares are rounded before they are asked for, so the last of them may be a hair too large to be counted.
_ROUNDING: Final = 1e-6


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """One worker's share.

    Attributes:
        cpus: what it asks Ray for.
        gpus: as ``cpus``.
        workers: of the cluster.
        threads: what it computes with; None leaves that to the node, see :meth:`on_node`.
    """

    cpus: float
    gpus: float
    workers: int
    threads: int | None

    @property
    def device(self) -> str:
        """The torch device of the worker."""
        return "cuda" if self.gpus else "cpu"

    def options(self) -> dict[str, Any]:
        """Serve deployment options: plain actor resources, or a placement group when one worker spans GPUs."""
        if self.gpus > 1:
            return {
                "ray_actor_options": {"num_cpus": self.cpus},
                "placement_group_bundles": [{"CPU": self.cpus, "GPU": self.gpus}],
                "placement_group_strategy": "STRICT_PACK",
            }
        return {"ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus}}

    def on_node(self, resources: Mapping[str, float]) -> int:
        """Most workers that Ray can put on a node of these resources; at least 1."""
        asked = {"CPU": self.cpus, "GPU": self.gpus}
        fitting = [int(resources.get(name, 0.0) / share + _ROUNDING) for name, share in asked.items() if share]
        return max(1, min(self.workers, *fitting))


def worker_share(settings: Settings, cpus: float, gpus: float) -> WorkerShare:
    """Divide the cluster among the workers.

    Threads are those of ``threads_per_worker``; unset, the whole cores of ``cpus_per_worker``; unset too, the cores a
    worker finds divided by the workers that fit on its node.
    """
    per_worker = settings.cpus_per_worker or max(0.01, round(cpus * 0.9 / settings.workers, 2))
    wanted_gpus = settings.num_gpus_per_worker
    if wanted_gpus is None:
        wanted_gpus = 1.0 if gpus >= settings.workers else (gpus / settings.workers if gpus else 0.0)
    threads = settings.threads_per_worker
    if threads is None and settings.cpus_per_worker is not None:
        threads = max(1, int(settings.cpus_per_worker))
    return WorkerShare(per_worker, wanted_gpus, settings.workers, threads)
