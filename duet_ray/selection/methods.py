"""Every selection method by name: where it lives, what it needs, and which settings its result depends on.

The settings are what a stored result is fingerprinted by: a change of any other one does not score a domain again.
"""

import math
from dataclasses import dataclass
from importlib import import_module

from duet_ray.config import SelectionConfig, StudyConfig
from duet_ray.errors import ConfigError, Problem
from duet_ray.selection.base import Selector


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is known of a method without importing it."""

    home: str
    """`"module:Class"`, imported on use."""
    needs_model: bool = True
    """Whether it must run where a model is (a worker), or may run in the driver."""
    needs_validation: bool = True
    """Whether it compares with the domain's validation rows."""
    fits: bool = True
    """Whether it fine-tunes a model on the domain, so that `training` has a say."""
    gives: str = "scores"
    """`scores`: raw scores that a weighting turns into probabilities or an order; `order`; or `probabilities`."""
    scores_of: str | None = None
    """The method whose scores it uses: they share what is stored."""
    settings: tuple[str, ...] = ()
    """Keys of `selection` that its result depends on, beside those of the weighting."""


_FIT = ("n_fit_rows", "target_modules", "surrogate")
_HESSIAN = ("solver", "damping", "n_hessian_rows")
_INFLUENCE = (*_FIT, *_HESSIAN, "n_exact_rows")
_SOLVERS = {
    "ekfac": (),
    "cg": ("curvature", "cg_iterations", "cg_tolerance"),
    "lissa": ("curvature", "lissa_depth", "lissa_scale"),
}

METHODS: dict[str, Method] = {
    "uniform": Method(
        home="duet_ray.selection.uniform:Uniform",
        needs_model=False,
        needs_validation=False,
        fits=False,
        gives="probabilities",
    ),
    "influence": Method(home="duet_ray.selection.influence:Influence", settings=_INFLUENCE),
    "remove_harmful": Method(
        home="duet_ray.selection.remove_harmful:RemoveHarmful", scores_of="influence", settings=_INFLUENCE
    ),
    "top_n": Method(home="duet_ray.selection.top_n:TopN", scores_of="influence", settings=_INFLUENCE),
    "less": Method(home="duet_ray.selection.less:Less", settings=(*_FIT, "projection", "n_exact_rows")),
    "tracin": Method(home="duet_ray.selection.tracin:TracIn", settings=(*_FIT, "projection", "n_exact_rows")),
    "logdet": Method(
        home="duet_ray.selection.logdet:LogDet",
        needs_validation=False,
        fits=False,
        gives="order",
        settings=("embedding_model", "pool"),
    ),
    "coreset": Method(
        home="duet_ray.selection.coreset:Coreset",
        needs_validation=False,
        fits=False,
        gives="order",
        settings=("embedding_model", "pool"),
    ),
    "indicators": Method(
        home="duet_ray.selection.indicators:Indicators",
        fits=False,
        settings=("indicators", "n_prompts", "n_demonstrations", "examples", "embedding_model", "surrogate"),
    ),
}
"""`selection.method` → the method."""


def method_of(settings: SelectionConfig) -> Method:
    """The method that `selection.method` names.

    Raises:
        ConfigError: no method has that name.
    """
    if settings.method not in METHODS:
        message = f"no selection method is called {settings.method!r}; there are: {', '.join(sorted(METHODS))}"
        raise ConfigError([Problem(path="selection.method", message=message)])
    return METHODS[settings.method]


def make_selector(settings: SelectionConfig) -> Selector:
    """The selection method that `selection.method` names; raises as `method_of` does."""
    method = method_of(settings)
    module, name = method.home.split(":")
    selector: Selector = getattr(import_module(module), name)()
    if settings.n_exact_rows is not None and "n_exact_rows" in method.settings:
        from duet_ray.selection.prediction import Predicted

        selector = Predicted(selector)
    return selector


def settings_read(settings: SelectionConfig) -> tuple[str, ...]:
    """The keys of `selection` that the method's scores depend on, sorted."""
    method = method_of(settings)
    read = set(method.settings)
    if "solver" in read:
        read |= set(_SOLVERS[settings.solver])
    if settings.n_exact_rows is None:
        read.discard("n_exact_rows")
    elif "n_exact_rows" in read:
        read |= {"embedding_model", "min_rank_correlation"}
    return tuple(sorted(read))


def n_drawable(settings: SelectionConfig, n_rows: int) -> int:
    """How many rows of a domain with `n_rows` training rows can be drawn at all."""
    if settings.method == "remove_harmful" and n_rows > 1:
        return n_rows - int(settings.harmful_fraction * n_rows)
    return n_rows


def n_drawn(config: StudyConfig, index: int, n_rows: int) -> int:
    """The most rows of domain `index` that any mixture of the study may look at: an order need not reach further."""
    quota = math.ceil(config.mixture.n_rows * config.domains[index].bounds[1])
    return min(n_rows, math.ceil(config.selection.pool * quota))
