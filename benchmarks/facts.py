"""A made-up domain of facts, whose rows help or harm a small model to a known degree.

A row is some letters that mean nothing, a subject, and the three letters that are the fact about it. The model was
first trained on other facts about the same subjects, so that fine-tuning has to replace them. Held-out rows ask for
some subjects often and for others seldom. Training rows come in groups that differ in three ways: which subjects they
are about, how many of their rows hold a wrong fact (that of another subject), and how many are about subjects that
are never asked for.
"""

from dataclasses import dataclass

import numpy as np

from duet_ray.records import TokenRow

N_ASKED, N_OTHER, N_LETTERS = 32, 32, 16
_START, _FIRST_LETTER = 3, 4
_FIRST_SUBJECT = _FIRST_LETTER + N_LETTERS
EOS = 2
VOCAB_SIZE = _FIRST_SUBJECT + N_ASKED + N_OTHER


@dataclass(frozen=True)
class Facts:
    """The facts themselves."""

    letters: np.ndarray
    """`(n_subjects, 3)`: those that are asked for first."""

    @classmethod
    def draw(cls, generator: np.random.Generator) -> "Facts":
        return cls(generator.integers(N_LETTERS, size=(N_ASKED + N_OTHER, 3)))

    def row(self, subject: int, generator: np.random.Generator, *, said_of: int | None = None) -> TokenRow:
        """A row about `subject`, with the fact about `said_of` in place of its own."""
        filler = generator.integers(N_LETTERS, size=int(generator.integers(0, 4)))
        fact = self.letters[subject if said_of is None else said_of]
        ids = np.concatenate(
            [[_START], _FIRST_LETTER + filler, [_FIRST_SUBJECT + subject], _FIRST_LETTER + fact, [EOS]]
        )
        return TokenRow(ids.astype(np.int32), np.arange(len(ids)) >= len(filler) + 2)

    def any_rows(self, n_rows: int, generator: np.random.Generator) -> list[TokenRow]:
        """About all subjects alike."""
        return [self.row(int(s), generator) for s in generator.integers(len(self.letters), size=n_rows)]

    def asked_rows(self, n_rows: int, generator: np.random.Generator) -> list[TokenRow]:
        """About subjects as often as they are asked for."""
        return [self.row(int(s), generator) for s in self.asked(n_rows, generator)]

    def asked(self, n_rows: int, generator: np.random.Generator) -> np.ndarray:
        """Subjects as often as they are asked for."""
        often = 1 / (np.arange(N_ASKED) + 4)
        return generator.choice(N_ASKED, size=n_rows, p=often / often.sum())

    def wrong_row(self, subject: int, generator: np.random.Generator) -> TokenRow:
        """A row with the fact about another subject."""
        return self.row(subject, generator, said_of=(subject + int(generator.integers(1, N_ASKED))) % N_ASKED)

    def group(self, n_rows: int, generator: np.random.Generator) -> list[TokenRow]:
        """Training rows, with shares of their own of subjects, of wrong facts and of subjects never asked for."""
        subjects = generator.dirichlet(np.full(N_ASKED, 0.3))
        kinds = generator.choice(3, size=n_rows, p=generator.dirichlet(np.ones(3)))
        rows = []
        for kind in kinds:
            subject = int(generator.choice(N_ASKED, p=subjects))
            if kind == 2:
                rows.append(self.row(N_ASKED + int(generator.integers(N_OTHER)), generator))
            else:
                rows.append(self.wrong_row(subject, generator) if kind == 1 else self.row(subject, generator))
        return rows
