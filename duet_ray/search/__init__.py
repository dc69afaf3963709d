"""The search over mixing ratios (DUET's outer problem): where the next ratio comes from, and which one to take home.

Read in this order:

`told`          what the search is told of a finished trial
`simplex`       the space: whole rows per domain within bounds and constraints, and the start design
`features`      a point: a ratio, where asked training settings and a fidelity; what the model sees of it
`proposer`      ask/tell: everything told and pending in, the next point out
`noise`         k values per trial put on one footing; `sample_size`: how many samples the next trial should have
`kernels`       covariances over ratios by name; `model`: the Gaussian process; `fitted`: what may be asked of it
`acquisitions`  what a trial at a point is worth; `schedule`: the theory's factor on σ
`surrogate`     Ax: model and acquisition put together once per proposal
`acquisition`   the acquisition optimised on the exact simplex, on whole rows
`objectives`    requirements and fronts
`recommend`     the posterior's best instead of the luckiest observation
`insight`       what the search has learnt of the domains
`past_runs`     experiments from before the study, and a prior ratio

From `model` on they load torch and BoTorch, `surrogate` and `acquisition` Ax; the proposer imports them on the first
Bayesian trial. (`constraints` and `projection` are behind `simplex`.)
"""

from duet_ray.search.proposer import Proposal, Proposer
from duet_ray.search.simplex import SimplexSpace, start_design
from duet_ray.search.told import Told

__all__ = ["Proposal", "Proposer", "SimplexSpace", "Told", "start_design"]
