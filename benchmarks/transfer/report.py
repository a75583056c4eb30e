"""Tables and the plot of the links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.tables import markdown_table
from benchmarks.transfer.links import Samples

Ratio = tuple[str, str, str]
"""Column, contender, contender it is divided by."""
MEMORY_RATIOS: Final[Sequence[Ratio]] = (
    ("shm / raw nixl", "shm", "raw nixl"),
    ("shm / memcpy", "shm", "memcpy"),
    ("nixl / raw nixl", "nixl", "raw nixl"),
)
TCP_RATIOS: Final[Sequence[Ratio]] = (
    ("nixl / raw nixl", "nixl", "raw nixl"),
    ("nixl / mooncake", "nixl", "mooncake tcp"),
)
_COLORS: Final[Mapping[str, str]] = {
    "memcpy": "0.6",
    "shm": "#1f77b4",
    "nixl": "#2ca02c",
    "raw nixl": "#ff7f0e",
    "mooncake tcp": "#d62728",
}


def size(nbytes: int) -> str:
    """64 KiB, 1 MiB."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def link_table(samples: Samples, sizes: Sequence[int], ratios: Sequence[Ratio]) -> str:
    """GB/s by contender and size, and the ratios that matter among those who took part."""
    names = samples.names()
    wanted = [(title, above, below) for title, above, below in ratios if {above, below} <= set(names)]
    rows = []
    for nbytes in sizes:
        rate = {name: samples.gigabytes_per_s(name, nbytes) for name in names}
        divided = [f"{rate[above] / rate[below]:.2f}" for _, above, below in wanted]
        rows.append([size(nbytes), *(f"{rate[name]:.2f}" for name in names), *divided])
    return markdown_table(["write", *names, *(title for title, _, _ in wanted)], rows)


def plot(panels: Mapping[str, Samples], sizes: Sequence[int], path: Path) -> None:
    """GB/s over the size of a write, one panel for each kind of link."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (title, samples) in zip(axes[0], panels.items(), strict=True):
        for name in samples.names():
            rates = [samples.gigabytes_per_s(name, nbytes) for nbytes in sizes]
            axis.plot(sizes, rates, marker="o", color=_COLORS.get(name, "k"), label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [size(nbytes) for nbytes in sizes])
        axis.set(title=title, xlabel="one write", ylabel="GB/s")
        axis.grid(visible=True, which="both", alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
