"""What a study found, for people: it reads a `StudySummary` and writes; it never measures or decides.

- `summary.py`    the dataclasses that everything here reads, and pure functions over them (best, running best, …)
- `welch.py`      the difference of two means with its 95 % interval
- `verdict.py`    does the best ratio beat the untouched model and the uniform ratio: numbers first, then words
- `curse.py`      what the search promised of a ratio, and what fresh seeds made of it: the winner's curse, measured
- `objectives.py` several metrics: fronts, requirements and weighted sums
- `learned.py`    the search's model of a stored study, read once and kept (`insight.json`); torch only when it is made
- `wording.py`    numbers, times and ratios as text; `palette.py` one look per domain everywhere
- `scores.py`     what a selection method made of a domain's rows, as plain data for store, page and terminal
- `figures.py`    the figures as PNG (matplotlib); `insight_figures.py` those of what the search has learned
- `page.py`       `write_report`: one self-contained `report.html` (jinja2, `page.html`) and the PNGs
- `status.py`     the table of `duet run` and `duet status`, and plain log lines (rich)
- `plain.py`      `to_json`: the same facts for `--json`
- `export.py`     `export_best`: adapter, mixture and a README in a folder to take away (pyarrow)

Nothing is imported here, so that `import duet_ray.report` costs nothing.
"""
