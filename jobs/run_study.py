"""Run a study on a Ray cluster, or go on with it: `duet run` as a job.

    export RAY_API_SERVER_ADDRESS=http://<head node>:8265
    ray job submit --working-dir . -- \
        python jobs/run_study.py --config jobs/paper/truthfulqa.yaml --set storage=/shared/studies

The same command goes on after any interruption. Exit codes are those of `duet run`: 0 done, 1 failed, 2 a wrong study
file, 130 paused (`ray job stop`).
"""

from duet_ray.cli.console import AsJson, Overrides
from duet_ray.cli.job import Config, job_line, main, open_in_job
from duet_ray.cli.run import run


def command(config: Config, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Find the mixture; leave the best model, the report and everything measured in <storage>/<name>."""
    overrides = set_ or []
    run(
        open_in_job(config, overrides),
        config,
        overrides,
        again=lambda changed: job_line("jobs/run_study.py", config, changed),
        as_json=as_json,
    )


if __name__ == "__main__":
    main(command)
