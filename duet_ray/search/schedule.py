"""The factor on σ that the regret bound asks for: β_t of IGP-UCB (Chowdhury & Gopalan 2017, Theorem 2).

    β_t = B + R √(2 (γ_{t-1} + 1 + ln(1/δ)))

With probability 1 − δ the loss lies within β_t σ_{t-1} of μ_{t-1} at every ratio and every trial. DUET's Theorem 4.1 is
about a search with this factor; its experiments use a constant 0.5, which no theorem covers and which explores less.

The theorem's γ is the largest information that any t − 1 ratios could have given. Its proof needs less: the information
of the ratios that were tried, ½ log det(I + K / λ). That is never larger, and known exactly, so it stands here.

What is assumed, and cannot be checked from the data: the loss lies in the kernel's RKHS with a norm of at most B, the
kernel is known beforehand (ours is fitted) and the noise is R-sub-Gaussian (a normal law is with its standard
deviation; one that is cut off at c with c / 2 at most: `TruncatedExponential.subgaussian`).
"""

import math

import numpy as np

from duet_ray.errors import FeedbackError


def theory_beta(
    kernel: np.ndarray,
    noise_sd: float,
    rkhs_norm: float,
    delta: float,
    *,
    n_trials: int,
    model_noise: np.ndarray | float | None = None,
) -> float:
    """β_t after the trials that `kernel` is of.

    The theorem is about a posterior with λ = 1 + 2 / T in the place of the noise variance, however small the noise is.
    A model with another noise variance s² has another σ. For it the theorem holds after the observations are measured
    in units of s / √λ, trial by trial where s differs, and says (with the proof's 1 / √λ, rounded up to 1 above)

        β_t = B + max(R / s) √(2 (½ log det(I + S^-½ K S^-½) + 1 + ln(1/δ))),   S = diag(s²).

    Args:
        kernel: `(t - 1, t - 1)` K, the prior covariance of the loss at the ratios told; 1 on its diagonal.
        noise_sd: R, in the unit of the losses that the model sees (standardised). Where each trial has an R of its own,
            and the model's noise is in proportion to it, that of the least noisy trial.
        rkhs_norm: B, in the same unit.
        delta: within (0, 1).
        n_trials: T, all trials the study will tell.
        model_noise: s², one for all or `(t - 1,)`, of the model whose σ is to be multiplied; None: the theorem's λ.

    Raises:
        FeedbackError: an argument outside its range.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    n_told = len(kernel)
    if kernel.shape != (n_told, n_told):
        raise FeedbackError(f"a covariance has one row and one column a trial, got shape {kernel.shape}")
    if not (0 < delta < 1 and rkhs_norm > 0 and noise_sd >= 0 and n_trials >= 1):
        raise FeedbackError(
            "the schedule needs 0 < delta < 1 (search.delta), rkhs_norm > 0 (search.rkhs_norm), noise_sd >= 0 and "
            f"n_trials >= 1, got {delta}, {rkhs_norm}, {noise_sd} and {n_trials}"
        )
    variance = np.broadcast_to(np.asarray(1 + 2 / n_trials if model_noise is None else model_noise, float), n_told)
    if not np.all(variance > 0):
        raise FeedbackError("the noise variance of the model must be > 0 at every trial")
    unit = 1.0 if model_noise is None or not n_told else 1 / math.sqrt(variance.min())
    gained = information_gain(kernel, variance)
    return rkhs_norm + noise_sd * unit * math.sqrt(2 * (gained + 1 + math.log(1 / delta)))


def information_gain(kernel: np.ndarray, variance: np.ndarray) -> float:
    """½ log det(I + S^-½ K S^-½): what observations with noise variances `variance` say about the loss, in nats."""
    if not len(kernel):
        return 0.0
    scale = 1 / np.sqrt(variance)
    sign, log_det = np.linalg.slogdet(np.eye(len(kernel)) + kernel * scale[:, None] * scale[None, :])
    assert sign > 0, "I + K is positive definite for every covariance K"
    return 0.5 * float(log_det)
