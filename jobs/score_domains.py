"""Weigh the rows of a study's domains on a Ray cluster, and stop there: `duet score` as a job.

    ray job submit --working-dir . -- \
        python jobs/score_domains.py --config jobs/paper/truthfulqa.yaml --set storage=/shared/studies

Every study with the same data, model and selection finds the weights in <storage>/cache. Exit codes as `run_study.py`.
"""

from duet_ray.cli.console import AsJson, Overrides
from duet_ray.cli.job import Config, job_line, main, open_in_job
from duet_ray.cli.score import score


def command(config: Config, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Compute the row weights that a run will use. What is stored already is not computed again."""
    overrides = set_ or []
    opened = open_in_job(config, overrides)
    score(opened, live=False, as_json=as_json, again=job_line("jobs/score_domains.py", config, overrides))


if __name__ == "__main__":
    main(command)
