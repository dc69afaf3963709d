"""One weight for every training row: the selection methods by name, imported on use.

`methods` is the table of all methods, `base` their contract, `scoring` the steps of a domain; `weighting` turns scores
into probabilities, `weights_cache` keeps them. `fitting`, `gradients`, `hessian` and `embeddings` are what several
methods share.
"""

from duet_ray.selection.base import Findings, RowWeights, SelectionContext, Selector
from duet_ray.selection.methods import METHODS, Method, make_selector, method_of, n_drawable, n_drawn
from duet_ray.selection.scoring import Scoring, n_shards, select
from duet_ray.selection.weights_cache import load_weights, model_identity, save_weights, weights_key

__all__ = [
    "METHODS",
    "Findings",
    "Method",
    "RowWeights",
    "Scoring",
    "SelectionContext",
    "Selector",
    "load_weights",
    "make_selector",
    "method_of",
    "model_identity",
    "n_drawable",
    "n_drawn",
    "n_shards",
    "save_weights",
    "select",
    "weights_key",
]
