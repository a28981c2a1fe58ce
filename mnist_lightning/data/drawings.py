"""Finds the ink of a drawn or photographed digit, and frames it as MNIST's digits are framed."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST = 512  # pixels: larger pictures are scaled down before the ink is searched
_GRID = 128  # pixels a side: the paper is fitted to a grid of no more, evenly spaced
_FAINT = 25  # of 255: less contrast is no ink
_STROKE = 1.6  # pixels of the 28: thinner strokes would be faint, and are drawn thicker


def find_ink(gray: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Separates the ink from the paper, which may be shaded, ruled, noisy, light or dark.

    Args:
        gray: brightness from 0 to 255, float, ``(height, width)``.

    Returns:
        The ink from 0 to 255, 0 outside of its strokes, and a mask of the strokes, bool; both in
        the shape of the picture, scaled to at most 512 pixels a side. None if there is no ink.
    """
    from scipy import ndimage  # here, because its import takes a fifth of a second

    scale = _LARGEST / max(gray.shape)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in gray.shape)
        gray = _resized(gray, size)
    contrast = gray.astype(np.float64)
    surface, noise = _paper(contrast)
    contrast -= surface
    # what differs most from the paper is the ink, dark or light (** 3 would be far slower)
    if (contrast * contrast * contrast).sum() < 0:
        contrast = -contrast
    ink = contrast.clip(0)
    _remove_rulings(ink)
    _remove_rulings(ink.T)
    peak = (ndimage.uniform_filter(ink, 3) if noise > 2 else ink).max()
    if peak < _FAINT:
        return None
    ink = ink.clip(0, peak) * (255 / peak)
    # strokes: connected pixels of which one is dark at least; specks are left out
    parts, count = ndimage.label(ink > max(64, 4 * noise * 255 / peak), np.ones((3, 3)))
    areas = np.bincount(parts.ravel(), minlength=count + 1)
    dark = np.bincount(parts[ink >= 128], minlength=count + 1) > 0
    dark[0] = False  # what is no part
    if not dark.any():
        return None
    mask = (dark & (areas >= 0.04 * areas[dark].max()))[parts]
    return ink * ndimage.binary_dilation(mask, iterations=2), mask


def _paper(gray: np.ndarray) -> tuple[np.ndarray, float]:
    """The brightness of the paper: a quadratic surface through the pixels that are not ink.

    It is fitted to the pixels near the border first, then again to all that lie close to it.

    Returns:
        The brightness, and the standard deviation of the paper's pixels from it.
    """
    y, x = (2 * np.arange(side) / max(1, side - 1) - 1 for side in gray.shape)
    down, across = (-(-side // _GRID) for side in gray.shape)
    points, v, u = gray[::down, ::across], y[::down], x[::across]
    rows, columns = v ** np.arange(5)[:, None], u ** np.arange(5)[:, None]
    terms = np.array([[0, 0, 1, 0, 1, 2], [0, 1, 0, 2, 1, 0]])  # powers of y and x
    height, width = points.shape
    edge = max(1, min(height, width) // 12)
    used = np.ones((height, width), bool)
    used[edge : height - edge, edge : width - edge] = False
    for _ in range(8):
        products = (rows @ used @ columns.T)[tuple(terms[:, :, None] + terms[:, None])]
        sums = (rows @ (used * points) @ columns.T)[tuple(terms)]
        factors = np.linalg.lstsq(products, sums, rcond=1e-10)[0]
        distance = abs(points - _quadratic(factors, v, u))
        noise = 1.4826 * float(np.median(distance[used]))  # estimated as if it were normal
        close = distance < max(2.5 * noise, 8)
        if (close == used).all() or not close.any():
            break
        used = close
    if noise > _FAINT:  # ink all along the border: the paper is the median there
        edges = np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])
        return np.full_like(gray, np.sort(edges)[(len(edges) - 1) // 2]), 0.0
    return _quadratic(factors, y, x), noise


def _quadratic(factors: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The surface with these factors of 1, x, y, xx, xy and yy, at all pairs of y and x."""
    a, b, c, d, e, f = factors
    start, slope = a + c * y + f * y * y, b + e * y
    surface = start[:, None] + slope[:, None] * x + d * x * x
    return surface.round(6)  # rounding errors would decide on pixels at a threshold


def _remove_rulings(ink: np.ndarray) -> None:
    """Replaces each row that is dark from border to border by the lighter of its neighbours."""
    dark = ink > 0.15 * ink.max()
    end = max(1, dark.shape[1] // 50)
    ruled = dark[:, :end].any(1) & dark[:, -end:].any(1) & (dark.mean(1) > 0.9)
    clear = np.flatnonzero(~ruled)
    for row in np.flatnonzero(ruled) if len(clear) else ():
        at = np.searchsorted(clear, row)
        ink[row] = np.min([ink[n] for n in clear[max(0, at - 1) : at + 1]], 0)


def frame(ink: np.ndarray, mask: np.ndarray) -> Tensor:
    """Scales a digit to fit 20 x 20 pixels, with its centre of mass in the middle of 28 x 28.

    Args:
        ink: from 0 to 255, ``(height, width)``.
        mask: of its strokes, bool.

    Returns:
        uint8, ``(28, 28)``.
    """
    from scipy import ndimage

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    digit, strokes = ink[box], mask[box]
    # in a stroke of width w, the mean distance to its border is about w / 4
    depth = ndimage.distance_transform_cdt(np.pad(strokes, 1), "chessboard")[1:-1, 1:-1]
    stroke = 4 * depth[strokes].mean() - 1
    thicker = round((_STROKE * max(digit.shape) / 20 - stroke) / 2)
    if thicker > 0:
        digit = ndimage.maximum_filter(np.pad(digit, thicker), 2 * thicker + 1)
    scale = 20 / max(digit.shape)
    height, width = (max(1, round(side * scale)) for side in digit.shape)
    small = torch.from_numpy(_resized(digit, (height, width)))
    weight = small.double()  # so that the sums are exact, in any order
    centre_y = (weight.sum(1) * torch.arange(height)).sum() / weight.sum()
    centre_x = (weight.sum(0) * torch.arange(width)).sum() / weight.sum()
    # the centres of mass of MNIST's digits lie within half a pixel of row and column 14, not 13.5
    top = int((14 - centre_y).round().clamp(0, 28 - height))
    left = int((14 - centre_x).round().clamp(0, 28 - width))
    framed = torch.zeros(28, 28)
    framed[top : top + height, left : left + width] = small
    return framed.round().clamp(0, 255).to(torch.uint8)


def _resized(gray: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    pixels = torch.from_numpy(np.ascontiguousarray(gray, np.float32))
    return F.interpolate(pixels[None, None], size=size, mode="area")[0, 0].numpy()
