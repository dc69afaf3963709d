"""Where samples are trained: the only folder that imports ray.

- `platform`   what a session needs of the machines, so that the rest of it knows nothing of Ray; `ray_session` a Ray
- `study_run`  one session of a study: base and scores, search, confirmation
- `searcher`   Tune's Searcher over the proposer and the store; `trial` the thin Tune function that waits for k samples
- `broker`     leases tasks to groups; `fleet` starts the groups; `group` is one, a long-lived Ray Train run, and
  `serving` what its processes do
- `worker`     does one task; `artifacts` says what it leaves on disk, who finds it and what is deleted
"""
