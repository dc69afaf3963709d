"""Kernels over mixing ratios, by name, and leave-one-out in closed form.

What a domain does to a loss is steep near a share of 0 and flat further on: its tenth per cent matters more than its
fiftieth. A stationary kernel on the shares themselves knows one steepness for all. `compositional` therefore works on
square roots of the shares (Hellinger's distance), and has a linear term:

    φ_i(r) = √(r_i + δ) − √δ
    κ(r, r') = s² exp(−½ Σ_i (φ_i(r) − φ_i(r'))² / m_i²) + v ⟨φ(r) − φ(u), φ(r') − φ(u)⟩

u is the uniform ratio. δ = 1e-5, a tenth of a row in ten thousand, keeps the slope finite at a share of exactly 0;
logarithms would put a vertex at infinity. With the linear term few trials in many domains show a trend, where a
stationary kernel falls back to its mean a length-scale away from everything seen. The length-scales m_i are held near
a common one.

`se` (the paper's) and `matern` are fitted by maximum likelihood, `ard` and `compositional` by maximum a posteriori:
with ten to forty trials the likelihood alone takes noise for signal. Priors are normal on logarithms and scale with the
number of domains, after Hvarfner, Hellsten & Nardi 2024 ("Vanilla Bayesian Optimization Performs Great in High
Dimensions"): a length-scale is counted in typical distances between two ratios drawn uniformly, which shrink with n on
the simplex where they grow in a cube. Their widths are ours, narrower than in the paper.

Losses are expected standardised: mean 0, standard deviation 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from botorch.utils.constraints import LogTransformedInterval
from gpytorch.constraints import Interval
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from gpytorch.priors import LogNormalPrior, NormalPrior, Prior

from duet_ray.errors import ConfigError

LENGTH_SCALES = (0.05, 5.0)
"""Two ratios are at most √2 apart: with shorter scales no two are alike, with longer ones all are."""
OFFSET = 1e-5
"""δ: the slope of the square root at a share of 0 is 1 / (2 √δ) = 158."""
AUTO = ("compositional", "se", "matern")
"""What `auto` chooses from, the choice without enough trials first. `ard` fits the trials that would judge it."""

_NOISES = (1.1e-4, 1.0)
"""Noise variances that a fit may start from."""
_NOISE_PRIOR = (math.log(0.1), 1.5)
"""Mode and width of the logarithm of the noise variance."""


@dataclass(frozen=True)
class RatioModel:
    """A kernel over ratios, with what its fit needs."""

    kernel: Kernel
    """Reads the first `n_free` columns of its input."""
    noise_prior: Prior | None
    """For an inferred noise variance; None: maximum likelihood."""
    grid: tuple[Mapping[str, float], ...]
    """Values of the kernel's parameters that a fit may start from."""
    read: Callable[[], torch.Tensor]

    def length_scales(self) -> np.ndarray:
        """One, or one per column: in shares, or in the coordinates φ for `compositional`."""
        return self.read().detach().reshape(-1).numpy()

    def start(
        self,
        likelihood: Likelihood,
        points: np.ndarray,
        losses: np.ndarray,
        noise: np.ndarray | None,
    ) -> None:
        """Set the kernel and the noise to where a gradient search for the best hyperparameters should begin.

        The likelihood of a Gaussian process often has two peaks (all signal, all noise), and a gradient search ends on
        the one it starts near. So the peak is looked for on a grid first.

        Args:
            likelihood: gets the noise variance, unless the noise is known.
            points: `(n_told, n_free)` shares.
            losses: `(n_told,)` standardised.
            noise: `(n_told,)` known standard errors, or None.
        """
        values, variance = fit_start(self, points, losses, noise)
        self.kernel.initialize(**values)
        if noise is None:
            assert isinstance(likelihood, GaussianLikelihood)
            likelihood.initialize(noise=variance)


def ratio_model(name: str, n_free: int) -> RatioModel:
    """A new kernel, not fitted.

    Args:
        name: a name of `KERNELS`.
        n_free: how many domains the bounds leave free: the first columns of the input are their shares.

    Raises:
        ConfigError: there is no such kernel.
    """
    if name not in KERNELS:
        raise ConfigError(f"search.kernel: there is no kernel {name!r}; choose one of {', '.join(KERNELS)} or auto")
    return KERNELS[name](n_free)


def square_roots(shares: torch.Tensor) -> torch.Tensor:
    """φ: `(..., n)` shares to as many coordinates, 0 at a share of 0, with a finite slope there."""
    return torch.sqrt(shares.clamp_min(0) + OFFSET) - math.sqrt(OFFSET)


def typical_distance(n_domains: int, exponent: float = 1.0) -> float:
    """Root-mean-square distance between r^exponent and r'^exponent for ratios r, r' drawn uniformly.

    A share is then Beta(1, n − 1) distributed: E[r^a] = Γ(1 + a) Γ(n) / Γ(n + a). One domain has no distances: 1.
    """
    if n_domains == 1:
        return 1.0

    def moment(a: float) -> float:
        return math.exp(math.lgamma(1 + a) + math.lgamma(n_domains) - math.lgamma(n_domains + a))

    return math.sqrt(2 * n_domains * (moment(2 * exponent) - moment(exponent) ** 2))


class CompositionalKernel(Kernel):
    """The kernel of the module's docstring. Every parameter is a logarithm with a normal prior.

    `log_length_scale` is the common length-scale in typical distances, `log_relief` each domain's deviation from it,
    `log_signal` s², `log_linear` v (in units in which a ratio drawn uniformly has a trend of variance v).
    """

    has_lengthscale = False
    PRIORS: Mapping[str, tuple[float, float]] = {
        "log_length_scale": (math.log(3.0), 1.0),
        "log_relief": (0.0, 0.5),
        "log_signal": (0.0, 1.0),
        "log_linear": (0.0, 1.0),
    }
    """Mean and standard deviation; 0.5 lets two domains' length-scales differ by a factor of two without much ado."""

    def __init__(self, n_free: int) -> None:
        super().__init__(active_dims=tuple(range(n_free)))
        self.n_free = n_free
        self.distance = typical_distance(n_free, 0.5)
        for name, (mean, spread) in self.PRIORS.items():
            size = n_free if name == "log_relief" else 1
            self.register_parameter(name, torch.nn.Parameter(torch.full((size,), mean, dtype=torch.float64)))
            prior = NormalPrior(torch.tensor(mean, dtype=torch.float64), torch.tensor(spread, dtype=torch.float64))
            self.register_prior(f"{name}_prior", prior, name)

    @property
    def length_scales(self) -> torch.Tensor:
        """m: `(n_free,)`, in the coordinates φ."""
        return self.distance * (self.log_length_scale + self.log_relief).exp()

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, diag: bool = False, **params: Any) -> torch.Tensor:
        scales = self.length_scales
        first, second = square_roots(x1), square_roots(x2)
        squared = self.covar_dist(first / scales, second / scales, diag=diag, square_dist=True)
        uniform = square_roots(torch.full((self.n_free,), 1 / self.n_free, dtype=x1.dtype))
        unit = self.distance / math.sqrt(2)
        first, second = (first - uniform) / unit, (second - uniform) / unit
        inner = (first * second).sum(dim=-1) if diag else first @ second.transpose(-1, -2)
        return self.log_signal.exp() * torch.exp(-0.5 * squared) + self.log_linear.exp() * inner


def fit_start(
    model: RatioModel, points: np.ndarray, losses: np.ndarray, noise: np.ndarray | None
) -> tuple[Mapping[str, float], float]:
    """The largest posterior density of the hyperparameters on a grid: the kernel's parameters and the noise variance.

    The mean is at its best for each. One eigendecomposition per kernel serves every noise variance.

    Args:
        points: `(n_told, n_free)` shares.
        losses: `(n_told,)` standardised.
        noise: `(n_told,)` known standard errors, or None. If known, the variance returned means nothing.
    """
    shares = torch.from_numpy(np.ascontiguousarray(points))
    variances = [0.0] if noise is not None else np.geomspace(*_NOISES, 9).tolist()
    peak, found = -np.inf, (model.grid[0], float(np.exp(_NOISE_PRIOR[0])))
    for values in model.grid:
        model.kernel.initialize(**values)
        with torch.no_grad():
            kernel = model.kernel(shares).to_dense().numpy()
            prior = _log_prior(model.kernel)
        if noise is not None:
            kernel = kernel + np.diag(np.maximum(noise**2, _NOISES[0]))
        spectrum, basis = np.linalg.eigh(kernel)
        ones, rotated = basis.T @ np.ones(len(losses)), basis.T @ losses
        for variance in variances:
            total = np.maximum(spectrum, 0) + max(variance, 1e-10)
            mean = (ones * rotated / total).sum() / (ones * ones / total).sum()
            density = prior - 0.5 * (np.log(total).sum() + ((rotated - mean * ones) ** 2 / total).sum())
            if noise is None and model.noise_prior is not None:
                density += float(model.noise_prior.log_prob(torch.tensor(variance)))
            if density > peak:
                peak, found = density, (values, float(variance))
    return found


def leave_one_out(kernel: np.ndarray, losses: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a Gaussian process predicts of every observation from the others, in closed form.

    Rasmussen & Williams 2006, Sec. 5.4.2, with an unknown constant mean, estimated anew without the one left out
    (Dubrule 1983): with P = K⁻¹ − K⁻¹11ᵀK⁻¹ / 1ᵀK⁻¹1, the residual is [P y]_i / P_ii and the variance 1 / P_ii.

    Args:
        kernel: `(n, n)` prior covariance of the noiseless losses; hyperparameters are not fitted again.
        losses: `(n,)`, at least two.
        noise: `(n,)` noise variances, > 0.

    Returns:
        means and standard deviations, `(n,)` each; a standard deviation counts the noise of the one left out.
    """
    inverse = np.linalg.inv(kernel + np.diag(np.broadcast_to(noise, (len(losses),))))
    row = inverse.sum(axis=1)
    projected = inverse - np.outer(row, row) / row.sum()
    precision = np.maximum(np.diag(projected), 1e-12)
    return losses - projected @ losses / precision, 1 / np.sqrt(precision)


def leave_one_out_log_likelihood(kernel: np.ndarray, losses: np.ndarray, noise: np.ndarray) -> float:
    """The sum of the logarithms of the predictive densities of `leave_one_out` at the losses left out."""
    mean, sd = leave_one_out(kernel, losses, noise)
    return float(-0.5 * (np.log(2 * np.pi * sd**2) + ((losses - mean) / sd) ** 2).sum())


def _se(n_free: int) -> RatioModel:
    # transform=None: L-BFGS-B gets the interval as its bounds, instead of a sigmoid with flat ends.
    interval = Interval(*LENGTH_SCALES, transform=None, initial_value=0.5)
    kernel = RBFKernel(active_dims=tuple(range(n_free)), lengthscale_constraint=interval)
    return RatioModel(kernel, None, _isotropic_grid(), lambda: kernel.lengthscale)


def _matern(n_free: int) -> RatioModel:
    interval = Interval(*LENGTH_SCALES, transform=None, initial_value=0.5)
    kernel = MaternKernel(nu=2.5, active_dims=tuple(range(n_free)), lengthscale_constraint=interval)
    return RatioModel(kernel, None, _isotropic_grid(), lambda: kernel.lengthscale)


def _ard(n_free: int) -> RatioModel:
    typical = math.log(5 * typical_distance(n_free))
    kernel = RBFKernel(
        ard_num_dims=n_free,
        active_dims=tuple(range(n_free)),
        lengthscale_constraint=LogTransformedInterval(0.01, 100.0, initial_value=math.exp(typical)),
        lengthscale_prior=_log_normal(typical, 1.0),
    )
    return RatioModel(kernel, _log_normal(*_NOISE_PRIOR), _isotropic_grid(), lambda: kernel.lengthscale)


def _compositional(n_free: int) -> RatioModel:
    kernel = CompositionalKernel(n_free)
    grid: list[Mapping[str, float]] = [
        {"log_length_scale": math.log(scale), "log_linear": math.log(linear), "log_signal": math.log(signal)}
        for scale, linear, signal in product((0.5, 1.0, 2.0, 4.0, 8.0), (0.1, 1.0), (0.3, 1.0, 3.0))
    ]
    return RatioModel(kernel, _log_normal(*_NOISE_PRIOR), tuple(grid), lambda: kernel.length_scales)


KERNELS: Mapping[str, Callable[[int], RatioModel]] = {
    "se": _se,
    "matern": _matern,
    "ard": _ard,
    "compositional": _compositional,
}
"""Name → builder, which gets the number of free domains."""


def _isotropic_grid() -> tuple[Mapping[str, float], ...]:
    low, high = LENGTH_SCALES
    return tuple({"lengthscale": float(scale)} for scale in np.geomspace(low * 1.1, high / 1.1, 15))


def _log_normal(mode: float, width: float) -> Prior:
    """A prior under which, seen in logarithms, the most likely value is `mode`.

    A log-normal density has its maximum at exp(μ − σ²).
    """
    prior = LogNormalPrior(mode + width**2, width)
    return prior.double()


def _log_prior(kernel: Kernel) -> float:
    return float(sum(prior.log_prob(read(module)).sum() for _, module, prior, read, _ in kernel.named_priors()))
