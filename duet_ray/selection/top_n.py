"""The rows with the highest influence, without sampling (the paper's "IF only" inside a domain).

Gives an order: a mixture takes its quota from the front, so the k samples of a trial differ by their training seed
alone, unless `selection.pool` is above 1. The scores are those of `influence`, and are stored once for both;
what is made of them is `weighting.from_scores`'s.
"""

from duet_ray.selection.influence import Influence


class TopN(Influence):
    """Influence decides the order."""

    name = "top_n"
