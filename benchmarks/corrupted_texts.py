"""Question-and-answer rows, and what can be wrong with them: shuffled words, another row's answer, noisy letters."""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

N_NEIGHBOURS = 5
"""A wrong answer is that of one of so many most similar rows."""
MAX_CHARACTERS = 160
NOISE = 0.15
"""The share of letters that noise replaces."""


@dataclass(frozen=True)
class Text:
    """One row as people read it."""

    prompt: str
    response: str


def read_texts(file: Path) -> list[Text]:
    """Rows of a jsonl file of `{"prompt": …, "response": …}`: the short ones, with answers of at least three words."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = [Text(row["prompt"], row["response"]) for row in rows]
    return [t for t in found if len(t.prompt) + len(t.response) <= MAX_CHARACTERS and len(t.response.split()) >= 3]


def shuffled_words(texts: Sequence[Text], generator: np.random.Generator) -> list[Text]:
    """The words of every answer in another order."""
    found = []
    for text in texts:
        words = text.response.split()
        shuffled = words
        while shuffled == words and len(set(words)) > 1:
            shuffled = [words[i] for i in generator.permutation(len(words))]
        found.append(replace(text, response=" ".join(shuffled)))
    return found


def wrong_answers(texts: Sequence[Text], generator: np.random.Generator, pool: Sequence[Text]) -> list[Text]:
    """The answer of a similar row of `pool`: good text in the right style that does not answer this question."""
    bags = [Counter(_words(f"{text.prompt} {text.response}")) for text in pool]
    n_with = Counter(word for bag in bags for word in bag)
    vectors = [{w: n * math.log(len(bags) / n_with[w]) for w, n in bag.items()} for bag in bags]
    found = []
    for text in texts:
        bag = Counter(_words(f"{text.prompt} {text.response}"))
        likeness = [
            sum(n * vector.get(w, 0.0) for w, n in bag.items()) / (math.sqrt(sum(v * v for v in vector.values())) or 1)
            if other.response != text.response
            else -1.0
            for vector, other in zip(vectors, pool, strict=True)
        ]
        nearest = np.argsort(likeness)[-N_NEIGHBOURS:]
        found.append(replace(text, response=pool[int(generator.choice(nearest))].response))
    return found


def noisy_letters(texts: Sequence[Text], generator: np.random.Generator) -> list[Text]:
    """Some letters of every answer replaced by others."""
    letters = np.array(list(string.ascii_lowercase))

    def noisy(answer: str) -> str:
        hit = generator.random(len(answer)) < NOISE
        new = generator.choice(letters, size=len(answer))
        return "".join(n if h and c.isalpha() else c for c, h, n in zip(answer, hit, new, strict=True))

    return [replace(text, response=noisy(text.response)) for text in texts]


def mixed(texts: Sequence[Text], generator: np.random.Generator, pool: Sequence[Text]) -> list[Text]:
    """A third of each."""
    thirds = [texts[i::3] for i in range(3)]
    found = list(texts)
    found[0::3] = shuffled_words(thirds[0], generator)
    found[1::3] = wrong_answers(thirds[1], generator, pool)
    found[2::3] = noisy_letters(thirds[2], generator)
    return found


Corruption = Callable[[Sequence[Text], np.random.Generator, Sequence[Text]], list[Text]]
"""(texts, generator, the rows that wrong answers are taken from) → the texts with other answers."""

CORRUPTIONS: dict[str, Corruption] = {
    "shuffled words": lambda texts, generator, _: shuffled_words(texts, generator),
    "wrong answers": wrong_answers,
    "noisy letters": lambda texts, generator, _: noisy_letters(texts, generator),
    "mixed": mixed,
}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
