"""`duet report`: write the page and the figures."""

from duet_ray.cli.console import AsJson, Overrides, StudyPlace, open_study, out, print_json


def command(study: StudyPlace, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Write report.html and its figures into the study's folder. Works while the study runs."""
    page = open_study(study, set_).write_report()
    if as_json:
        print_json({"report": str(page)})
    else:
        out.print(str(page), soft_wrap=True)
