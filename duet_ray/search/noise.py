"""What the k samples of every trial say about the noise, before the model sees it (DUET, Theorem 3.2).

Two things are wrong with taking the least of k as it is. Its noise depends on k, and the least of 4 is lower than the
least of 2 at the same ratio, so that a search with unequal k prefers where it looked more often. `told_noise` puts the
observations on one footing:

- `inferred`: no law of the samples is assumed. Where k differs, every observation becomes what the least of as many of
  its values as most trials have is on average (`theory.minimum_weights`); one with fewer values is lowered by what the
  other trials show. The model infers one noise for all.
- `theory`: the law of Theorem 3.2 is fitted to the differences within trials, and tested. Where it is tenable every
  observation is given the law's standard deviation for its own k, and its mean is corrected by the law's. Where it is
  not, or cannot be fitted, the above is done, and the note says why.

Both take the law to be the same at every ratio up to its shift. A test with few values refuses little: with 16 trials
of 4 even a normal law passes nearly always. `benchmarks/noise_law.py` shows what each is worth when the law is true,
and when it is not; the second gains nothing that can be told from chance, and is off by default. With known noise the
acquisition likes to look again at the best ratio so far; keep it from that, as with inferred noise.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from duet_ray.search.told import Told
from duet_ray.theory import TheoryError, TruncatedExponential, fit_spacings, goodness_of_fit, minimum_weights

N_BOOTSTRAP = 39
"""Of the test, at every proposal; 39 is enough for the 5 % level, and costs 0.4 s at 60 trials of 4 samples."""
FEWEST_TRIALS = 3
"""Trials with k values that it takes to say how far the least of fewer is above the least of k."""
FEWEST_DIFFERENCES = 8
"""Differences within trials that a fit needs: with fewer, λ is uncertain by more than a factor of about 2."""


@dataclass(frozen=True, kw_only=True)
class ToldNoise:
    """Observations that can be compared with one another."""

    told: tuple[Told, ...]
    """In the order given."""
    law: TruncatedExponential | None
    """The law that was used, of whole trials (fidelity 1); None where noise is left to the model."""
    k: int | None
    """Every loss is on the footing of the least of k; None where that could not be reached."""
    note: str
    """What was done, and why not more; empty where nothing had to be done."""


def told_noise(told: Sequence[Told], noise: Literal["inferred", "theory"], *, seed: int = 0) -> ToldNoise:
    """Put observations on one footing, and give them the noise of Theorem 3.2 where that is asked for and tenable.

    Trials of different fidelity have laws of their own; if one of these is not tenable, none is used. An observation
    from elsewhere (a past run: one value, k = 1) is taken to have the same law. Standard errors that are told already,
    for every observation, are kept.

    Args:
        told: in any order; the result does not depend on it.
        noise: `search.noise`.
        seed: of the test's bootstrap.
    """
    if noise == "inferred" or not told:
        return expected_minima(told)
    if all(one.sem is not None for one in told):
        return _said(expected_minima(told), "search.noise: theory is not needed: the feedback tells its standard error")
    laws: dict[float, TruncatedExponential] = {}
    reports = []
    for fidelity, groups in sorted(_groups(told).items()):
        whose = "" if fidelity == 1 else f" (fidelity {fidelity:g})"
        try:
            laws[fidelity], report = _tenable_law(groups, seed)
        except TheoryError as error:
            return _said(expected_minima(told), f"noise is inferred, not from the law of Theorem 3.2{whose}: {error}")
        reports.append(report + whose)
    done = with_laws(told, laws)
    n_alone = sum(one.k_used == 1 for one in told)
    alone = f"; {n_alone} trials with one value are taken to have it too" if n_alone else ""
    return _said(done, f"noise by the law {'; '.join(reports)}{alone}")


def with_laws(told: Sequence[Told], laws: Mapping[float, TruncatedExponential]) -> ToldNoise:
    """Give every observation its law's standard deviation for its own k, and the mean it would have had with the k that
    most trials have: of equally frequent ones the larger.

    Args:
        told: at least one.
        laws: fidelity → law, for every fidelity of `told`.
    """
    k = most_common_k(told)
    kinds = {(one.fidelity, one.k_used) for one in told}
    bias = {(fidelity, size): laws[fidelity].mean(size) - laws[fidelity].mean(k) for fidelity, size in kinds}
    noise = {(fidelity, size): laws[fidelity].std(size) for fidelity, size in kinds}
    corrected = tuple(
        replace(one, loss=one.loss - bias[one.fidelity, one.k_used], sem=noise[one.fidelity, one.k_used])
        for one in told
    )
    return ToldNoise(told=corrected, law=laws.get(1.0), k=k, note="")


def expected_minima(told: Sequence[Told], k: int | None = None) -> ToldNoise:
    """Every loss as the mean of the least of k, over all choices of k of the trial's values; no law is assumed.

    The mean over all subsets is the U-statistic of the minimum: unbiased for E[min of k], and of all such estimates the
    one with the least variance (Hoeffding 1948). A trial with fewer values, j, is lowered by what the least of k is
    below the least of j on average in the trials that have k values: there the law is taken to be the same at every
    ratio up to its shift.

    Args:
        told: only observations whose `samples` are known can be raised, to a smaller k.
        k: None: what most trials have.

    Returns:
        with `k` None if some observations stay as they are: they have more values, which are not known, or fewer, and
        fewer than `FEWEST_TRIALS` trials show by how much to lower them.
    """
    if not told:
        return ToldNoise(told=(), law=None, k=k, note="")
    wanted = most_common_k(told) if k is None else k
    if all(one.k_used == wanted for one in told):
        return ToldNoise(told=tuple(told), law=None, k=wanted, note="")
    full = sorted(tuple(sorted(one.samples)) for one in told if len(one.samples) == one.k_used >= wanted)
    changed, n_lowered, n_left = [], 0, 0
    for one in told:
        loss = one.loss
        if len(one.samples) == one.k_used > wanted:
            loss = _least(one.samples, wanted)
        elif one.k_used < wanted and len(full) >= FEWEST_TRIALS:
            loss -= float(np.mean([_least(values, one.k_used) - _least(values, wanted) for values in full]))
            n_lowered += 1
        elif one.k_used != wanted:
            n_left += 1
        changed.append(replace(one, loss=loss))
    name = "the mean of its samples" if wanted == 1 else f"the expected least of {wanted} of its samples"
    note = f"numbers of samples differ: each trial counts with {name}"
    if n_lowered:
        note += f"; {n_lowered} with fewer are lowered as the {len(full)} with {wanted} or more show"
    if n_left:
        note += f"; {n_left} stay as they are: {FEWEST_TRIALS} trials with {wanted} known samples would be needed"
    return ToldNoise(told=tuple(changed), law=None, k=None if n_left else wanted, note=note)


def most_common_k(told: Sequence[Told]) -> int:
    """The number of samples that most trials have; of equally frequent ones the larger."""
    counts = Counter(one.k_used for one in told)
    return max(counts, key=lambda k: (counts[k], k))


def _least(values: Sequence[float], k: int) -> float:
    return float(minimum_weights(len(values), k) @ np.sort(values))


def _groups(told: Sequence[Told]) -> dict[float, list[tuple[float, ...]]]:
    """Fidelity → the values of its trials, sorted: sums and bootstrap must not depend on who finished first."""
    found: dict[float, list[tuple[float, ...]]] = defaultdict(list)
    for one in told:
        found[one.fidelity].append(tuple(sorted(one.samples)) or (one.loss,))
    return {fidelity: sorted(groups) for fidelity, groups in found.items()}


def _tenable_law(groups: Sequence[Sequence[float]], seed: int) -> tuple[TruncatedExponential, str]:
    n_differences = sum(len(values) - 1 for values in groups)
    if 0 < n_differences < FEWEST_DIFFERENCES:
        raise TheoryError(f"{n_differences} differences within trials are too few, it needs {FEWEST_DIFFERENCES}")
    fit = fit_spacings(groups, intervals=False)
    goodness = goodness_of_fit(groups, fit, n_bootstrap=N_BOOTSTRAP, seed=seed, stop_when_tenable=True)
    found = (
        f"λ = {fit.law.rate:.3g}, c = {fit.law.cut:.3g}, p {'>' if goodness.tenable else '='} {goodness.p_value:.2g}"
    )
    if not goodness.tenable:
        raise TheoryError(f"the samples refuse it ({found})")
    return fit.law, found


def _said(done: ToldNoise, note: str) -> ToldNoise:
    return replace(done, note="; ".join(part for part in (note, done.note) if part))
