"""The result of a study to take away: the trained model, the rows it was trained on, and how to load both.

    out/adapter/          PEFT's layout, safetensors; or, where every weight was trained,
    out/model/            a model folder as `save_pretrained` writes it, safetensors
    out/mixture.parquet   one line a drawn row: domain, source, line, row, prompt, completion, text
    out/ratio.json        the ratio and what it measured
    out/README.md

Rows are read and written in chunks, so that the memory does not grow with the mixture. Everything is built in a
folder beside `out` and moved there at the end; nothing that is already in `out` is touched without `overwrite`, and
with it only the entries above are replaced.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet_ray.errors import DuetError
from duet_ray.records import Mixture, Ratio, SampleResult, trial_name
from duet_ray.report.summary import (
    StudySummary,
    base_measurement,
    best_sample,
    chosen_trial,
    confirmation_of,
    confirmed_name,
    value_format,
)
from duet_ray.report.verdict import verdict
from duet_ray.report.wording import better_is, ratio_text, settings_text

CHUNK_ROWS = 2_048
ENTRIES = ("adapter", "model", "mixture.parquet", "ratio.json", "README.md")
_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank`; it assumes the first where none is given."""

Texts = Callable[[int, Sequence[int]], list[dict[str, Any]]]
"""(domain index, row ids) → one mapping a row, in that order, with any of source, line, prompt, completion, text."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Where everything lies."""

    folder: Path
    adapter: Path
    """The trained model, whichever of the two it is."""
    mixture: Path
    ratio: Path
    readme: Path
    n_rows: int


def export_best(
    summary: StudySummary,
    *,
    study_folder: Path,
    out: Path,
    texts: Texts,
    rows: Mixture,
    adapter: Path,
    sample: SampleResult | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Write a study's best model and mixture into `out`.

    Args:
        summary: the study.
        study_folder: the study's own folder; an export never goes on top of it.
        out: a folder that does not exist or is empty; with `overwrite` also one with an older export.
        texts: gives the text of drawn rows.
        rows: the rows the model was trained on, in the study's domain order.
        adapter: the trained model's folder: an adapter in PEFT's layout, or a whole model; relative paths start from
            `study_folder`.
        sample: the sample that is exported; by default the best one of the trial that the report recommends.
        overwrite: replace an older export in `out`.

    Raises:
        DuetError: there is nothing to export, `out` is in use, the adapter is not whole, or `rows` is not the
            sample's mixture.
    """
    sample = sample or _recommended(summary)
    ratio = sample.spec.ratio
    if ratio is None or tuple(len(r) for r in rows.rows) != ratio.counts:
        drawn = tuple(len(r) for r in rows.rows)
        raise DuetError(
            f"{sample.spec.key} was trained on {ratio.counts if ratio else 'no'} rows per domain, but the mixture "
            f"given has {drawn}: draw the rows of {sample.spec.key} again"
        )
    source = _model_folder(study_folder / adapter)
    name = "adapter" if _is_adapter(source) else "model"
    target = _free_folder(out, study_folder=study_folder, adapter=source, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        shutil.copytree(source, staging / name)
        _write_mixture(staging / "mixture.parquet", summary.domain_names, rows, texts)
        facts = _facts(summary, sample, ratio)
        (staging / "ratio.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(_readme(summary, sample, ratio, source), encoding="utf-8")
        staging.chmod(0o755)
        _move(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ExportResult(
        folder=target,
        adapter=target / name,
        mixture=target / "mixture.parquet",
        ratio=target / "ratio.json",
        readme=target / "README.md",
        n_rows=len(rows),
    )


def _recommended(summary: StudySummary) -> SampleResult:
    best = chosen_trial(summary)
    sample = best_sample(best, summary.direction) if best else None
    if sample is None:
        raise DuetError(
            f"study {summary.name} has nothing to export yet: no trial has a value; run it, and see `duet status`"
        )
    return sample


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _model_folder(folder: Path) -> Path:
    """The same folder, if it holds a whole adapter or a whole model."""
    if (folder / "config.json").is_file():
        missing = [] if list(folder.glob("model*.safetensors")) else ["model.safetensors"]
    else:
        missing = [n for n in ("adapter_config.json", "adapter_model.safetensors") if not (folder / n).is_file()]
    if missing:
        raise DuetError(
            f"{folder}: is not a whole model, {' and '.join(missing)} missing; only the best few stay on "
            "disk (keep_best in the study file)"
        )
    return folder.resolve()


def _free_folder(out: Path, *, study_folder: Path, adapter: Path, overwrite: bool) -> Path:
    """The resolved target, if writing there destroys nothing."""
    target, study = Path(out).expanduser().resolve(), study_folder.resolve()
    if target in (study, adapter) or target in study.parents or target in adapter.parents:
        raise DuetError(f"{target}: the study itself lies there; export into another folder")
    if target.exists() and not target.is_dir():
        raise DuetError(f"{target}: is a file; export into a folder that does not exist yet")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise DuetError(
            f"{target}: exists and is not empty; choose another folder, or allow to replace an older export there "
            "(--overwrite)"
        )
    return target


def _move(staging: Path, target: Path) -> None:
    """One rename where the target is free; else the entries one by one, leaving everything else alone."""
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(staging, target)
        return
    for name in ENTRIES:
        old = target / name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        if (staging / name).exists():
            os.replace(staging / name, old)


def _write_mixture(path: Path, names: Sequence[str], rows: Mixture, texts: Texts) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema(
        [
            ("domain", text),
            ("source", text),
            ("line", pa.int64()),
            ("row", pa.int64()),
            ("prompt", text),
            ("completion", text),
            ("text", text),
        ]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for domain, ids in enumerate(rows.rows):
            for start in range(0, len(ids), CHUNK_ROWS):
                chunk = [int(i) for i in ids[start : start + CHUNK_ROWS]]
                found = texts(domain, chunk)
                if len(found) != len(chunk):
                    raise DuetError(
                        f"domain {names[domain]}: {len(chunk)} rows were asked for and {len(found)} came back; has "
                        "the data changed since the study started?"
                    )
                lines = [
                    {"domain": names[domain], "row": row} | {k: r.get(k) for k in _TEXT_COLUMNS}
                    for row, r in zip(chunk, found, strict=True)
                ]
                writer.write_table(pa.Table.from_pylist(lines, schema=schema))


_TEXT_COLUMNS = ("source", "line", "prompt", "completion", "text")


def _facts(summary: StudySummary, sample: SampleResult, ratio: Ratio) -> dict[str, Any]:
    again = confirmation_of(summary, _searched_name(summary, sample))
    base = base_measurement(summary)
    return {
        "study": summary.name,
        "trial": trial_name(sample.spec.trial),
        "sample": sample.spec.key,
        "n_rows": ratio.n_rows,
        "ratio": dict(zip(summary.domain_names, (float(v) for v in ratio.values), strict=True)),
        "counts": dict(zip(summary.domain_names, ratio.counts, strict=True)),
        "settings": dict(sample.spec.settings),
        "feedback": summary.feedback_name,
        "direction": summary.direction.value,
        "value": sample.value,
        "confirmed_mean": again.mean if again else None,
        "confirmed_standard_error": again.standard_error if again else None,
        "base_value": base.mean if base else None,
        "rows_digest": sample.rows_digest,
    }


def _searched_name(summary: StudySummary, sample: SampleResult) -> str:
    """The trial whose ratio a sample has: that of a confirmation is the trial it confirms."""
    trial = next((t for t in summary.trials if t.number == sample.spec.trial and t.kind == "confirm"), None)
    return confirmed_name(trial) if trial else trial_name(sample.spec.trial)


def _readme(summary: StudySummary, sample: SampleResult, ratio: Ratio, source: Path) -> str:
    """What this is, how to load it."""
    what, loading = _adapter_words(summary, source) if _is_adapter(source) else _model_words(summary)
    values, said, own = value_format(summary), verdict(summary), settings_text(sample.spec.settings)
    again, base = confirmation_of(summary, _searched_name(summary, sample)), base_measurement(summary)
    value = values(sample.value) if sample.value is not None else "none"
    measured = [f"- this model: {summary.feedback_name} {value} ({better_is(summary.direction)})"]
    if again:
        error = f" ± {values.difference(again.standard_error)}" if again.standard_error else ""
        measured.append(f"- the same ratio again with fresh seeds: mean {values(again.mean)}{error} of {again.n}")
    if base:
        measured.append(f"- the untouched model: {values(base.mean)}")
    table = "\n".join(
        f"| {n} | {100 * v:.2f} % | {c:,} |"
        for n, v, c in zip(summary.domain_names, ratio.values, ratio.counts, strict=True)
    )
    return f"""# {summary.name}: the best mixture and its model

{what} of sample {sample.spec.key}, the {ratio.n_rows:,} rows it was trained on, and their ratio:
{ratio_text(ratio, summary.domain_names)}.{f" Its own training settings: {own}." if own else ""}

{chr(10).join(measured)}

What the study concluded: {said.headline} {said.advice}

| domain | share | rows |
|---|---|---|
{table}

## Load the model

{loading}

## Load the rows

```python
import pandas

rows = pandas.read_parquet("mixture.parquet")  # domain, source, line, row, prompt, completion, text
```

`line` is the line or record in the source file, `row` the row's id in the study. `ratio.json` has the numbers above
for programs.
"""


def _adapter_words(summary: StudySummary, source: Path) -> tuple[str, str]:
    """What an adapter is called, and how it is loaded."""
    config = _adapter_config(source)
    model, rank = str(config.get("base_model_name_or_path") or "<base model>"), _vllm_rank(config)
    return (
        "The LoRA adapter",
        f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{model}"
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), "adapter")
```

Or serve it:

```sh
vllm serve {model} --enable-lora{rank} --lora-modules {summary.name}=./adapter
```""",
    )


def _model_words(summary: StudySummary) -> tuple[str, str]:
    """What a whole model is called, and how it is loaded; its tokenizer is the base model's."""
    base = summary.model_path
    return (
        "The fine-tuned model",
        f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
```

Or serve it:

```sh
vllm serve ./model --tokenizer {base} --served-model-name {summary.name}
```""",
    )


def _adapter_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DuetError(f"{path}: is not valid JSON ({error}); the adapter is damaged") from None
    if not isinstance(config, dict):
        raise DuetError(f"{path}: must hold a mapping; the adapter is damaged")
    return config


def _vllm_rank(config: dict[str, Any]) -> str:
    """vLLM refuses an adapter above its maximum rank, so a larger one is asked for."""
    rank = config.get("r")
    if not isinstance(rank, int) or rank <= _VLLM_RANKS[0]:
        return ""
    return f" --max-lora-rank {next((r for r in _VLLM_RANKS if r >= rank), rank)}"
