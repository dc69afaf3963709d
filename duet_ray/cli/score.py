"""`duet score`: weigh the rows of every domain, and stop there."""

from typing import Any

from rich.table import Table

from duet_ray.cli.console import AsJson, Overrides, StudyFile, open_study, out, print_json
from duet_ray.cli.live import LogWatcher


def command(study: StudyFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Compute the row weights that a run will use. What is stored already is not computed again."""
    ready = open_study(study, set_).score(LogWatcher())
    rows = [_row(domain, weights) for domain, weights in zip(ready.domains, ready.weights(), strict=True)]
    if as_json:
        print_json({"method": ready.config.selection.method, "domains": rows})
        return
    table = Table("domain", "rows", "worth", "lowest", "median", "highest", "notes")
    for column in table.columns[1:6]:
        column.justify = "right"
    for row in rows:
        scores = [f"{row[name]:.3g}" if row[name] is not None else "-" for name in ("lowest", "median", "highest")]
        table.add_row(
            row["domain"],
            f"{row['n_rows']:,}",
            f"{row['effective_sample_size']:,.0f}",
            *scores,
            "; ".join(row["notes"]),
        )
    out.print(table)
    out.print("worth: the effective sample size, how many equally weighted rows the weights are worth")


def _row(domain: Any, weights: Any) -> dict[str, Any]:
    import numpy as np

    low, middle, high = (None,) * 3 if weights.scores is None else np.quantile(weights.scores, [0, 0.5, 1]).tolist()
    return {
        "domain": domain.name,
        "n_rows": len(domain.train),
        "effective_sample_size": weights.effective_sample_size,
        "lowest": low,
        "median": middle,
        "highest": high,
        "notes": list(weights.notes),
    }
