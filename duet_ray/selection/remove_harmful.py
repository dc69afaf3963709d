"""DUET-RH: drop the rows with the lowest influence, then draw uniformly from the rest (DUET, section 6 and App. A.5).

The rows dropped are `selection.harmful_fraction` of the domain, so a study knows how many it can draw before anything
is scored. The scores are those of `influence`, and are stored once for both;
what is made of them is `weighting.from_scores`'s.
"""

from duet_ray.selection.influence import Influence


class RemoveHarmful(Influence):
    """Influence decides which rows are out; among the others all are alike."""

    name = "remove_harmful"
