"""The search over mixing ratios (DUET's outer problem): where the next ratio comes from.

`simplex`     the space: whole rows per domain within bounds, and the start design; cheap to import
`acquisition` the lower confidence bound, and Ax's acquisition optimised on the exact simplex
`surrogate`   the Gaussian process in Ax: rebuilt, fitted and asked once per proposal
`proposer`    ask/tell: everything told and pending in, the next ratio out

The two in the middle load torch, BoTorch and Ax; the proposer imports them on the first Bayesian trial.
"""

from duet_ray.search.proposer import Proposal, Proposer, Told
from duet_ray.search.simplex import SimplexSpace, start_design

__all__ = ["Proposal", "Proposer", "SimplexSpace", "Told", "start_design"]
