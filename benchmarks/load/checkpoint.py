"""The random LLaVA checkpoint of ``benchmarks.engine`` with a template that places images, as clients' messages need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks.engine import checkpoints

if TYPE_CHECKING:
    from pathlib import Path

TEMPLATE: Final = (
    "{% for m in messages %}{{ m.role }}: "
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}\n{% endfor %}assistant:"
)
_TEMPLATE_FILE: Final = "chat_template.jinja"


def checkpoint(folder: Path, shape: checkpoints.Shape) -> Path:
    """A directory of links to that checkpoint, made with it if it is not there yet, beside a template of its own."""
    source = checkpoints.llava(folder, shape)
    directory = folder / f"{source.name}-chat"
    directory.mkdir(exist_ok=True)
    for file in source.iterdir():
        link = directory / file.name
        if file.name != _TEMPLATE_FILE and not link.is_symlink():
            link.symlink_to(file.resolve())
    (directory / _TEMPLATE_FILE).write_text(TEMPLATE, encoding="utf-8")
    return directory
