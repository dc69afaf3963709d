import numpy as np

from duet_ray.domains import find_overlap, prepare_domains
from tests.domains.domain_toys import questions, write_jsonl

LONG = "a farmer has seventeen red hens and buys four more on monday, how many hens has she got then?"


def test_overlap_by_13_grams_and_whole_questions(tmp_path, study, plain_tokenizer):
    rows = [
        {"prompt": LONG.upper(), "completion": "21"},  # the whole question, other case and punctuation
        {"prompt": "Once more: " + " ".join(LONG.split()[:13]), "completion": "she had 9"},  # 13 words of it
        {"prompt": " ".join(LONG.split()[:12]), "completion": "she had 9"},  # 12 words of it
        {"prompt": "Tell me, who wrote the iliad? Quick!", "completion": "Homer"},  # five words, inside
        {"prompt": "Is it true?", "completion": "yes"},  # a short question, all of the prompt
        {"prompt": "I wonder: is it true or not", "completion": "who wrote it"},  # a short question, inside
        {"prompt": "who wrote", "completion": "the iliad"},  # a question of five words would need `so`
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", questions(5))
    config = study({"name": "a", "source": "a.jsonl"}, {"name": "b", "source": "b.jsonl"},
                   data={"validation_fraction": 0})  # fmt: skip
    domains = prepare_domains(config, plain_tokenizer)
    a, b = find_overlap(domains, [LONG, "Who wrote the Iliad, quick?", "is it true", "", "so who wrote the iliad"])
    assert (a.domain, a.n_rows, a.n_ngram_rows, a.n_question_rows, a.n_overlapping_rows) == ("a", 7, 2, 3, 4)
    assert [(e.line, e.kind) for e in a.examples] == [(1, "question"), (2, "13-gram"), (4, "question"), (5, "question")]
    assert str(a.examples[3]) == "a.jsonl:5 shares a question with the task: “is it true”"
    assert (b.n_rows, b.n_overlapping_rows, b.examples) == (5, 0, ())
    assert [o.n_overlapping_rows for o in find_overlap(domains, [])] == [0, 0]


def test_overlap_agrees_with_the_definition(tmp_path, study, plain_tokenizer):
    """Against all 13-grams compared one by one."""
    rng = np.random.default_rng(0)
    task = [" ".join(rng.choice(list("abcd"), size=20)) for _ in range(400)]
    texts = [" ".join(rng.choice(list("abcdx"), size=30)) for _ in range(100)]
    texts += ["x y " + task[i][:25] + " x" for i in range(20)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    config = study({"name": "a", "source": "a.jsonl", "format": "text"}, data={"validation_fraction": 0})
    domains = prepare_domains(config, plain_tokenizer)

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    everything = set().union(*map(grams, task))
    expected = sum(bool(grams(t) & everything) for t in texts)
    assert find_overlap(domains, task)[0].n_ngram_rows == expected >= 20
