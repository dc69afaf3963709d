"""The export: what lies in the folder, and that nothing of the user's is ever lost."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from duet_ray.errors import DuetError
from duet_ray.records import Mixture
from duet_ray.report import export
from duet_ray.report.export import ENTRIES, export_best
from tests.report.summaries import gallery, study

ADAPTER = Path("artifacts/t0002/0/adapter")
COUNTS = (13, 13, 94)


def texts(domain: int, ids: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"source": f"data/{domain}.jsonl", "line": i + 1, "prompt": f"Q{i} é", "completion": "A", "text": f"Q{i} é A"}
        for i in ids
    ]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "studies" / "toy"
    make_adapter(folder / ADAPTER)
    return folder


def make_adapter(folder: Path, rank: int = 64) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "r": rank}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def mixture(counts: Sequence[int] = COUNTS) -> Mixture:
    return Mixture(rows=tuple(np.arange(n, dtype=np.int64)[::-1] * 3 for n in counts))


def run(home: Path, out: Path, **rest: Any) -> export.ExportResult:
    settings: dict[str, Any] = {"texts": texts, "rows": mixture(), "adapter": ADAPTER}
    return export_best(gallery()["confirmed"], study_folder=home, out=out, **settings | rest)


def test_an_export_has_everything(home: Path, tmp_path: Path) -> None:
    result = run(home, tmp_path / "a" / "out")
    assert sorted(p.name for p in result.folder.iterdir()) == sorted(set(ENTRIES) - {"model"})
    assert (result.adapter / "adapter_model.safetensors").read_bytes() == b"weights"
    facts = json.loads(result.ratio.read_text())
    assert facts["trial"] == "t0002"
    assert facts["counts"] == dict(zip(["domain-0", "domain-1", "domain-2"], COUNTS, strict=True))
    assert sum(facts["ratio"].values()) == pytest.approx(1)
    assert facts["value"] == 2.2
    assert facts["confirmed_mean"] == pytest.approx(2.26)
    assert result.n_rows == 120
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


def test_the_mixture_is_row_by_row_as_drawn(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(domain: int, ids: Sequence[int]) -> list[dict[str, Any]]:
        asked.append(len(ids))
        return texts(domain, ids)

    monkeypatch.setattr(export, "CHUNK_ROWS", 40)
    result = run(home, tmp_path / "out", texts=counted)
    assert asked == [13, 13, 40, 40, 14]
    table = pq.read_table(result.mixture)
    assert table.column_names == ["domain", "source", "line", "row", "prompt", "completion", "text"]
    rows = table.to_pylist()
    expected = [(f"domain-{d}", int(r)) for d, r in mixture()]
    assert [(r["domain"], r["row"]) for r in rows] == expected
    assert rows[13]["source"] == "data/1.jsonl"
    assert rows[13]["line"] == rows[13]["row"] + 1
    assert rows[13]["text"] == f"Q{rows[13]['row']} é A"


def test_missing_fields_are_null(home: Path, tmp_path: Path) -> None:
    result = run(home, tmp_path / "out", texts=lambda _, ids: [{"text": "t"} for _ in ids])
    assert pq.read_table(result.mixture).to_pylist()[0] == {
        "domain": "domain-0", "source": None, "line": None, "row": 36, "prompt": None, "completion": None, "text": "t"
    }  # fmt: skip


def test_the_readme_says_how_to_load_it(home: Path, tmp_path: Path) -> None:
    text = run(home, tmp_path / "out").readme.read_text(encoding="utf-8")
    assert 'base = "org/base"' in text
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), "adapter")' in text
    assert "vllm serve org/base --enable-lora --max-lora-rank 64 --lora-modules toy=./adapter" in text
    assert "- this model: heldout_loss 2.200 (lower is better)" in text
    assert "- the same ratio again with fresh seeds: mean 2.260 ± 0.010 of 2" in text
    assert "| domain-2 | 78.33 % | 94 |" in text


@pytest.mark.parametrize(
    ("rank", "flag"), [(8, ""), (16, ""), (17, " --max-lora-rank 32"), (600, " --max-lora-rank 600")]
)
def test_vllm_rank(rank: int, flag: str) -> None:
    assert export._vllm_rank({"r": rank}) == flag


def test_a_used_folder_is_refused_with_a_remedy(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(DuetError, match=r"exists and is not empty; choose another folder, .*--overwrite"):
        run(home, out)
    assert [p.name for p in out.iterdir()] == ["precious.txt"]


def test_overwrite_replaces_an_export_and_nothing_else(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(home, out)
    (out / "precious.txt").write_text("mine")
    (out / "adapter" / "stale.bin").write_text("old")
    result = run(home, out, overwrite=True, texts=lambda _, ids: [{"text": "new"} for _ in ids])
    assert (out / "precious.txt").read_text() == "mine"
    assert not (out / "adapter" / "stale.bin").exists()
    assert pq.read_table(result.mixture).column("text")[0].as_py() == "new"


def test_an_empty_folder_is_used(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run(home, tmp_path / "out").readme.is_file()


@pytest.mark.parametrize("where", [".", "..", "artifacts/t0002/0/adapter", "artifacts/t0002/0"])
def test_never_on_top_of_the_study(home: Path, where: str) -> None:
    with pytest.raises(DuetError, match="the study itself lies there"):
        run(home, home / where, overwrite=True)
    assert (home / ADAPTER / "adapter_model.safetensors").is_file()


def test_a_file_in_the_way(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DuetError, match="is a file; export into a folder"):
        run(home, tmp_path / "out", overwrite=True)


def test_a_failed_export_leaves_nothing_behind(home: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    with pytest.raises(DuetError, match="domain domain-0: 13 rows were asked for and 12 came back"):
        run(home, parent / "out", texts=lambda d, ids: texts(d, ids)[:-1])
    assert list(parent.iterdir()) == []


def test_rows_of_another_sample_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DuetError, match=r"t0002-s0 was trained on \(13, 13, 94\) rows per domain, .* \(40, 40, 40\)"):
        run(home, tmp_path / "out", rows=mixture((40, 40, 40)))


def test_a_whole_model_is_exported_as_one(home: Path, tmp_path: Path) -> None:
    """And takes the place of an adapter that was exported before."""
    run(home, tmp_path / "out")
    model = home / "artifacts/t0002/0/model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(DuetError, match=r"model\.safetensors missing"):
        run(home, tmp_path / "none", adapter=model)
    (model / "model.safetensors").write_bytes(b"all weights")
    result = run(home, tmp_path / "out", adapter=model, overwrite=True)
    assert sorted(p.name for p in result.folder.iterdir()) == sorted(set(ENTRIES) - {"adapter"})
    assert (result.adapter / "model.safetensors").read_bytes() == b"all weights"
    text = result.readme.read_text()
    assert 'AutoModelForCausalLM.from_pretrained("model", dtype="auto")' in text
    assert "adapter" not in text.lower()


def test_an_adapter_that_is_gone(home: Path, tmp_path: Path) -> None:
    (home / ADAPTER / "adapter_model.safetensors").unlink()
    with pytest.raises(DuetError, match=r"adapter_model.safetensors missing; only the best few .*keep_best"):
        run(home, tmp_path / "out")


def test_nothing_to_export(home: Path, tmp_path: Path) -> None:
    summary = gallery()["all failed"]
    with pytest.raises(DuetError, match="nothing to export yet: no trial has a value"):
        export_best(summary, study_folder=home, out=tmp_path / "o", texts=texts, rows=mixture(), adapter=ADAPTER)


def test_the_uniform_model_is_exported_where_the_report_says_to_take_it(home: Path, tmp_path: Path) -> None:
    make_adapter(home / "artifacts/t0000/0/adapter")
    result = export_best(
        gallery()["uniform wins"], study_folder=home, out=tmp_path / "o", texts=texts, rows=mixture((40, 40, 40)),
        adapter=Path("artifacts/t0000/0/adapter"),
    )  # fmt: skip
    facts = json.loads(result.ratio.read_text())
    assert (facts["sample"], facts["confirmed_mean"]) == ("t0000-s0", pytest.approx(2.51))
    text = result.readme.read_text(encoding="utf-8")
    assert "No mixture found beats the uniform ratio: take the uniform one" in text
    assert "Use the uniform ratio: the search found nothing better." in text


def test_another_sample_can_be_exported(home: Path, tmp_path: Path) -> None:
    summary = study([[2.5, 2.4], [2.0, 2.1]])
    uniform = summary.trials[1].samples[0]
    make_adapter(home / "other", rank=8)
    result = export_best(
        summary, study_folder=home, out=tmp_path / "o", texts=texts, rows=mixture((40, 40, 40)),
        adapter=Path("other"), sample=uniform,
    )  # fmt: skip
    assert json.loads(result.ratio.read_text())["sample"] == "t0000-s0"
