"""One weight for every training row: the selection methods by name, imported on use."""

from importlib import import_module

from duet_ray.config import SelectionConfig
from duet_ray.errors import ConfigError, Problem
from duet_ray.selection.base import RowWeights, SelectionContext, Selector
from duet_ray.selection.weights_cache import load_weights, model_identity, save_weights, weights_key

SELECTORS: dict[str, str] = {
    "uniform": "duet_ray.selection.uniform:Uniform",
    "influence": "duet_ray.selection.influence:Influence",
}
"""`selection.method` → `"module:Class"`."""


def make_selector(settings: SelectionConfig) -> Selector:
    """The selection method that `selection.method` names.

    Raises:
        ConfigError: no method has that name.
    """
    if settings.method not in SELECTORS:
        message = f"no selection method is called {settings.method!r}; there are: {', '.join(sorted(SELECTORS))}"
        raise ConfigError([Problem(path="selection.method", message=message)])
    module, name = SELECTORS[settings.method].split(":")
    selector: Selector = getattr(import_module(module), name)()
    return selector


__all__ = [
    "SELECTORS",
    "RowWeights",
    "SelectionContext",
    "Selector",
    "load_weights",
    "make_selector",
    "model_identity",
    "save_weights",
    "weights_key",
]
