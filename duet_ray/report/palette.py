"""One look per domain, the same in figures, page and terminal, told apart without relying on hue alone.

Eight colours that people with a colour vision deficiency can tell apart (Okabe & Ito 2008, grey in the place of
black); the ninth domain takes the first colour again with a hatch, and so on: 40 looks before one repeats.
"""

from dataclasses import dataclass

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8A8A8A")
_HATCHES = ("", "////", "....", "xxxx", "----")
_GLYPHS = ("█", "▓", "▒", "░", "▚")
_STRIPES = (
    "",
    "repeating-linear-gradient(135deg,rgba(255,255,255,.75) 0 2px,transparent 2px 6px)",
    "repeating-linear-gradient(90deg,rgba(255,255,255,.75) 0 2px,transparent 2px 6px)",
    "repeating-linear-gradient(45deg,rgba(0,0,0,.55) 0 2px,transparent 2px 6px)",
    "repeating-linear-gradient(0deg,rgba(0,0,0,.55) 0 2px,transparent 2px 6px)",
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

INK = "#1b1f24"
MUTED = "#57606a"
ACCENT = "#0072B2"
BASE = "#D55E00"
UNIFORM = "#009E73"


@dataclass(frozen=True, kw_only=True)
class DomainLook:
    colour: str
    hatch: str
    """For matplotlib."""
    stripes: str
    """A CSS image that is laid over the colour; empty for none."""
    glyph: str
    letter: str
    """Stands for the domain where a terminal shows no colours."""

    @property
    def css(self) -> str:
        image = f";background-image:{self.stripes}" if self.stripes else ""
        return f"background-color:{self.colour}{image}"


def domain_look(index: int) -> DomainLook:
    """The look of the domain at `index` in the study's domain order."""
    turn = index // len(_COLOURS) % len(_HATCHES)
    return DomainLook(
        colour=_COLOURS[index % len(_COLOURS)],
        hatch=_HATCHES[turn],
        stripes=_STRIPES[turn],
        glyph=_GLYPHS[turn],
        letter=_LETTERS[index % len(_LETTERS)],
    )
