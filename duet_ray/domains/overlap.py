"""Whether the evaluation task's text stands in the training rows: by 13-grams of words, and by whole questions.

A sequence of 13 words that a training row shares with the task is the usual sign of contamination (Brown et al. 2020,
appendix C). Questions shorter than that are looked for as a whole: from five words on anywhere in a row, and the
shortest only where they are all of a row, its prompt or its answer, since "what is it" stands everywhere. Words are
compared in lower case and without punctuation.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from duet_ray.domains.domain import Domain

N_GRAM = 13
MIN_QUESTION_WORDS = 5
_N_EXAMPLES = 5
_CHUNK_ROWS = 1024
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class OverlapExample:
    """A training row that holds text of the task."""

    source: str
    line: int
    kind: str
    """`13-gram` or `question`."""
    words: str
    """The words that they share."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line} shares a {self.kind} with the task: “{self.words}”"


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What one domain's training rows share with the task."""

    domain: str
    n_rows: int
    """Training rows looked at."""
    n_ngram_rows: int
    """Rows that share a 13-gram with the task."""
    n_question_rows: int
    """Rows that hold a whole question of the task."""
    n_overlapping_rows: int
    """Rows that do either."""
    examples: tuple[OverlapExample, ...]
    """The first few."""


def find_overlap(domains: Sequence[Domain], task_texts: Iterable[str]) -> list[Overlap]:
    """Look for the task's questions in every domain's training rows.

    Args:
        domains: the prepared domains.
        task_texts: the task's questions, one text each.

    Returns:
        One overlap per domain, in order; all zero where there are no texts.
    """
    task = _Task()
    for text in task_texts:
        task.add(_words(text))
    return [_overlap(domain, task) for domain in domains]


_Gram = tuple[str, ...]


@dataclass
class _Task:
    """The task's words, cut so that a row can be looked up."""

    grams: set[int] = field(default_factory=set)
    """Hashes of all 13-grams: a task of millions of words still fits, and 64 bits leave no room for chance."""
    questions: dict[int, set[_Gram]] = field(default_factory=dict)
    """Length in words → whole questions of that length."""
    long_questions: dict[_Gram, set[_Gram]] = field(default_factory=dict)
    """First 13 words → whole questions that begin with them."""
    vocabulary: set[str] = field(default_factory=set)

    def add(self, words: list[str]) -> None:
        if not words:
            return
        whole = tuple(words)
        self.vocabulary.update(words)
        if len(words) < N_GRAM:
            self.questions.setdefault(len(words), set()).add(whole)
            return
        self.grams.update(hash(tuple(words[i : i + N_GRAM])) for i in range(len(words) - N_GRAM + 1))
        self.long_questions.setdefault(whole[:N_GRAM], set()).add(whole)

    def shared_gram(self, runs: Sequence[list[str]]) -> _Gram | None:
        """The first 13-gram that a row shares with the task. `runs`: its words, cut where the task lacks one."""
        for run in runs:
            for first in range(len(run) - N_GRAM + 1):
                gram = tuple(run[first : first + N_GRAM])
                if hash(gram) in self.grams:
                    return gram
        return None

    def held_question(self, runs: Sequence[list[str]], parts: Sequence[list[str]]) -> _Gram | None:
        """The first question that stands whole in a row. `parts`: its prompt, its answer and both."""
        for part in parts:
            if (whole := tuple(part)) in self.questions.get(len(whole), ()):
                return whole
        for run in runs:
            for n_words, questions in self.questions.items():
                for first in range(len(run) - n_words + 1 if n_words >= MIN_QUESTION_WORDS else 0):
                    if (gram := tuple(run[first : first + n_words])) in questions:
                        return gram
            for first in range(len(run) - N_GRAM + 1):
                for question in self.long_questions.get(tuple(run[first : first + N_GRAM]), ()):
                    if tuple(run[first : first + len(question)]) == question:
                        return question
        return None

    def runs(self, words: Sequence[str]) -> list[list[str]]:
        """A row's words in pieces that hold only words of the task: nothing shared can cross another word."""
        pieces: list[list[str]] = [[]]
        for word in words:
            if word in self.vocabulary:
                pieces[-1].append(word)
            elif pieces[-1]:
                pieces.append([])
        return [piece for piece in pieces if piece]


def _overlap(domain: Domain, task: _Task) -> Overlap:
    n_ngram = n_question = n_either = 0
    examples: list[OverlapExample] = []
    n_rows = len(domain.train)
    for first in range(0, n_rows if task.vocabulary else 0, _CHUNK_ROWS):
        for row in domain.train.texts(range(first, min(first + _CHUNK_ROWS, n_rows))):
            parts = [_words(row["prompt"]), _words(row["completion"])]
            parts.append(parts[0] + parts[1])
            runs = task.runs(parts[-1])
            gram, question = task.shared_gram(runs), task.held_question(runs, parts)
            n_ngram += gram is not None
            n_question += question is not None
            n_either += gram is not None or question is not None
            shared = question or gram
            if shared and len(examples) < _N_EXAMPLES:
                kind = "question" if question else f"{N_GRAM}-gram"
                words = " ".join(shared)
                examples.append(OverlapExample(source=row["source"], line=row["line"], kind=kind, words=words))
    return Overlap(
        domain=domain.name,
        n_rows=n_rows,
        n_ngram_rows=n_ngram,
        n_question_rows=n_question,
        n_overlapping_rows=n_either,
        examples=tuple(examples),
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
