"""Every study file under `jobs/`: well-formed, its own launch line on top, the paper's as the paper has them."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from duet_ray.config import StudyConfig, config_from, load_config
from duet_ray.domains import BadRow, ParsedRow, Record, prepare_domains
from duet_ray.domains.formats import COLUMNS, parse_record
from duet_ray.offline import check_offline
from duet_ray.preflight import preflight
from duet_ray.study_file import leaves
from tests.tiny_model import tiny_tokenizer, write_tiny_model
from tests.toy_study import WORDS, write_rows

JOBS = Path(__file__).parents[2] / "jobs"
FILES = sorted(path for path in JOBS.rglob("*.yaml") if path.parent.name != "tasks")
PAPER = [path for path in FILES if path.parent.name == "paper"]
LORA = [path for path in PAPER if not path.stem.endswith("-full")]
FULL = [path for path in PAPER if path.stem.endswith("-full")]


def ids(files: list[Path]) -> list[str]:
    return [str(path.relative_to(JOBS)) for path in files]


def test_these_are_all() -> None:
    assert len(LORA) == 8
    assert len(FULL) == 4
    assert {"template.yaml", "quickstart/study.yaml"} == set(ids(FILES)) - set(ids(PAPER))


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_a_study_file_passes_the_offline_check(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    found = check_offline(with_stand_ins(config, tmp_path))
    assert any(line.startswith("the machines: ") for line in found.not_checked)
    for domain in config.domains:
        if domain.sources[0].startswith("hf:"):
            assert any(f"{domain.name} ({domain.sources[0]}" in line for line in found.not_checked)


def with_stand_ins(config: StudyConfig, folder: Path) -> StudyConfig:
    """The study in a folder where every local file that it names is there, with two rows of the right columns."""
    data = config.model_dump(mode="json")
    if config.model.path.startswith(".") or "/" not in config.model.path:
        write_tiny_model(folder / config.model.path)
    for domain in data["domains"]:
        if not domain["source"].startswith("hf:"):
            domain["source"] = domain["source"].replace("*", "all")
            write_stand_in(folder / domain["source"], domain["format"], domain["columns"])
    for feedback in [data["feedback"], *data["also"]]:
        if feedback["kind"] == "heldout_loss":
            write_stand_in(folder / feedback["file"], feedback["format"], feedback["columns"])
        elif feedback["tasks_folder"] is not None:
            feedback["tasks_folder"] = str(config.resolve_path(feedback["tasks_folder"]))
    return config_from(data, folder=folder)


def write_stand_in(file: Path, format: Any, columns: dict[str, str]) -> None:
    values = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    values |= {"choices": ["a", "b"], "answer": 1, "labels": []}  # type: ignore[dict-item]
    row = {columns.get(ours, ours): values.get(ours, "text") for ours in COLUMNS[format]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")


@pytest.mark.parametrize("path", PAPER, ids=ids(PAPER))
def test_the_launch_line_on_top_is_the_files_own(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\nname:")[0]
    assert "ray job submit --working-dir . -- python jobs/run_study.py \\\n" in head
    assert f"--config jobs/paper/{path.name} --set storage=/shared/studies\n" in head


# The paper's experiments


@pytest.mark.parametrize("path", PAPER, ids=ids(PAPER))
def test_a_study_of_the_paper_is_the_papers(path: Path) -> None:
    """Section 6.1 and appendix C.1, D; the values stand here a second time on purpose."""
    config = load_config(path)
    assert config.name == path.stem
    assert (config.mixture.n_rows, config.search.n_trials, config.search.n_start, config.sampling.k) == (
        10_000,
        10,
        50,
        1,
    )
    assert (config.search.kernel, config.search.acquisition, config.search.beta) == ("se", "lcb", 0.5)
    assert (config.selection.method, config.data.validation_fraction) == ("influence", 0.1)
    feedback = config.feedback
    assert feedback.kind == "lm_eval"
    assert (feedback.n_shot, feedback.temperature) == (3, 0.75)
    is_full = path in FULL
    assert (config.training.method, config.training.epochs) == (("full", 3) if is_full else ("lora", 1))
    scored_with = config.training.model_copy(update=config.selection.fit.given)
    assert (scored_with.rank, scored_with.learning_rate) == (128, 1e-5)
    all_nine = load_config(JOBS / "paper" / "truthfulqa-llama3-8b.yaml").domain_names
    assert len(all_nine) == 9
    assert set(all_nine) - set(config.domain_names) == LEFT_OUT[task_of(path)]


LEFT_OUT: dict[str, set[str]] = {
    "truthfulqa": set(),
    "gsm8k": {"gsm8k"},
    "pubmedqa-headqa": {"pubmedqa", "headqa"},
    "commonsenseqa-triviaqa": {"commonsenseqa", "triviaqa"},
}
"""Task → the domains that are left out of the training data (underlined in Figure 4)."""


def task_of(path: Path) -> str:
    (task,) = [task for task in LEFT_OUT if path.stem.startswith(f"{task}-")]
    return task


def test_the_files_differ_only_where_they_should() -> None:
    """Files of one task in the model and how it is trained; all of them in domains and feedback of the task alone."""
    free = {"name", "model.path"}
    full = ("training.", "selection.fit", "selection.epochs", "fleet.")
    task = ("feedback.", "domains")
    read = {path: dict(leaves(load_config(path).model_dump(mode="json"))) for path in PAPER}
    nothing = object()
    for one, a in read.items():
        for other, b in read.items():
            differing = [key for key in a.keys() | b.keys() if a.get(key, nothing) != b.get(key, nothing)]
            allowed = [key for key in differing if key in free]
            allowed += [k for k in differing if k.startswith(full) and (one in FULL) != (other in FULL)]
            allowed += [k for k in differing if k.startswith(task) and task_of(one) != task_of(other)]
            assert sorted(set(differing)) == sorted(set(allowed)), f"{one.name} and {other.name}"
    domains = [domain for path in PAPER for domain in load_config(path).domains]
    assert len({domain.name for domain in domains}) == 9
    for domain in domains:
        assert all(domain == other for other in domains if other.name == domain.name), domain.name


def test_truthfulqa_is_asked_what_it_is_not_trained_on() -> None:
    config = load_config(JOBS / "paper" / "truthfulqa-llama3-8b.yaml")
    (domain,) = [domain for domain in config.domains if domain.name == "truthfulqa"]
    feedback = config.feedback
    assert feedback.kind == "lm_eval"
    trained, asked = (set(range(817)[as_slice(text)]) for text in (domain.rows, feedback.rows["truthfulqa_gen"]))
    assert (len(trained), len(asked), trained & asked) == (409, 408, set())


def as_slice(text: str | None) -> slice:
    assert text is not None
    return slice(*(int(part) if part else None for part in text.split(":")))


# What the hub's data sets look like, by their cards: one row each, shortened.
HUB_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "wikitext": ({"text": " The game began ."}, "", " The game began ."),
    "gsm8k": ({"question": "How many?", "answer": "1 + 1 = 2\n#### 2"}, "Question: How many?\nAnswer:",
              "1 + 1 = 2\n#### 2"),
    "pubmedqa": (
        {
            "pubid": 1,
            "question": "Does it?",
            "context": {"contexts": ["One.", "Two."], "labels": ["BACKGROUND", "RESULTS"], "meshes": ["M"]},
            "long_answer": "It does.",
            "final_decision": "yes",
        },
        "Abstract: One.\nTwo.\nQuestion: Does it?\nAnswer:",
        "yes",
    ),
    "headqa": (
        {"qid": 1, "qtext": "Which?", "ra": 3, "answers": [{"aid": i, "atext": f"choice {i}"} for i in range(1, 6)]},
        "Question: Which?\nAnswer:",
        "choice 3",
    ),
    "sciq": (
        {"question": "Which?", "distractor1": "x", "distractor2": "y", "distractor3": "z", "correct_answer": "a",
         "support": "It is a."},
        "It is a.\nQuestion: Which?\nAnswer:",
        "a",
    ),
    "triviaqa": (
        {"question": "Who?", "answer": {"aliases": ["A", "a"], "normalized_value": "a", "value": "A"}},
        "Question: Who?\nAnswer:",
        "A",
    ),
    "truthfulqa": (
        {"question": "Why?", "best_answer": "No.", "correct_answers": ["No."], "incorrect_answers": ["Yes."]},
        "Q: Why?\nA:",
        "No.",
    ),
    "hellaswag": (
        {"activity_label": "Roof", "ctx": "A man sits. he", "endings": ["a.", "b.", "c.", "d."], "label": "3"},
        "Roof: A man sits. he",
        "d.",
    ),
    "commonsenseqa": (
        {"question": "Where?", "choices": {"label": ["A", "B"], "text": ["here", "there"]}, "answerKey": "B"},
        "Question: Where?\nAnswer:",
        "there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_domains_columns_fit_the_hubs_rows(name: str) -> None:
    config = load_config(JOBS / "paper" / "truthfulqa-llama3-8b.yaml")
    (domain,) = [domain for domain in config.domains if domain.name == name]
    row, prompt, completion = HUB_ROWS[name]
    parsed = parse_record(Record(name, 1, row), domain.format, domain.columns)
    assert isinstance(parsed, ParsedRow), parsed
    assert (parsed.prompt, parsed.completion) == (prompt, completion)
    assert isinstance(parse_record(Record(name, 1, {"x": 1}), domain.format, domain.columns), BadRow)


def test_the_domains_are_read_from_copies_of_the_hubs_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nine through the hub's reader: parquet folders with the names of the splits."""
    import datasets

    load = datasets.load_dataset
    cache = str(tmp_path / "cache")

    def load_local(path: str, *, name: str | None, split: str, revision: str | None) -> Any:
        return load(path, cache_dir=cache, split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    data = load_config(JOBS / "paper" / "truthfulqa-llama3-8b.yaml").model_dump(mode="json")
    data |= {"feedback": {"kind": "heldout_loss", "file": "none"}, "storage": "studies"}
    for domain in data["domains"]:
        row = HUB_ROWS[domain["name"]][0]
        varied = next(key for key in ("question", "qtext", "ctx", "text") if key in row)
        table = pa.Table.from_pylist([{**row, varied: f"{row[varied]} {number}"} for number in range(20)])
        (tmp_path / domain["name"]).mkdir()
        pq.write_table(table, tmp_path / domain["name"] / f"{domain['split']}.parquet")
        domain["source"] = f"hf:./{domain['name']}"
    domains = prepare_domains(config_from(data, folder=tmp_path), tiny_tokenizer())
    assert [domain.name for domain in domains] == list(HUB_ROWS)
    for domain in domains:
        assert domain.report.n_bad == 0
        assert domain.report.n_read == (10 if domain.name == "truthfulqa" else 20)
        assert domain.train.texts([0])[0]["completion"].startswith(HUB_ROWS[domain.name][2])


def test_the_pubmedqa_task_asks_in_lm_evals_words(tmp_path: Path) -> None:
    """The task file on local rows of the hub's schema; lm-eval's own function writes the expected prompt."""
    from lm_eval.tasks.pubmedqa.preprocess_pubmedqa import doc_to_text

    from duet_ray.feedback import make_feedback

    task = yaml.safe_load((JOBS / "paper" / "tasks" / "pubmedqa_labelled.yaml").read_text(encoding="utf-8"))
    row = {"QUESTION": "Does it?", "CONTEXTS": ["One.", "Two."], "final_decision": "maybe"}
    files = task["dataset_kwargs"]["data_files"]
    assert sorted(files) == ["test", "train"]
    for split, url in files.items():
        assert url == (
            "hf://datasets/bigbio/pubmed_qa@refs%2Fconvert%2Fparquet/"
            f"pubmed_qa_labeled_fold0_source/{split}/0000.parquet"
        )
        pq.write_table(pa.Table.from_pylist([row] * 4), tmp_path / f"{split}.parquet")
        files[split] = f"{split}.parquet"
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    section = {"kind": "lm_eval", "tasks": {"pubmedqa_labelled": 1}, "tasks_folder": ".", "direction": "maximize"}
    data = {"name": "s", "model": {"path": "m"}, "domains": [{"name": "a", "source": "a"}], "feedback": section}
    source = make_feedback(config_from(data, folder=tmp_path))
    assert source.check() == []
    assert list(source.task_texts()) == [doc_to_text(row)] * 4
    assert next(iter(source.task_texts())) == HUB_ROWS["pubmedqa"][1]


@pytest.mark.parametrize("path", FULL, ids=ids(FULL))
def test_a_full_study_finds_the_scores_of_the_lora_study(path: Path, tmp_path: Path) -> None:
    """On the same data and model, each key of a stored weight is the same in both; with a tiny model in their place."""
    twin = JOBS / "paper" / f"{task_of(path)}-llama3-8b.yaml"
    keys = [weights_keys(file, tmp_path) for file in (path, twin)]
    assert keys[0] == keys[1]
    assert len(keys[0]) == len(WORDS)
    assert weights_keys(path, tmp_path, "selection.fit.rank=64") != keys[1]


def weights_keys(path: Path, folder: Path, *overrides: str) -> tuple[str, ...]:
    """The keys of a study's weights, its model, data and task replaced by tiny ones."""
    config = load_config(path, overrides)
    write_tiny_model(folder / "model")
    for name, word in WORDS.items():
        write_rows(folder / f"{name}.jsonl", word, 30)
    write_rows(folder / "task.jsonl", "aaab", 4, first=1000)
    data = config.model_dump(mode="json")
    data["model"]["path"] = "model"
    data["domains"] = [{"name": name, "source": f"{name}.jsonl"} for name in WORDS]
    data["feedback"] = {"kind": "heldout_loss", "file": "task.jsonl"}
    data["storage"] = "studies"
    return preflight(config_from(data, folder=folder)).weights_keys


README = (JOBS / "README.md").read_text(encoding="utf-8")
SETTINGS = sorted({text for text in re.findall(r"`(--set [^`]+)`", README) if "…" not in text})


def test_the_readme_has_settings() -> None:
    assert len(SETTINGS) >= 8


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("path", [LORA[0], FULL[0]], ids=ids([LORA[0], FULL[0]]))
def test_the_settings_in_the_readme_go_with_the_studies(settings: str, path: Path) -> None:
    words = shlex.split(settings)
    overrides = [text for flag, text in zip(words[::2], words[1::2], strict=True) if flag == "--set"]
    assert len(overrides) == len(words) / 2
    assert load_config(path, overrides) != load_config(path)


def test_the_readmes_table_names_the_files() -> None:
    for path in PAPER:
        assert f"`{path.stem}`" in README or (path.stem.endswith("-qwen25-7b") and "`-qwen25-7b`" in README)
