"""The reference page of all settings, ``docs/configuration.md``, generated from the settings themselves."""

from __future__ import annotations

import re
from typing import Final

from prismserve.cluster.settings import Leaf, Settings, as_text, leaves, metavar

_UNITS: Final = {
    "_s": "seconds",
    "_ms": "milliseconds",
    "_bytes": "bytes",
    "_tokens": "tokens",
    "_px": "pixels",
    "_pixels": "pixels",
    "_chars": "characters",
    "_share": "share",
    "port": "port number",
}


def unit_of(leaf: Leaf) -> str:
    """The unit of a number: what its meaning ends with in parentheses, else what its name ends with, else a count."""
    kind = metavar(leaf.info.annotation)
    if kind not in ("INT", "FLOAT"):
        return ""
    stated = re.search(r"\((\w[\w ]*)\)\.?$", leaf.meaning)
    if stated:
        return stated[1]
    ending = re.sub(r"_(max|min)$", "", leaf.path[-1])
    named = next((unit for suffix, unit in _UNITS.items() if ending.endswith(suffix)), None)
    return named or ("count" if kind == "INT" else "ratio")


def configuration_page() -> str:
    """The reference page of all settings, as Markdown (``docs/configuration.md``)."""
    lines = [
        "# Configuration",
        "",
        "This page is generated from the settings themselves by `python -m prismserve.cluster.configuration_page`.",
        "",
        "A value comes from the first of these that gives one: command-line flag of `prismserve serve`, environment",
        "variable, file given by `--config FILE` (or `PRISMSERVE_CONFIG`), default. The file is YAML with the tree",
        "that the dotted names show. Byte counts may be written as text with a unit, such as `512MiB`; lists are",
        "separated by commas in flags and variables; `none` unsets what may be unset.",
    ]
    room = ""
    for leaf in leaves():
        title = leaf.path[0] if len(leaf.path) > 1 else "cluster"
        if title != room:
            room = title
            about = Settings.model_fields[room].description if room in Settings.model_fields else None
            lines += ["", f"## {room}", "", *([about, ""] if about else [])]
            lines += [
                "| setting | type | unit | default | flag | variable | meaning |",
                "|---|---|---|---|---|---|---|",
            ]
        cells = (
            f"`{leaf.name}`",
            metavar(leaf.info.annotation),
            unit_of(leaf),
            f"`{as_text(leaf.default)}`",
            ", ".join(f"`{flag}`" for flag in leaf.flags),
        )
        row = [*cells, f"`{leaf.variable}`", leaf.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(configuration_page(), end="")  # noqa: T201 - the page is this module's output
