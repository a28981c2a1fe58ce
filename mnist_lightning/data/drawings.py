"""Finds the ink of a drawn or photographed digit, and frames it as MNIST's digits are framed."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST = 512  # pixels: larger pictures are scaled down before the ink is searched
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
    if (contrast**3).sum() < 0:  # what differs most from the paper is the ink, dark or light
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
    numbers = np.arange(1, count + 1)
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    darkest = np.asarray(ndimage.maximum(ink, parts, numbers))
    if not (darkest >= 128).any():
        return None
    largest = areas[darkest >= 128].max()
    mask = np.isin(parts, numbers[(darkest >= 128) & (areas >= 0.04 * largest)])
    return ink * ndimage.binary_dilation(mask, iterations=2), mask


def _paper(gray: np.ndarray) -> tuple[np.ndarray, float]:
    """The brightness of the paper: a quadratic surface through the pixels that are not ink.

    It is fitted to the pixels near the border first, then again to all that lie close to it.

    Returns:
        The brightness, and the standard deviation of the paper's pixels from it.
    """
    height, width = gray.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1).reshape(-1, 6)
    values = gray.ravel()
    edge = max(1, min(height, width) // 12)
    border = np.ones((height, width), bool)
    border[edge : height - edge, edge : width - edge] = False
    used = border.ravel()
    surface, noise = values, 0.0
    for _ in range(8):
        some = np.flatnonzero(used)
        some = some[:: max(1, len(some) // 4096)]
        surface = terms @ np.linalg.lstsq(terms[some], values[some], rcond=None)[0]
        surface = surface.round(6)  # rounding errors would decide on pixels at a threshold
        distance = abs(values - surface)
        noise = 1.4826 * float(np.median(distance[used]))  # estimated as if it were normal
        close = distance < max(2.5 * noise, 8)
        if (close == used).all() or not close.any():
            break
        used = close
    if noise > _FAINT:  # ink all along the border: the paper is the median there
        edges = np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])
        return np.full_like(gray, np.sort(edges)[(len(edges) - 1) // 2]), 0.0
    return surface.reshape(gray.shape), noise


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
    weight = small / small.sum()
    centre_y = (weight.sum(1) * torch.arange(height)).sum()
    centre_x = (weight.sum(0) * torch.arange(width)).sum()
    # the centres of mass of MNIST's digits lie within half a pixel of row and column 14, not 13.5
    top = int((14 - centre_y).round().clamp(0, 28 - height))
    left = int((14 - centre_x).round().clamp(0, 28 - width))
    framed = torch.zeros(28, 28)
    framed[top : top + height, left : left + width] = small
    return framed.round().clamp(0, 255).to(torch.uint8)


def _resized(gray: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    pixels = torch.from_numpy(np.ascontiguousarray(gray, np.float32))
    return F.interpolate(pixels[None, None], size=size, mode="area")[0, 0].numpy()
