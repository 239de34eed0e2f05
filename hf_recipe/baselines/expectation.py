"""The loss of a model that knows nothing of its inputs, with its standard error.

Take the logits as they are and let the labels be independent of the inputs. The mean loss is then
``mean_i logsumexp(z_i) - sum_k p_k mean_i z_ik``: what the same logits give under permuted labels,
with no expansion in the size of the logits.

Two things move the loss of a fresh head away from it. Which row got which label: the variance
under permuted rows (groups of rows that belong together are one unit). And which output got which
class: a fresh head's logits are structured by class, because the inputs are, and no number of
rows averages that away. It is the variance under permuted class names (Hoeffding 1951,
"A combinatorial central limit theorem") of ``a_kl = p_k (mean logit_l given y=k - mean logit_l)``;
independent outputs (BCE, regression) may be renamed and change sign.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
CHUNK = 1 << 18  # elements of a temporary: 2 MB in double precision, which caches hold
DOUBLE = 1 << 22  # more logits than these stay in single precision: their sums do not


def expected_initial_loss(
    logits: Any,
    labels: Any,
    *,
    problem_type: str | None = None,
    groups: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[float, float]:
    """Return the loss expected if labels were independent of the inputs, and its standard error.

    Args:
        logits: (rows, classes), (batch, length, classes) or, for segmentation, (batch, classes,
            height, width); torch, numpy or nested lists. Regression: also (rows,).
        labels: aligned with the logits (causal models: already shifted). Class indices of the
            logits' shape without its class axis; numbers of the logits' shape for
            ``multi_label_classification`` and ``regression``.
        problem_type: as in a model's config; None: regression for one output, multi-label for
            labels of the logits' shape, else single-label.
        groups: for each row (or batch and position) the cluster it belongs to; None: the
            sequence or image of (batch, ...) logits, else the row itself.
        ignore_index: class index that is not supervised (a NaN float label is not either).
        label_smoothing: share of the target spread evenly over all classes.

    Returns:
        Nats (squared units for regression), both NaN where no label is supervised. At two or
        three classes, and for a single output, renaming has little to permute: there the
        standard error is about as large as any effect, and only re-drawn heads tell more.

    Raises:
        ValueError: shapes that do not fit each other, or a label outside 0..classes-1.
    """
    z, y, g, kind = aligned(logits, labels, problem_type, groups, ignore_index)
    if len(y) == 0:
        return math.nan, math.nan
    if kind == "single_label_classification":
        return _softmax(z, y, g, label_smoothing)
    return _outputs(z, y.to(z.dtype), g, binary=kind == "multi_label_classification")


def aligned(
    logits: Any, labels: Any, problem_type: str | None, groups: Any, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """Logits (N, K), labels (N,) or (N, K), groups 0..G-1 (N,) and the problem type."""
    z, y = torch.as_tensor(logits).detach(), torch.as_tensor(labels).detach()
    z = z.double() if z.numel() <= DOUBLE else z.float()
    y = y.to(z.device)
    if problem_type is None:
        problem_type = _problem_type(z, y)
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(
            f"problem_type must be one of {', '.join(PROBLEM_TYPES)}; got {problem_type!r}"
        )
    z, y = _fitted(z, y, problem_type)
    lead = z.shape[:-1]
    if problem_type == "single_label_classification":
        y = y.reshape(-1).long()
        keep = y != ignore_index
    else:
        y = y.reshape(-1, z.shape[-1]).double()
        keep = torch.isfinite(y).all(-1) & (y != ignore_index).all(-1)
    z = z.reshape(-1, z.shape[-1])
    g = _clusters(groups, lead).to(z.device)
    z, y, g = z[keep], y[keep], torch.unique(g[keep], return_inverse=True)[1]
    if problem_type == "single_label_classification" and len(y):
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= z.shape[-1]:
            raise ValueError(f"labels {low}..{high} outside the head's 0..{z.shape[-1] - 1}")
    return z, y, g, problem_type


def _problem_type(z: torch.Tensor, y: torch.Tensor) -> str:
    if z.ndim == 1 or z.shape[-1] == 1:
        return "regression"
    if y.shape == z.shape:
        return "multi_label_classification"
    return "single_label_classification"


def _fitted(
    z: torch.Tensor, y: torch.Tensor, problem_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (..., K), and labels (...) of classes or (..., K) of independent outputs."""
    wrong = ValueError(f"labels {tuple(y.shape)} do not fit logits {tuple(z.shape)}")
    if problem_type == "single_label_classification":
        if z.ndim == 4 and y.ndim == 3:
            z = z.movedim(1, -1)
        if y.shape == (*z.shape[:-1], 1):
            y = y.squeeze(-1)
        if y.shape != z.shape[:-1] or not z.ndim:
            raise wrong
        return z, y
    outputs = 1 if z.ndim < 2 or (y.ndim < z.ndim and z.shape[-1] == 1) else z.shape[-1]
    if not z.ndim or z.numel() != y.numel() or (y.ndim >= 2 and y.shape[-1] != outputs):
        raise wrong
    rows = z.shape if outputs == z.shape[-1] and z.ndim > 1 else (*z.shape, 1)
    return z.reshape(rows), y.reshape(rows)


def _clusters(groups: Any, lead: torch.Size) -> torch.Tensor:
    """A number for each row's cluster: of `groups`, else of the row's sequence or image."""
    if groups is None:
        groups = torch.arange(lead[0])
    elif not isinstance(groups, torch.Tensor):
        groups = torch.as_tensor(np.unique(np.asarray(groups), return_inverse=True)[1])
    found: torch.Tensor = groups
    rows = math.prod(lead)
    if found.numel() != rows and found.shape == lead[:1]:  # one for each sequence
        found = found.reshape(-1, *[1] * (len(lead) - 1)).expand(lead)
    if found.numel() != rows:
        raise ValueError(f"groups {tuple(found.shape)} do not fit {rows} rows")
    return found.reshape(-1)


def _softmax(
    z: torch.Tensor, y: torch.Tensor, g: torch.Tensor, smoothing: float
) -> tuple[float, float]:
    ruled_out = torch.isneginf(z).all(0)  # a vocabulary's padding: no class, unless a label says so
    ruled_out[y] = False
    if ruled_out.any():
        z, y = z[:, ~ruled_out], (torch.cumsum(~ruled_out, 0) - 1)[y]
    rows, classes = z.shape
    normalizer = torch.logsumexp(z, -1).double().mean()
    p = torch.bincount(y, minlength=classes).double() / rows
    target = (1 - smoothing) * p + smoothing / classes
    expected = float(normalizer - (target * z.double().mean(0)).sum())
    # Shift every row to mean zero: softmax does not see it, and the sums below get centred.
    z -= z.mean(-1, keepdim=True)  # a copy of the supervised rows: the caller's stay as they are
    mean = z.mean(0)
    average = (p * mean.double()).sum()
    residual = z[torch.arange(rows), y].double() - mean[y].double()
    residual -= torch.mv(z, p.to(z.dtype)).double() - average
    by_rows = _clustered(residual, g)
    by_names = 0.0
    present, index = torch.unique(y, return_inverse=True)
    width = max(1, CHUNK // max(rows, 1))
    for start in range(0, classes, width):
        part = (z[:, start : start + width] - mean[start : start + width]).double()
        sums = part.new_zeros(len(present), part.shape[1]).index_add_(0, index, part)
        by_names += float(sums.square().sum())
    by_names /= rows**2 * max(classes - 1, 1)
    return expected, (1 - smoothing) * math.sqrt(by_rows + by_names)


def _outputs(
    z: torch.Tensor, y: torch.Tensor, g: torch.Tensor, *, binary: bool
) -> tuple[float, float]:
    """Independent outputs: each loss is f(z) - scale * y z plus what does not mix the two."""
    rows, outputs = z.shape
    z = z.double()
    y = y.double()
    if binary:
        expected = functional.softplus(z).mean() - (y.mean(0) * z.mean(0)).mean()
        scale = 1.0
    else:
        spread = y.var(0, unbiased=False) + z.var(0, unbiased=False)
        expected = (spread + (y.mean(0) - z.mean(0)).square()).mean()
        scale = 2.0
    centred_y, centred_z = y - y.mean(0), z - z.mean(0)
    residual = scale * (centred_y * centred_z).mean(-1)
    covariance = scale * centred_y.T @ centred_z / rows  # (label, output)
    by_names = float(covariance.square().sum()) / outputs / outputs**2
    return float(expected), math.sqrt(_clustered(residual, g) + by_names)


def _clustered(residual: torch.Tensor, g: torch.Tensor) -> float:
    """Variance of the mean of `residual`, whose groups are the independent units."""
    clusters = int(g.max()) + 1
    if clusters < 2:
        return float(residual.var(unbiased=False)) / max(len(residual) - 1, 1)
    centred = residual - residual.mean()
    sums = centred.new_zeros(clusters).index_add_(0, g, centred)
    return float(sums.square().sum()) / len(residual) ** 2 * clusters / (clusters - 1)
