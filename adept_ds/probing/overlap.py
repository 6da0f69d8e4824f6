"""How far two samples of vectors are apart: a distance of their distributions, and how well a plane parts them.

*Energy coefficient* (Székely and Rizzo 2013, Energy statistics, section 3), for independent X, X' and Y, Y':

    H = (2 E|X - Y| - E|X - X'| - E|Y - Y'|) / (2 E|X - Y|)

0 if, and only if, both have the same distribution, at most 1, and the same in any unit of length. Chosen before a
Fréchet distance of Gaussians, since it assumes no form, and needs no covariances, of which a few hundred sequences in
thousands of dimensions have none; means over distinct pairs make it unbiased, so two samples of one distribution have
about 0 (a little below as often as above), however few they are.

*Separability*: the accuracy with which ridge regression on +1 and -1 tells the samples apart, each fold by what the
other folds taught, and each sample with half of the weight: 0.5 is chance. With as many dimensions as here, any two
samples can be parted by some plane; only what holds for vectors that had no part in placing it means anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

SHRINKAGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties that are tried, in units of the mean eigenvalue; leave-one-out errors in the other folds choose."""

FOLDS = 5


def energy_coefficient(x: Array, y: Array) -> float:
    """H of samples x [n, dim] and y [m, dim], n and m at least 2; 0 where all vectors are one."""
    between = _distances(x, y).mean()
    if between == 0:
        return 0.0
    within = [_distances(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float((2 * between - sum(within)) / (2 * between))


@dataclass(frozen=True)
class Separation:
    """How a plane parts two samples."""

    accuracy: float
    """Mean of the shares of both samples on their side: 0.5 is chance."""
    x_scores: tuple[float, ...]
    """What the regression says of each vector, fitted without its fold: x should be above 0, y below."""
    y_scores: tuple[float, ...]


def separability(x: Array, y: Array, folds: int = FOLDS) -> Separation:
    """Part x [n, dim] from y [m, dim], n and m at least 2, by cross-validation.

    Folds are runs of neighbours: sequences that were cut of one document shall not stand on both sides.
    """
    folds = min(folds, len(x), len(y))
    features = np.concatenate([x, y])
    targets = np.concatenate([np.ones(len(x)), -np.ones(len(y))])
    fold = np.concatenate([np.arange(len(z)) * folds // len(z) for z in (x, y)])
    scores = np.empty(len(targets))
    for number in range(folds):
        left_out = fold == number
        scores[left_out] = _ridge(features[~left_out], targets[~left_out], features[left_out])
    right = scores * targets > 0
    accuracy = float((right[: len(x)].mean() + right[len(x) :].mean()) / 2)
    return Separation(accuracy, tuple(scores[: len(x)].tolist()), tuple(scores[len(x) :].tolist()))


def _ridge(features: Array, targets: Array, new: Array) -> Array:
    """Predict the targets of `new`; both classes weigh alike, and the penalty is chosen by leave-one-out errors.

    In the eigenbasis of the weighted, centred Gram matrix, a row for each vector: dimensions may be many.
    """
    weights = np.where(targets > 0, 0.5 / (targets > 0).sum(), 0.5 / (targets < 0).sum())
    root = np.sqrt(weights)
    centre = weights @ features
    rows = root[:, None] * (features - centre)
    values, basis = np.linalg.eigh(rows @ rows.T)
    values = np.clip(values, 0.0, None)
    wanted = root * targets  # weighted mean 0, as both classes weigh alike: no intercept is needed
    best, coefficients = np.inf, np.zeros(len(targets))
    for shrinkage in SHRINKAGES:
        penalty = shrinkage * values.mean() or 1.0
        # Hat matrix B diag(v / (v + p)) B^T, and the centre, which was fitted to the row too.
        hat = basis * (values / (values + penalty))
        leverage = np.minimum((hat * basis).sum(1) + weights, 1 - 1e-9)
        error = float(np.square((wanted - hat @ (basis.T @ wanted)) / (1 - leverage)).sum())
        if error < best:
            best, coefficients = error, basis @ ((basis.T @ wanted) / (values + penalty))
    return (new - centre) @ (rows.T @ coefficients)


def _distances(x: Array, y: Array) -> Array:
    """Euclidean, of every pair. [n, m] float64"""
    x, y = x.astype(np.float64), y.astype(np.float64)
    shift = x.mean(0)  # differences of long vectors lose digits
    x, y = x - shift, y - shift
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
    distances: Array = np.sqrt(np.clip(squares, 0.0, None))
    if x.shape == y.shape and np.array_equal(x, y):
        np.fill_diagonal(distances, 0.0)
    return distances
