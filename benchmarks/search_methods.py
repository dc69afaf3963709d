"""The searches that `search_efficiency.py` compares: ours, and what people use.

Each proposes the next ratio from what it was told (`ask`), and names the ratio that it would hand over (`recommend`),
by its own rule: ours its model's optimum among the ratios trained, RegMix its regression's, all others the best value
observed, which is what those libraries report. All begin at the uniform ratio, which every study measures first; a
library that takes given points is given it as its own first trial.

| name | what | the form it searches |
|---|---|---|
| `ours` and variants | `duet_ray.search.Proposer` with settings of the study file's `search` section | the simplex |
| `random` | Dirichlet(1): uniform on the simplex | the simplex |
| `sobol` | our start design, going on: scrambled Sobol points on the simplex | the simplex |
| `tpe`, `optuna-gp`, `cmaes` | Optuna's samplers with their default settings | see `FORMS` |
| `ax` | Ax's client with its default strategy | n − 1 shares that sum to at most 1 |
| `public` | the loop of DUET's public code, with its thresholding | the simplex |
| `regmix` | RegMix: sparse random ratios for the whole budget, then a regression (Liu et al. 2024) | the simplex |

Optuna has no simplex. Its samplers take one of `FORMS`; which is best for whom was measured (`FORM_OF`), and any may be
asked for by name: `tpe@softmax`. Optuna, cmaes and LightGBM are no dependencies of the project: `pip install optuna
cmaes lightgbm`.
"""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import yaml
from search_objectives import ratio_of_unit, unit_of_ratio

from duet_ray.config import SearchConfig
from duet_ray.errors import DuetError
from duet_ray.records import Ratio
from duet_ray.search import Proposer, SimplexSpace, Told
from duet_ray.search.recommend import recommend
from duet_ray.search.simplex import start_stream


class MethodError(DuetError):
    """A method is unknown, or its package is not installed."""


class Method(Protocol):
    """One search, in one run."""

    def ask(self, told: Sequence[Told]) -> Ratio:
        """The next ratio. Called once per trial, with one observation more each time; the first is the uniform one."""
        ...

    def recommend(self, told: Sequence[Told]) -> Ratio:
        """The ratio to hand over if the search ended now."""
        ...


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """Which method, and its settings: enough to make it anywhere."""

    name: str
    """As in tables."""
    kind: str
    """A key of `METHODS`."""
    settings: str = ""
    """For `ours`: `key=value,…` of the study file's `search` section; for Optuna: a form."""

    def make(self, space: SimplexSpace, seed: int, n_trials: int) -> Method:
        return METHODS[self.kind](space, seed, n_trials, self.settings)


def best_observed(told: Sequence[Told]) -> Ratio:
    """The ratio of the lowest observation: the luckiest one, where there is noise."""
    return min(told, key=lambda one: one.loss).ratio


class Ours:
    """The project's search."""

    def __init__(self, space: SimplexSpace, seed: int, n_trials: int, settings: str) -> None:
        self.space, self.seed = space, seed
        self.settings = search_settings(settings, n_trials)
        self.proposer = Proposer(space, self.settings, seed)

    def ask(self, told: Sequence[Told]) -> Ratio:
        return self.proposer.propose(len(told), told, []).ratio

    def recommend(self, told: Sequence[Told]) -> Ratio:
        return recommend(self.proposer, told).ratio


def search_settings(text: str, n_trials: int) -> SearchConfig:
    """`"acquisition=lcb,n_start=8"` as the settings of a study with so many trials in all.

    Values are read as YAML, and commas within brackets do not separate.

    Raises:
        MethodError: no `key=value`.
    """
    values: dict[str, Any] = {}
    for part in _split_outside_brackets(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise MethodError(f"settings of ours are key=value, separated by commas; got {part!r} in {text!r}")
        values[key.strip()] = yaml.safe_load(value)
    n_start = int(values.get("n_start", SearchConfig().n_start))
    return SearchConfig(**{"n_trials": max(0, n_trials - n_start), **values})


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


class RandomSearch:
    """Uniform draws on the simplex."""

    def __init__(self, space: SimplexSpace, seed: int, n_trials: int, settings: str) -> None:
        self.space, self.random = space, np.random.default_rng([1, seed])

    def ask(self, told: Sequence[Told]) -> Ratio:
        return self.space.project(self.random.dirichlet(np.ones(self.space.n_domains)))

    def recommend(self, told: Sequence[Told]) -> Ratio:
        return best_observed(told)


class SobolSearch:
    """The project's start design alone."""

    def __init__(self, space: SimplexSpace, seed: int, n_trials: int, settings: str) -> None:
        self.ratios = [ratio for _, ratio in islice(start_stream(space, seed, False), n_trials)]

    def ask(self, told: Sequence[Told]) -> Ratio:
        return self.ratios[len(told)]

    def recommend(self, told: Sequence[Told]) -> Ratio:
        return best_observed(told)


@dataclass(frozen=True, kw_only=True)
class Form:
    """The simplex as independent parameters."""

    n_parameters: Callable[[int], int]
    bounds: tuple[float, float]
    ratio: Callable[[np.ndarray], np.ndarray]
    uniform: Callable[[int], np.ndarray]
    """The parameters of the uniform ratio."""


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def _exponential(units: np.ndarray) -> np.ndarray:
    gaps = -np.log(np.clip(units, 1e-12, 1 - 1e-12))
    return gaps / gaps.sum()


FORMS: dict[str, Form] = {
    # As in Yen et al. 2025: logits in [-3, 3]; a share is at most e⁶ times another.
    "softmax": Form(n_parameters=lambda n: n, bounds=(-3.0, 3.0), ratio=_softmax, uniform=np.zeros),
    # As Optuna's documentation draws from a Dirichlet law.
    "exponential": Form(
        n_parameters=lambda n: n, bounds=(0.0, 1.0), ratio=_exponential, uniform=lambda n: np.full(n, np.exp(-1.0))
    ),
    # n − 1 parameters: the simplex broken stick by stick, with quantiles that make uniform parameters uniform ratios.
    "sticks": Form(
        n_parameters=lambda n: n - 1,
        bounds=(0.0, 1.0),
        ratio=lambda units: ratio_of_unit(units[None])[0],
        uniform=lambda n: unit_of_ratio(np.full((1, n), 1 / n))[0],
    ),
    # n − 1 parameters: the gaps between them, sorted.
    "sorted": Form(
        n_parameters=lambda n: n - 1,
        bounds=(0.0, 1.0),
        ratio=lambda units: np.diff(np.concatenate([[0.0], np.sort(units), [1.0]])),
        uniform=lambda n: np.arange(1, n) / n,
    ),
}

FORM_OF = {"tpe": "softmax", "optuna-gp": "softmax", "cmaes": "softmax"}
"""The form that each of Optuna's samplers does best with: of all four on nine objectives with 10 seeds (`tpe` and
`cmaes`); of softmax, exponential and sorted on four objectives with one seed (`optuna-gp`)."""


class OptunaSearch:
    """One of Optuna's samplers, by ask and tell."""

    def __init__(self, sampler: str, space: SimplexSpace, seed: int, form: str) -> None:
        if form not in FORMS:
            raise MethodError(f"{sampler}@{form}: the form must be one of {', '.join(FORMS)}")
        optuna = _package("optuna")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        self.space, self.form = space, FORMS[form]
        self.names = [f"x{i}" for i in range(self.form.n_parameters(space.n_domains))]
        uniform = dict(zip(self.names, map(float, self.form.uniform(space.n_domains)), strict=True))
        if sampler == "tpe":
            chosen = optuna.samplers.TPESampler(seed=seed)
        elif sampler == "optuna-gp":
            chosen = optuna.samplers.GPSampler(seed=seed)
        else:
            _package("cmaes")
            chosen = optuna.samplers.CmaEsSampler(seed=seed, x0=uniform)
        self.study = optuna.create_study(sampler=chosen)
        self.study.enqueue_trial(uniform)
        self.trial, _ = self._next()

    def ask(self, told: Sequence[Told]) -> Ratio:
        self.study.tell(self.trial, told[-1].loss)
        self.trial, ratio = self._next()
        return ratio

    def recommend(self, told: Sequence[Told]) -> Ratio:
        return best_observed(told)

    def _next(self) -> tuple[Any, Ratio]:
        trial = self.study.ask()
        values = np.array([trial.suggest_float(name, *self.form.bounds) for name in self.names])
        return trial, self.space.project(self.form.ratio(values))


class AxSearch:
    """Ax's client as its tutorials use it: n − 1 shares with an inequality, the last domain takes the rest."""

    def __init__(self, space: SimplexSpace, seed: int, n_trials: int, settings: str) -> None:
        logging.getLogger("ax").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"ax\.|botorch\.|gpytorch\.|linear_operator\.")
        client_module, configs = _package("ax.api.client"), _package("ax.api.configs")
        self.space = space
        self.names = [f"d{i}" for i in range(space.n_domains - 1)]
        self.client = client_module.Client(random_seed=seed)
        self.client.configure_experiment(
            parameters=[
                configs.RangeParameterConfig(name=name, parameter_type="float", bounds=(0.0, 1.0))
                for name in self.names
            ],
            parameter_constraints=[f"{' + '.join(self.names)} <= 1"],
        )
        self.client.configure_optimization("-loss")
        self.trial = self.client.attach_trial(dict.fromkeys(self.names, 1 / space.n_domains))

    def ask(self, told: Sequence[Told]) -> Ratio:
        self.client.complete_trial(self.trial, {"loss": told[-1].loss})
        ((self.trial, values),) = self.client.get_next_trials(1).items()
        shares = np.array([float(values[name]) for name in self.names])
        return self.space.project(np.append(shares, max(0.0, 1 - shares.sum())))

    def recommend(self, told: Sequence[Told]) -> Ratio:
        return best_observed(told)


class PublicLoop:
    """The loop of DUET's public code: the default process of the installed BoTorch, UCB with `beta=0.5` (√0.5 of σ),
    20 starts of 50 draws, from the uniform ratio on. Shares below 0.05 become 0, and what the process is told is not
    renormalised. Where the uniform share itself is below that, the code's other threshold, 0.01, is taken.

    The 50 draws are made here, by the same law as BoTorch's hit-and-run on the simplex: that halves its time.
    """

    def __init__(self, space: SimplexSpace, seed: int, n_trials: int, settings: str) -> None:
        n = space.n_domains
        self.space, self.seed, self.random = space, seed, np.random.default_rng([6, seed])
        self.threshold = 0.05 if 1 / n > 0.05 else 0.01
        self.inputs = [np.full(n, 1 / n)]

    def ask(self, told: Sequence[Told]) -> Ratio:
        import torch
        from botorch.acquisition import UpperConfidenceBound
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from botorch.models.transforms.outcome import Standardize
        from botorch.optim import optimize_acqf
        from botorch.optim.initializers import initialize_q_batch
        from gpytorch.mlls import ExactMarginalLogLikelihood

        n = self.space.n_domains
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(self.seed * 1000 + len(told))
            model = SingleTaskGP(
                torch.tensor(np.array(self.inputs)),
                -torch.tensor([[one.loss] for one in told], dtype=torch.double),
                outcome_transform=Standardize(m=1),
            )
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            bound = UpperConfidenceBound(model, beta=0.5)
            drawn = torch.tensor(self.random.dirichlet(np.ones(n), 50)).unsqueeze(1)
            with torch.no_grad():
                starts, _ = initialize_q_batch(drawn, bound(drawn), 20)
            candidate, _ = optimize_acqf(
                bound,
                bounds=torch.stack([torch.zeros(n, dtype=torch.double), torch.ones(n, dtype=torch.double)]),
                q=1,
                num_restarts=20,
                batch_initial_conditions=starts,
                equality_constraints=[(torch.arange(n), torch.ones(n, dtype=torch.double), 1.0)],
            )
        shares = candidate[0].detach().numpy()
        shares = np.where(shares >= self.threshold, shares, 0.0)
        self.inputs.append(shares)
        # Rows are drawn for each share on its own, so the ratio trained is the renormalised one.
        return self.space.project(shares / shares.sum() if shares.sum() > 0 else np.full(n, 1 / n))

    def recommend(self, told: Sequence[Told]) -> Ratio:
        return best_observed(told)


class RegMixSearch:
    """RegMix: Dirichlet(prior · s) with s log-spaced in [0.1, 5] and a uniform prior; a LightGBM regression (1,000
    trees, rate 0.01); 100,000 simulated ratios from the same law, and the mean of the best 128.

    The published regression keeps at least 20 runs a leaf, which forbids any split with the few runs of a search:
    a tenth of the runs, at least 2, is more than fair to it. Before the end of the budget a fifth of the ratios are
    simulated and a fifth of the best averaged.
    """

    n_simulated, n_best = 100_000, 128

    def __init__(self, space: SimplexSpace, seed: int, n_trials: int, settings: str) -> None:
        _package("lightgbm")
        self.space, self.random, self.seed, self.n_trials = space, np.random.default_rng([2, seed]), seed, n_trials
        self.simulated = self._draw(np.random.default_rng([3, seed]), self.n_simulated)

    def ask(self, told: Sequence[Told]) -> Ratio:
        return self.space.project(self._draw(self.random, 1)[0])

    def recommend(self, told: Sequence[Told]) -> Ratio:
        lightgbm = _package("lightgbm")
        model = lightgbm.LGBMRegressor(
            n_estimators=1000,
            learning_rate=0.01,
            min_child_samples=max(2, min(20, len(told) // 10)),
            n_jobs=1,
            random_state=self.seed,
            verbosity=-1,
        )
        model.fit(np.stack([one.ratio.values for one in told]), np.array([one.loss for one in told]))
        part = 1 if len(told) >= self.n_trials else 5
        simulated = self.simulated[: len(self.simulated) // part]
        predicted = model.booster_.predict(simulated, num_threads=1)
        best = np.argsort(predicted, kind="stable")[: self.n_best // part]
        return self.space.project(simulated[best].mean(axis=0))

    def _draw(self, random: np.random.Generator, n_ratios: int) -> np.ndarray:
        strength = np.exp(random.uniform(np.log(0.1), np.log(5.0), (n_ratios, 1)))
        # Tiny shapes underflow to 0 in every domain: then one domain alone, which is the law's limit.
        gammas = random.standard_gamma(np.repeat(strength / self.space.n_domains, self.space.n_domains, axis=1))
        empty = gammas.sum(axis=1) <= 0
        gammas[empty] = np.eye(self.space.n_domains)[random.integers(self.space.n_domains, size=int(empty.sum()))]
        return gammas / gammas.sum(axis=1, keepdims=True)


def _optuna(sampler: str) -> Callable[[SimplexSpace, int, int, str], Method]:
    return lambda space, seed, n_trials, settings: OptunaSearch(sampler, space, seed, settings or FORM_OF[sampler])


METHODS: dict[str, Callable[[SimplexSpace, int, int, str], Method]] = {
    "ours": Ours,
    "random": RandomSearch,
    "sobol": SobolSearch,
    "tpe": _optuna("tpe"),
    "optuna-gp": _optuna("optuna-gp"),
    "cmaes": _optuna("cmaes"),
    "ax": AxSearch,
    "public": PublicLoop,
    "regmix": RegMixSearch,
}

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "tpe": ("optuna",),
    "optuna-gp": ("optuna",),
    "cmaes": ("optuna", "cmaes"),
    "regmix": ("lightgbm",),
}
"""What a peer needs beyond the project's dependencies."""


def missing_packages(kind: str) -> list[str]:
    """The packages that are not installed for a method."""
    return [name for name in PACKAGES.get(kind, ()) if importlib.util.find_spec(name) is None]


def specs(names: Sequence[str], ours: Sequence[str]) -> list[MethodSpec]:
    """Methods by name, and variants of ours.

    Args:
        names: of `METHODS`; Optuna's may carry a form: `tpe@sticks`.
        ours: `name:key=value,…`.

    Raises:
        MethodError: unknown names or two methods of one name.
    """
    found = []
    for text in names:
        kind, _, form = text.partition("@")
        if kind not in METHODS or (form and kind not in FORM_OF):
            raise MethodError(
                f"method {text!r}: must be one of {', '.join(METHODS)}; forms are for {', '.join(FORM_OF)}"
            )
        if form and form not in FORMS:
            raise MethodError(f"method {text!r}: the form must be one of {', '.join(FORMS)}")
        found.append(MethodSpec(name=text, kind=kind, settings=form or FORM_OF.get(kind, "")))
    for text in ours:
        name, colon, settings = text.partition(":")
        if not colon:
            raise MethodError(f"--ours {text!r}: must be NAME:key=value,…")
        search_settings(settings, 40)  # a mistake shows now
        found.append(MethodSpec(name=name, kind="ours", settings=settings))
    names_seen = [spec.name for spec in found]
    if twice := {name for name in names_seen if names_seen.count(name) > 1}:
        raise MethodError(f"two methods of one name: {', '.join(sorted(twice))}")
    return found


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.partition(".")[0]
        raise MethodError(f"{root} is not installed; pip install {root}") from error
