"""Backgrounds, shape masks and the font; numpy and Pillow, every random number from a generator passed in."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from prismserve.models.reference.vocabulary import SIZE

Pixels = NDArray[np.float32]
"""[height, width, 3], 0 to 255."""

_BACKGROUNDS: Final = ("plain", "gradient", "stripes", "blotches", "noise", "photo")
_BACKGROUND_SHARES: Final = (0.1, 0.15, 0.15, 0.1, 0.15, 0.35)
_PHOTO_SIDE_PX: Final = 420
_PHOTOS: Final = {
    "skimage": (
        "data",
        (
            "coffee.png",
            "astronaut.png",
            "chelsea.png",
            "rocket.jpg",
            "hubble_deep_field.jpg",
            "camera.png",
            "gravel.png",
            "brick.png",
            "grass.png",
            "coins.png",
            "moon.png",
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}


@functools.cache
def photos() -> tuple[NDArray[np.uint8], ...]:
    """Photographs that ship inside scikit-image and scikit-learn, shorter side 420 pixels; none if not installed."""
    out = []
    for package, (folder, files) in _PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for path in (Path(spec.origin).parent / folder / name for name in files):
            if path.exists():
                image = Image.open(path).convert("RGB")
                scale = _PHOTO_SIDE_PX / min(image.size)
                out.append(np.asarray(image.resize((round(image.width * scale), round(image.height * scale)))))
    return tuple(out)


def background_kind(rng: np.random.Generator) -> str:
    """The first draw of a background's stream: which kind it is."""
    return str(rng.choice(_BACKGROUNDS, p=_BACKGROUND_SHARES))


def background(rng: np.random.Generator) -> Pixels:
    """A muted background [224, 224, 3]; a photograph's place is taken by a plain color where there are none."""
    kind = background_kind(rng)
    base = rng.uniform(50, 190) + rng.uniform(-22, 22, 3)
    other = rng.uniform(50, 190) + rng.uniform(-22, 22, 3)
    if kind == "photo" and photos():
        image = _photo(rng)
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        axis = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
        slope = axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle)
        share = np.clip(0.5 + slope, 0, 1)[..., None]
        image = base * (1 - share) + other * share
    elif kind == "stripes":
        angle, width = rng.uniform(0, np.pi), rng.uniform(8, 40)
        axis = np.arange(SIZE, dtype=np.float32)
        wave = (np.floor((axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle)) / width) % 2)[..., None]
        image = base + wave * (rng.uniform(15, 45) * rng.choice([-1, 1]))
    elif kind == "blotches":
        cells = rng.integers(3, 9)
        image = _upscale(base + rng.uniform(-35, 35, (cells, cells, 3)))
    elif kind == "noise":
        cells = rng.integers(20, 112)
        image = _upscale(base + rng.normal(0, rng.uniform(5, 25), (cells, cells, 1)).repeat(3, 2))
    else:
        image = np.broadcast_to(base.astype(np.float32), (SIZE, SIZE, 3))
    return np.clip(image, 0, 255).astype(np.float32)


def _photo(rng: np.random.Generator) -> Pixels:
    photo = photos()[rng.integers(len(photos()))]
    y, x = rng.integers(photo.shape[0] - SIZE), rng.integers(photo.shape[1] - SIZE)
    image = photo[y : y + SIZE, x : x + SIZE].astype(np.float32)
    if rng.random() < 0.5:
        image = image[:, ::-1]
    gray = image.mean(2, keepdims=True)  # muted, so that shapes stand out as they would on a sign
    muted = (gray + (image - gray) * 0.45) * rng.uniform(0.5, 0.75) + rng.uniform(20, 50)
    return np.asarray(muted, dtype=np.float32)


def _upscale(grid: NDArray[np.float64]) -> Pixels:
    """A coarse [h, w, 3] grid as a smooth [224, 224, 3] image."""
    image = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)


def shape_mask(shape: str, size: int, rng: np.random.Generator) -> Pixels:
    """Anti-aliased coverage of one shape, [size, size], 0 to 1."""
    scale = 4
    n = size * scale
    image = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(image)
    center = n / 2
    tilt = rng.uniform(-0.2, 0.2)

    def polygon(radii: list[float], angles: NDArray[np.float64] | list[float]) -> None:
        points = [
            (center + center * r * np.sin(a + tilt), center - center * r * np.cos(a + tilt))
            for r, a in zip(radii, angles, strict=True)
        ]
        draw.polygon(points, fill=255)

    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        if shape == "ring":
            draw.ellipse((n * 0.27, n * 0.27, n * 0.73, n * 0.73), fill=0)
    elif shape == "square":
        polygon([1.18] * 4, np.pi / 4 + np.arange(4) * np.pi / 2)
    elif shape == "triangle":
        polygon([1.0, 1.15, 1.15], [0, 2 * np.pi * 0.36, 2 * np.pi * 0.64])
    elif shape == "star":
        polygon([1.05, 0.42] * 5, np.arange(10) * np.pi / 5)
    else:
        arm = 0.34
        quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm)]
        corners = quarter + [(-x, -y) for x, y in quarter]
        polygon([np.hypot(x, y) for x, y in corners], [np.arctan2(x, -y) for x, y in corners])
    return np.asarray(image.reduce(scale), dtype=np.float32) / np.float32(255)


@functools.cache
def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font bundled with Pillow; no system font is needed."""
    return ImageFont.load_default(size_px)
