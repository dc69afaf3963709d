"""What a study found, for people: it reads a `StudySummary` and writes; it never measures or decides.

- `summary.py`    the dataclasses that everything here reads, and pure functions over them (best, running best, …)
- `welch.py`      the difference of two means with its 95 % interval
- `verdict.py`    does the best ratio beat the untouched model and the uniform ratio: numbers first, then words
- `wording.py`    numbers, times and ratios as text; `palette.py` one look per domain everywhere
- `scores.py`     what a selection method made of a domain's rows, as plain data for store, page and terminal
- `figures.py`    the five figures as PNG (matplotlib)
- `page.py`       `write_report`: one self-contained `report.html` (jinja2, `page.html`) and the PNGs
- `status.py`     the table of `duet run` and `duet status`, and plain log lines (rich)
- `plain.py`      `to_json`: the same facts for `--json`
- `export.py`     `export_best`: adapter, mixture and a README in a folder to take away (pyarrow)

Nothing is imported here, so that `import duet_ray.report` costs nothing.
"""
