"""Objectives of `search_efficiency.py` from tables of real training runs.

A run is a ratio and a metric. Two surrogates of different kind stand in for training, a Gaussian process and a tree
ensemble, so that the objective does not favour a search that models the loss by a Gaussian process itself. Each kind is
chosen by five-fold cross-validation: the process among squared exponential and Matérn 5/2 kernels (a length-scale per
domain, maximum a posteriori) on shares, on their square roots and on their logarithms; the trees among boosted and
extremely randomised ones. A kind that explains less than half of the variance out of fold is refused.

A table without repeats does not show its noise. We take the out-of-fold residuals of the better of the two kinds, for
both: they hold the surrogate's misfit too, so they are more than the noise of a repeat, and `noise_fraction` can shrink
them. Noise is drawn from these residuals, not from a normal law.

The best value is that of the surrogate anywhere on the simplex, not only among the runs. Both kinds are tame away from
the runs (the process returns to its mean, trees are constant); the distance of the best ratio to the nearest run is
reported beside the distances among runs.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from search_objectives import Objective, ObjectiveError, make, squared_distances
from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor
from sklearn.model_selection import KFold

Coordinates = Literal["shares", "roots", "logs"]
Kernel = Literal["se", "matern"]

_FOLDS = 5
_LEAST_EXPLAINED = 0.5


@dataclass(frozen=True, kw_only=True)
class Table:
    """Real runs: ratios and their metrics, and runs held out of every fit."""

    names: tuple[str, ...]
    ratios: np.ndarray
    """`(n_runs, n_domains)` on the simplex."""
    metrics: pd.DataFrame
    held_out_ratios: np.ndarray | None = None
    held_out_metrics: pd.DataFrame | None = None

    @classmethod
    def read(cls, path: Path, *, ratio_prefix: str = "train_") -> "Table":
        """Read a CSV of runs, or a folder in the layout of RegMix's published runs.

        Args:
            path: a CSV with ratio columns (they start with `ratio_prefix`) and metric columns; or a folder with
                `train_mixture_1m.csv` and `train_pile_loss_1m.csv`, joined on `index`, and the same with `test_`.

        Raises:
            ObjectiveError: files or columns are missing.
        """
        if path.is_dir():
            ratios, metrics = _split(_joined(path, "train"), ratio_prefix, path)
            held_out = _joined(path, "test") if (path / "test_mixture_1m.csv").is_file() else None
        elif path.is_file():
            ratios, metrics = _split(pd.read_csv(path), ratio_prefix, path)
            held_out = None
        else:
            raise ObjectiveError(f"no table of runs at {path}; give a CSV or a folder in RegMix's layout with --table")
        names = tuple(str(column).removeprefix(ratio_prefix) for column in ratios)
        if held_out is None:
            return cls(names=names, ratios=_normalised(ratios, path), metrics=metrics)
        other_ratios, other_metrics = _split(held_out, ratio_prefix, path)
        return cls(
            names=names,
            ratios=_normalised(ratios, path),
            metrics=metrics,
            held_out_ratios=_normalised(other_ratios[list(ratios)], path),
            held_out_metrics=other_metrics,
        )

    def target(self, metric: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The metric of every run, and of those held out: `mean` of all metrics, or the column with this in its name.

        Raises:
            ObjectiveError: no column, or several.
        """
        if metric == "mean":
            columns = list(self.metrics)
        else:
            columns = [c for c in self.metrics if metric in str(c)]
            if len(columns) != 1:
                found = ", ".join(map(str, columns or self.metrics))
                raise ObjectiveError(f"metric {metric!r}: one column must have this in its name; there are: {found}")
        held_out = None if self.held_out_metrics is None else self.held_out_metrics[columns].mean(axis=1).to_numpy()
        return self.metrics[columns].mean(axis=1).to_numpy(), held_out


def _joined(folder: Path, part: str) -> pd.DataFrame:
    files = [folder / f"{part}_{what}_1m.csv" for what in ("mixture", "pile_loss")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ObjectiveError(f"not in the table's folder: {', '.join(missing)}")
    ratios, metrics = (pd.read_csv(file) for file in files)
    return ratios.merge(metrics, on="index", validate="one_to_one")


def _split(frame: pd.DataFrame, ratio_prefix: str, path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    ratios = [c for c in frame if str(c).startswith(ratio_prefix)]
    metrics = [c for c in frame.select_dtypes("number") if c not in ratios and c != "index"]
    if len(ratios) < 2 or not metrics:
        raise ObjectiveError(
            f"{path}: {len(ratios)} ratio columns (named {ratio_prefix}…) and {len(metrics)} metric columns; "
            "at least 2 and 1 are needed"
        )
    return frame[ratios], frame[metrics]


def _normalised(ratios: pd.DataFrame, path: Path) -> np.ndarray:
    values = ratios.to_numpy(dtype=np.float64)
    sums = values.sum(axis=1)
    off = np.flatnonzero(~(np.abs(sums - 1) <= 0.01) | (values < 0).any(axis=1))
    if len(off):
        raise ObjectiveError(f"{path}: run {off[0]} has shares that sum to {sums[off[0]]:g} or are negative")
    return values / sums[:, None]


@dataclass(frozen=True, kw_only=True)
class ProcessLoss:
    """The posterior mean of a Gaussian process with a length-scale per domain."""

    coordinates: Coordinates
    kernel: Kernel
    log_scales: np.ndarray
    """`(n_domains + 2,)`: logarithms of length-scales, signal variance, noise variance (on standardised losses)."""
    inputs: np.ndarray
    """`(n_runs, n_domains)` in units of the length-scales."""
    weights: np.ndarray
    """`(n_runs,)`: K⁻¹ y."""
    mean: float
    spread: float

    def __call__(self, ratios: np.ndarray) -> np.ndarray:
        points = _coordinates(ratios, self.coordinates) / np.exp(self.log_scales[:-2])
        covariance = np.exp(self.log_scales[-2]) * _correlation(squared_distances(points, self.inputs), self.kernel)[0]
        return self.mean + self.spread * covariance @ self.weights

    @classmethod
    def fit(
        cls,
        ratios: np.ndarray,
        losses: np.ndarray,
        coordinates: Coordinates,
        kernel: Kernel,
        log_scales: np.ndarray | None = None,
    ) -> "ProcessLoss":
        """Maximum a posteriori: log-normal(0, 1.5) on length-scales, none on the variances; or with given ones."""
        points, mean, spread = _coordinates(ratios, coordinates), float(losses.mean()), float(losses.std())
        values, n_domains = (losses - mean) / spread, ratios.shape[1]
        if log_scales is None:
            start = np.concatenate([np.zeros(n_domains), [0.0, math.log(0.05)]])
            bounds = [(-4.0, 4.0)] * n_domains + [(-3.0, 5.0), (-9.0, 1.0)]
            log_scales = minimize(
                misfit, start, args=(points, values, kernel), jac=True, method="L-BFGS-B", bounds=bounds,
                options={"maxiter": 100},
            ).x  # fmt: skip
        inputs = points / np.exp(log_scales[:-2])
        covariance = np.exp(log_scales[-2]) * _correlation(squared_distances(inputs, inputs), kernel)[0]
        covariance[np.diag_indices(len(values))] += np.exp(log_scales[-1])
        weights = cho_solve(cho_factor(covariance, lower=True), values)
        return cls(
            coordinates=coordinates, kernel=kernel, log_scales=log_scales, inputs=inputs, weights=weights,
            mean=mean, spread=spread,
        )  # fmt: skip


def misfit(log_scales: np.ndarray, points: np.ndarray, values: np.ndarray, kernel: Kernel) -> tuple[float, np.ndarray]:
    """The negative log posterior of `ProcessLoss.log_scales`, and its gradient."""
    inputs, signal, noise = points / np.exp(log_scales[:-2]), np.exp(log_scales[-2]), np.exp(log_scales[-1])
    correlation, slope = _correlation(squared_distances(inputs, inputs), kernel)
    covariance = signal * correlation
    covariance[np.diag_indices(len(values))] += noise
    factor = cho_factor(covariance, lower=True)
    inverse = cho_solve(factor, np.eye(len(values)))
    weights = inverse @ values
    value = 0.5 * values @ weights + np.log(np.diag(factor[0])).sum() + 0.5 * (log_scales[:-2] ** 2).sum() / 1.5**2
    outer = inverse - np.outer(weights, weights)
    sloped = signal * outer * slope
    # Σ_ij S_ij (z_i − z_j)² = 2 Σ_i (Σ_j S_ij) z_i² − 2 zᵀ S z, and a scale enters by −2 log ℓ times −½.
    by_scale = sloped.sum(axis=1) @ inputs**2 - np.einsum("id,id->d", inputs, sloped @ inputs)
    gradient = np.concatenate(
        [
            by_scale + log_scales[:-2] / 1.5**2,
            [0.5 * signal * (outer * correlation).sum(), 0.5 * noise * float(np.trace(outer))],
        ]
    )
    return float(value), gradient


def _coordinates(ratios: np.ndarray, coordinates: Coordinates) -> np.ndarray:
    if coordinates == "shares":
        return ratios
    return np.sqrt(ratios) if coordinates == "roots" else np.log(ratios + 0.01) / 3


def _correlation(squared: np.ndarray, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """The correlation, and −2 times its derivative by the squared distance."""
    if kernel == "se":
        correlation = np.exp(-0.5 * squared)
        return correlation, correlation
    distance = np.sqrt(5 * squared)
    decay = np.exp(-distance)
    return (1 + distance + distance**2 / 3) * decay, 5 / 3 * (1 + distance) * decay


@dataclass(frozen=True, kw_only=True)
class TreesLoss:
    """A sum of regression trees, as arrays: one ratio in a fraction of a millisecond, where scikit-learn takes ten."""

    feature: np.ndarray
    """`(n_trees, n_nodes)`; leaves lead to themselves."""
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray
    offset: float
    depth: int

    def __call__(self, ratios: np.ndarray) -> np.ndarray:
        n_trees, n_nodes = self.feature.shape
        first = np.arange(n_trees)[None] * n_nodes
        rows, at = np.arange(len(ratios))[:, None] * ratios.shape[1], np.broadcast_to(first, (len(ratios), n_trees))
        feature, threshold, left, right = (a.ravel() for a in (self.feature, self.threshold, self.left, self.right))
        flat = np.ascontiguousarray(ratios).ravel()
        for _ in range(self.depth):
            goes_left = flat.take(rows + feature.take(at)) <= threshold.take(at)
            at = first + np.where(goes_left, left.take(at), right.take(at))
        return self.offset + self.value.ravel().take(at).sum(axis=1)

    @classmethod
    def of_boosted(cls, model: HistGradientBoostingRegressor) -> "TreesLoss":
        trees = [
            (
                np.where(nodes["is_leaf"], 0, nodes["feature_idx"]),
                nodes["num_threshold"],
                np.where(nodes["is_leaf"], np.arange(len(nodes)), nodes["left"]),
                np.where(nodes["is_leaf"], np.arange(len(nodes)), nodes["right"]),
                nodes["value"],
                int(nodes["depth"].max()),
            )
            for nodes in (stage[0].nodes for stage in model._predictors)
        ]
        return cls._of(trees, float(np.ravel(model._baseline_prediction)[0]))

    @classmethod
    def of_randomised(cls, model: ExtraTreesRegressor) -> "TreesLoss":
        trees = []
        for tree in (one.tree_ for one in model.estimators_):
            leaf, own = tree.children_left < 0, np.arange(tree.node_count)
            left, right = np.where(leaf, own, tree.children_left), np.where(leaf, own, tree.children_right)
            values = tree.value[:, 0, 0] / len(model.estimators_)
            trees.append((np.where(leaf, 0, tree.feature), tree.threshold, left, right, values, tree.max_depth))
        return cls._of(trees, 0.0)

    @classmethod
    def _of(cls, trees: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]], offset: float) -> "TreesLoss":  # fmt: skip  # noqa: E501
        n_nodes = max(len(tree[0]) for tree in trees)
        feature, left, right = (np.zeros((len(trees), n_nodes), dtype=np.int64) for _ in range(3))
        threshold, value = (np.zeros((len(trees), n_nodes)) for _ in range(2))
        for index, tree in enumerate(trees):
            for kept, column in zip((feature, threshold, left, right, value), tree[:5], strict=True):
                kept[index, : len(column)] = column
        depth = max(tree[5] for tree in trees)
        return cls(
            feature=feature, threshold=threshold, left=left, right=right, value=value, offset=offset, depth=depth
        )


Surrogate = ProcessLoss | TreesLoss
Fit = Callable[[np.ndarray, np.ndarray], Surrogate]


def _boosted(ratios: np.ndarray, losses: np.ndarray) -> Surrogate:
    model = HistGradientBoostingRegressor(max_iter=300, learning_rate=0.05, max_leaf_nodes=8, random_state=0)
    return TreesLoss.of_boosted(model.fit(ratios, losses))


def _randomised(ratios: np.ndarray, losses: np.ndarray) -> Surrogate:
    model = ExtraTreesRegressor(300, min_samples_leaf=2, random_state=0)
    return TreesLoss.of_randomised(model.fit(ratios, losses))


def _process(coordinates: Coordinates, kernel: Kernel) -> Fit:
    return lambda ratios, losses: ProcessLoss.fit(ratios, losses, coordinates, kernel)


SURROGATES: dict[str, dict[str, Fit]] = {
    "gp": {
        f"{kernel} on {coordinates}": _process(coordinates, kernel)
        for coordinates in ("shares", "roots", "logs")
        for kernel in ("se", "matern")
    },
    "trees": {"boosted": _boosted, "randomised": _randomised},
}
"""Class of surrogate -> its members, of which cross-validation takes one."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A member of a class of surrogates, chosen by cross-validation."""

    member: str
    explained: float
    """R² out of fold."""
    residuals: np.ndarray
    """Out of fold, centred."""


def choose(members: Mapping[str, Fit], ratios: np.ndarray, losses: np.ndarray) -> Chosen:
    """The member with the smallest squared error in five folds."""
    best: Chosen | None = None
    for name, fit in members.items():
        predicted = np.empty_like(losses)
        for train, test in KFold(_FOLDS, shuffle=True, random_state=0).split(ratios):
            predicted[test] = fit(ratios[train], losses[train])(ratios[test])
        residuals = losses - predicted
        found = Chosen(member=name, explained=explained(losses, predicted), residuals=residuals - residuals.mean())
        if best is None or found.explained > best.explained:
            best = found
    assert best is not None
    return best


def explained(losses: np.ndarray, predicted: np.ndarray) -> float:
    """R²: 1 is perfect, 0 is as good as the mean."""
    return 1 - float(((losses - predicted) ** 2).mean() / losses.var())


def table_objectives(
    table: Table,
    metric: str,
    *,
    noise_fraction: float = 1.0,
    allow_poor: bool = False,
    cache: Path | None = None,
    classes: Sequence[str] = ("gp", "trees"),
) -> list[Objective]:
    """One objective per class of surrogate, with the same noise.

    Args:
        metric: see `Table.target`.
        noise_fraction: of the standard deviation of the better class's residuals.
        allow_poor: take surrogates that explain less than half of the variance.
        cache: a folder; which members were chosen, and the best ratios, are kept there.

    Raises:
        ObjectiveError: a surrogate is poor and `allow_poor` is not set.
    """
    losses, held_out = table.target(metric)
    key = hashlib.sha256(table.ratios.tobytes() + losses.tobytes() + b"1").hexdigest()[:12]
    file = None if cache is None else cache / f"surrogates-{key}.json"
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    chosen: dict[str, Chosen] = {}
    for name, members in SURROGATES.items():
        if name in kept:
            chosen[name] = Chosen(
                member=kept[name]["member"],
                explained=kept[name]["explained"],
                residuals=np.array(kept[name]["residuals"]),
            )
        else:
            chosen[name] = choose(members, table.ratios, losses)
            kept[name] = {**vars(chosen[name]), "residuals": chosen[name].residuals.tolist()}
    better = min(chosen, key=lambda name: chosen[name].residuals.std())
    residuals = chosen[better].residuals
    objectives = []
    for name in classes:
        if chosen[name].explained < _LEAST_EXPLAINED and not allow_poor:
            raise ObjectiveError(
                f"{metric}: the {name} surrogate explains {chosen[name].explained:.2f} of the variance out of fold, at "
                f"least {_LEAST_EXPLAINED} is asked for; use another table or metric, or --allow-poor"
            )
        surrogate = SURROGATES[name][chosen[name].member](table.ratios, losses)
        known = kept[name].get("best_ratio")
        objective = make(
            f"table:{metric}:{name}",
            table.ratios.shape[1],
            surrogate,
            noise=noise_fraction * float(residuals.std()),
            best_ratio=None if known is None else np.array(known),
            starts=table.ratios,
            residuals=residuals,
        )
        kept[name]["best_ratio"] = objective.best_ratio.tolist()
        outside = None
        if held_out is not None and table.held_out_ratios is not None:
            outside = explained(held_out, surrogate(table.held_out_ratios))
        facts = {
            "surrogate": chosen[name].member,
            "R2": chosen[name].explained,
            "R2 held out": outside,
            "noise from": f"{noise_fraction:g} of the {better} residuals",
            **_distances(table.ratios, objective.best_ratio),
        }
        objectives.append(replace(objective, facts=facts))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept), encoding="utf-8")
    return objectives


def _distances(ratios: np.ndarray, best: np.ndarray) -> dict[str, float]:
    """How far the best ratio is from the runs, and a run from the nearest other (median), Euclidean in shares."""
    among = np.sqrt(squared_distances(ratios, ratios))
    np.fill_diagonal(among, np.inf)
    return {
        "best to nearest run": float(np.sqrt(((ratios - best) ** 2).sum(axis=1)).min()),
        "run to nearest run": float(np.median(among.min(axis=1))),
    }
