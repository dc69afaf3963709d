"""Where samples are trained: the only folder that imports ray.

`broker` leases tasks, `worker` does one task, `group` is the loop of a long-lived Ray Train group around it, `fleet`
starts the groups, `trial` is the thin Tune function, `searcher` plugs the proposer into Tune, and `study_run` puts
them together.
"""
