"""What sharing caches between workers saves: time to the first token on a hit, and the rate of hits.

    python -m benchmarks.reuse [--workers 1,2,4] [--pictures N] [--questions N] [--chats N] [--out FOLDER]

Workers are processes of their own on loopback, each prefilling and decoding, behind one router in this process. As many
clients as workers ask at the same time: questions about shared pictures in a shuffled order, then chats of several turns.
Every request that found at least half of its prompt cached is asked again at once, while nothing else runs, under a salt of
its own, which nothing was ever cached under: that is its cold time. Beside the rate of hits stands that of one infinite cache shared by all
without delay, computed from the keys and times of the same run. Writes ``reuse.md`` and ``reuse.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.reuse.simulation import Observed, hit_rates
from benchmarks.reuse.turns import Turns
from benchmarks.reuse.workloads import Script, chats, shared_images
from benchmarks.tables import markdown_table
from benchmarks.workers import SmallCluster
from prismserve.core.types import Role
from prismserve.router.config import RouterConfig
from prismserve.router.media import MediaReader
from prismserve.router.requests import RequestBuilder

RESULTS: Final = Path(__file__).resolve().parents[1] / "results"
HIT_SHARE: Final = 0.5
_WARM_PICTURES: Final = 2


@dataclass(frozen=True, slots=True)
class Row:
    """Results of one workload on one cluster.

    Attributes:
        workers: processes.
        workload: its name.
        requests: asked, without the cold ones.
        hits: of them, those that found at least half of their prompt.
        pulled: how many were placed with blocks or embeddings pulled from another worker.
        hit_ms: median time to the first token of hits.
        cold_ms: of the same requests with nothing cached.
        ratio: median of hit over cold, request by request.
        hit_rate: share of prompt tokens that were cached.
        infinite_rate: the same in the infinite cache.
    """

    workers: int
    workload: str
    requests: int
    hits: int
    pulled: int
    hit_ms: float
    cold_ms: float
    ratio: float
    hit_rate: float
    infinite_rate: float


class Run:
    """One workload on one cluster.

    Args:
        cluster: with its router open.
        builder: makes of a call what the router makes of it, for the keys.
    """

    def __init__(self, cluster: SmallCluster, builder: RequestBuilder) -> None:
        self._cluster = cluster
        self._builder = builder
        self.observed: list[Observed] = []
        self.pairs: list[tuple[float, float]] = []
        self._salt = 0
        self._turns = Turns()

    async def client(self, scripts: Iterator[Script]) -> None:
        """Ask one script after the other until there are none left."""
        for script in scripts:
            answers: tuple[str, ...] = ()
            for number in range(len(script.questions)):
                answers = (*answers, await self._ask(script, number, answers))

    async def _ask(self, script: Script, number: int, answers: tuple[str, ...]) -> str:
        turn = script.turn(number, answers)
        prepared = await self._builder.build(turn.call())
        async with self._turns.together():
            answer = await self._cluster.ask(turn)
        usage = answer.usage
        self.observed.append(
            Observed(
                prepared.request,
                answer.token_ids,
                usage.cached_tokens,
                answer.started_s,
                answer.first_s,
                answer.ended_s,
            )
        )
        if usage.cached_tokens >= HIT_SHARE * usage.prompt_tokens:
            self._salt += 1
            salt = f"cold-{id(self)}-{self._salt}"
            async with self._turns.alone():
                cold = await self._cluster.ask(replace(turn, salt=salt, max_tokens=1))
            self.pairs.append((usage.ttft_ms, cold.usage.ttft_ms))
        return answer.text


async def measure(workers: int, loads: dict[str, list[Script]]) -> list[Row]:
    """All workloads on a fresh cluster of so many workers."""
    rows = []
    async with SmallCluster() as cluster:
        for _ in range(workers):
            await cluster.add_process(Role.MIXED)
        router = await cluster.open_router(workers)
        if cluster.facts is None:
            message = "the cluster's model is not known"
            raise RuntimeError(message)
        config = RouterConfig()
        builder = RequestBuilder(router.processor, cluster.facts, config, MediaReader(config), "off")
        await asyncio.gather(
            *(cluster.ask(replace(script.turn(0, ()), salt="warm")) for script in chats(_WARM_PICTURES * workers))
        )
        for name, scripts in loads.items():
            run, before = Run(cluster, builder), _pulled(cluster)
            queue = iter(scripts)
            await asyncio.gather(*(run.client(queue) for _ in range(workers)))
            hit_rate, infinite_rate = hit_rates(run.observed, cluster.facts.layout.block_tokens)
            rows.append(
                Row(
                    workers,
                    name,
                    len(run.observed),
                    len(run.pairs),
                    _pulled(cluster) - before,
                    statistics.median(hit for hit, _ in run.pairs),
                    statistics.median(cold for _, cold in run.pairs),
                    statistics.median(hit / cold for hit, cold in run.pairs),
                    hit_rate,
                    infinite_rate,
                )
            )
        builder.close()
    return rows


def _pulled(cluster: SmallCluster) -> int:
    """Placements so far with something pulled from another worker, by the router's own metric."""
    text = "" if cluster.router is None else cluster.router.metrics.render().decode()
    wanted = ('way="pull"', 'way="pull_image"')
    lines = (line for line in text.splitlines() if line.startswith("prismserve:route_ways_total"))
    return round(sum(float(line.rpartition(" ")[2]) for line in lines if any(name in line for name in wanted)))


def page(rows: Sequence[Row]) -> str:
    """The page of results."""
    header = [
        "workers",
        "workload",
        "requests",
        "hits",
        "pulled",
        "TTFT hit (p50)",
        "TTFT cold (p50)",
        "hit / cold",
        "hit rate",
        "infinite cache",
        "points behind",
    ]
    cells = [
        [
            str(row.workers),
            row.workload,
            str(row.requests),
            str(row.hits),
            str(row.pulled),
            f"{row.hit_ms:.1f} ms",
            f"{row.cold_ms:.1f} ms",
            f"{row.ratio:.2f}",
            f"{100 * row.hit_rate:.1f} %",
            f"{100 * row.infinite_rate:.1f} %",
            f"{100 * (row.infinite_rate - row.hit_rate):.1f}",
        ]
        for row in rows
    ]
    intro = (
        "The bundled model, one process a worker, as many clients as workers. A hit found at least half of its prompt "
        "cached; its cold time is that of the same request with nothing cached, asked right after it and alone. Targets: hit / cold "
        "at most 0.3, at most 2 points behind one infinite cache that all workers share."
    )
    end = (
        f"Load average of the {os.cpu_count()} cores when it ended: {os.getloadavg()[0]:.1f}. "
        "Written by `python -m benchmarks.reuse`."
    )
    tried = Path(__file__).with_name("tried.md").read_text(encoding="utf-8").strip()
    return "\n\n".join(["# Reuse across workers", intro, markdown_table(header, cells, left=2), tried, end]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse", description="What sharing caches saves.")
    parser.add_argument("--workers", default="1,2,4", help="sizes of the clusters")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--questions", type=int, default=5, help="about each picture, at most 6")
    parser.add_argument("--chats", type=int, default=12, help="of four turns each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    loads = {
        "shared pictures": shared_images(options.pictures, options.questions),
        "chats": chats(options.chats),
    }
    rows = [row for workers in options.workers.split(",") for row in asyncio.run(measure(int(workers), loads))]
    text = page(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "reuse.md").write_text(text)
    figures = {"rows": [asdict(row) for row in rows], "load_average": os.getloadavg()[0]}
    (options.out / "reuse.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
