"""A labelled set of images that is on every machine: drawn shapes, each with its own place, size and noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import TensorDataset

SIDE = 28  # pixels
NOISE = 0.25  # of the brightness of a shape, one standard deviation

Plane = np.ndarray  # [SIDE, SIDE]: a coordinate of each pixel, the shape's radius being 1

SHAPES: dict[str, Callable[[Plane, Plane], np.ndarray]] = {
    "disc": lambda x, y: x**2 + y**2 < 1,
    "ring": lambda x, y: abs(x**2 + y**2 - 0.7) < 0.3,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.85,
    "diamond": lambda x, y: abs(x) + abs(y) < 1,
    "triangle": lambda x, y: (y < 0.7) & (y > 2.2 * abs(x) - 1),
    "plus": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.25) & (np.maximum(abs(x), abs(y)) < 1),
    "bars": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.95) & (abs(y) > 0.4),
}


def drawn_shapes(number: int, seed: int) -> TensorDataset:
    """Images [1, SIDE, SIDE] of mean 0 or so, and the number of the shape in each; the same for one seed anywhere."""
    random = np.random.default_rng(seed)
    pixel = np.arange(SIDE, dtype=np.float32)
    images = np.empty((number, 1, SIDE, SIDE), dtype=np.float32)
    labels = random.integers(len(SHAPES), size=number)
    for image, label in zip(images, labels, strict=True):
        radius, angle = random.uniform(5, 10), random.uniform(-0.3, 0.3)
        left, top = random.uniform(radius, SIDE - radius, size=2)
        across, down = np.meshgrid((pixel - left) / radius, (pixel - top) / radius)
        x = across * np.cos(angle) + down * np.sin(angle)
        y = down * np.cos(angle) - across * np.sin(angle)
        image[0] = list(SHAPES.values())[label](x, y) * random.uniform(0.6, 1.0)
    images += NOISE * random.standard_normal(images.shape, dtype=np.float32)
    return TensorDataset(torch.from_numpy(images) - 0.2, torch.from_numpy(labels))
