"""`duet status`: how far a study is, read from its store while it runs or after."""

from duet_ray.cli.console import AsJson, Overrides, StudyPlace, open_study, out, print_json


def command(study: StudyPlace, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Show the trials so far."""
    from duet_ray.report.plain import to_json
    from duet_ray.report.status import trial_table

    summary = open_study(study, set_).summary()
    if as_json:
        print_json(to_json(summary))
    else:
        out.print(trial_table(summary))
