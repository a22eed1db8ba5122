"""`curves`: synthetic images of smooth curves, in the manner of Hinton and Salakhutdinov (2006).

Each case is a parabola through three random points, drawn with a soft pen on 28x28 pixels. The
six coordinates of the points describe it completely. The curve visits the points along the two
shorter sides of their triangle, which gives open arcs rather than hairpins. Every job sees the
same set: its seed belongs to the data set, not to the job.

The ink of a pixel is the integral of the pen's Gaussian profile along the curve. It is scaled so
that a straight stroke has full ink on its centre line, and clipped at full ink where the curve
runs close to itself. The Gaussian is a product over x and y, so an image is a small matrix product.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kfac_dist.data.dataset import Split

SIDE = 28
NUM_CASES: dict[Split, int] = {"train": 20_000, "test": 10_000}

# A parabola through three points of a square leaves it by at most an eighth of its side, so with
# this margin every curve stays inside the image.
_MARGIN = 3.5
_PEN_SIGMA = 0.75  # pixels; the stroke is about 1.8 pixels wide at half ink
_NUM_SAMPLES = 128  # samples along a curve: at most two pixels apart
_SEED = 20061
_STREAM: dict[Split, int] = {"train": 0, "test": 1}
_CHUNK = 500  # images drawn at once: few enough for the CPU caches


def control_points(split: Split, num_cases: int) -> NDArray[np.float32]:
    """Return three points (x, y) a case, `[num_cases, 3, 2]` in pixels, in the order of the curve.

    The first n cases are the same for every `num_cases` of at least n.
    """
    generator = np.random.default_rng([_SEED, _STREAM[split]])
    low, high = _MARGIN, SIDE - _MARGIN
    points = generator.uniform(low, high, (num_cases, 3, 2)).astype(np.float32)
    # Side k of the triangle is the one opposite point k.
    sides = np.linalg.norm(points[:, [1, 2, 0]] - points[:, [2, 0, 1]], axis=2)
    middle = sides.argmax(axis=1)
    order = (middle[:, None] + np.array([2, 0, 1])) % 3
    visited: NDArray[np.float32] = np.take_along_axis(points, order[:, :, None], axis=1)
    return visited


def load_curves(split: Split, num_cases: int) -> NDArray[np.uint8]:
    """Return the first `num_cases` images of a split, `[num_cases, 784]`; 255 is full ink."""
    points = control_points(split, num_cases)
    images = np.empty((num_cases, SIDE * SIDE), np.uint8)
    for start in range(0, num_cases, _CHUNK):
        images[start : start + _CHUNK] = _draw(points[start : start + _CHUNK])
    return images


def _draw(points: NDArray[np.float32]) -> NDArray[np.uint8]:
    t = (np.arange(_NUM_SAMPLES, dtype=np.float32) + 0.5) / _NUM_SAMPLES
    # Lagrange polynomials with nodes 0, 1/2, 1: the curve passes through all three points.
    basis = np.stack([(2 * t - 1) * (t - 1), 4 * t * (1 - t), t * (2 * t - 1)])
    slope = np.stack([4 * t - 3, 4 - 8 * t, 4 * t - 1])
    position = np.einsum("kt,nkc->nct", basis, points)
    velocity = np.einsum("kt,nkc->nct", slope, points)
    # Weighted by arc length; otherwise slow parts of the parametrisation would be darker.
    step = np.hypot(velocity[:, 0], velocity[:, 1]) / _NUM_SAMPLES
    weight = step / np.float32(_PEN_SIGMA * np.sqrt(2 * np.pi))
    centre = np.arange(SIDE, dtype=np.float32) + 0.5
    offset = centre[None, None, :, None] - position[:, :, None, :]
    profile = np.exp(np.square(offset) * np.float32(-0.5 / _PEN_SIGMA**2))
    across, down = profile[:, 0], profile[:, 1]
    ink = np.matmul(down * weight[:, None, :], across.transpose(0, 2, 1))
    images: NDArray[np.uint8] = np.rint(255 * np.minimum(ink, 1)).astype(np.uint8)
    return images.reshape(len(points), -1)
