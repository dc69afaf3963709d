"""Prompts and completions → tokens, with a mask of the tokens that are learned.

A row is first rendered to one text and the character spans of its answers, then tokenised as a whole, and a token
counts as learned when it overlaps an answer. Tokenising the whole, not piece by piece, gives the tokens that the
model sees at inference; the price is that a token across the border of prompt and answer is learned too.

With a chat template, an answer begins where the rendering of the turns before it ends, generation prompt included,
and ends with its end-of-turn token. That is right only if that rendering is a prefix of the whole, which is checked
for every answer of every row: a template that rewrites earlier turns gives a bad row, never a wrong mask. Without
one, a row is the prompt, a space where neither side has white space, the completion and the EOS token;
conversations get a label (`User:`, `Assistant:`) before each turn.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from duet_ray.config import StudyConfig
from duet_ray.domains.formats import ParsedRow, Role
from duet_ray.domains.readers import BadRow
from duet_ray.records import TokenRow

_LABELS: Mapping[Role, str] = {"system": "System:", "user": "User:", "assistant": "Assistant:", "tool": "Tool:"}

# Some templates write today's date into the system prompt. A cache must not depend on the day it was made, so the
# date is held fixed, at the one that Llama 3's own template falls back on. `+%}` keeps a line break behind it.
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro +%}"


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """The parts of a study file that decide which tokens a row becomes."""

    max_tokens: int
    """Longer rows are cut on the right."""
    loss_on: Literal["completion", "all"] = "completion"
    chat_template: Literal["auto", "none"] = "auto"

    @classmethod
    def from_config(cls, config: StudyConfig) -> "EncodeSettings":
        return cls(
            max_tokens=config.training.max_tokens,
            loss_on=config.training.loss_on,
            chat_template=config.model.chat_template,
        )


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as the model sees it."""

    tokens: TokenRow
    text: str
    """The whole rendered text, before cutting."""
    was_cut: bool


@dataclass(frozen=True, slots=True)
class _Rendered:
    text: str
    answers: tuple[tuple[int, int], ...]
    """Character spans [start, end) of what is learned, end-of-turn token included."""
    wants_bos: bool
    """Whether the tokenizer's BOS token, if it has the habit of one, goes in front; a template brings its own."""


class _Refused(Exception):
    """A row cannot be rendered; the message is the bad row's reason."""


def chat_template(tokenizer: Any, settings: EncodeSettings) -> str | None:
    """The template that rows are rendered with; None for plain text."""
    if settings.chat_template == "none" or not tokenizer.chat_template:
        return None
    template: str = tokenizer.get_chat_template()
    return _FIXED_DATE + template if "strftime_now" in template else template


def encode_rows(rows: Sequence[ParsedRow], tokenizer: Any, settings: EncodeSettings) -> list[EncodedRow | BadRow]:
    """Tokenise rows, all at once; the result of a row does not depend on the rows beside it.

    Args:
        rows: parsed rows of any format.
        tokenizer: a transformers tokenizer; a fast one is several times quicker.
        settings: template, length and what is learned.

    Returns:
        One entry per row, in order: the encoded row, or the bad row where the template refuses it or where nothing
        is left to predict within `max_tokens`.
    """
    results: list[EncodedRow | BadRow | None] = [None] * len(rows)
    rendered: dict[int, _Rendered] = {}
    template = chat_template(tokenizer, settings)
    ends = special_tokens(tokenizer)
    for index, row in enumerate(rows):
        try:
            rendered[index] = _render(row, tokenizer, template, ends)
        except _Refused as refused:
            results[index] = BadRow(row.file, row.line, str(refused))
    with _no_garbage():
        tokenised = _tokenise(list(rendered.values()), tokenizer)
    for (index, shown), (ids, learned) in zip(rendered.items(), tokenised, strict=True):
        results[index] = _finish(rows[index], shown, ids, learned, settings)
    return [result for result in results if result is not None]


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokenizer's special tokens: those that can end a turn."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*tokenizer.all_special_tokens, *added}))


def _finish(
    row: ParsedRow, rendered: _Rendered, ids: np.ndarray, learned: np.ndarray, settings: EncodeSettings
) -> EncodedRow | BadRow:
    n_tokens = len(ids)
    ids, learned = ids[: settings.max_tokens], learned[: settings.max_tokens]
    if settings.loss_on == "all":
        learned = np.ones(len(ids), dtype=bool)
    learned[:1] = False
    if not learned.any():
        cut = f" of its {n_tokens} tokens" if n_tokens > settings.max_tokens else ""
        reason = f"nothing left to predict within training.max_tokens = {settings.max_tokens}{cut}"
        return BadRow(row.file, row.line, reason)
    return EncodedRow(TokenRow(ids, learned), rendered.text, n_tokens > settings.max_tokens)


# Rendering


def _render(row: ParsedRow, tokenizer: Any, template: str | None, ends: Sequence[str]) -> _Rendered:
    if row.form == "text":
        text = row.completion + (tokenizer.eos_token or "")
        return _Rendered(text, ((0, len(text)),), wants_bos=True)
    if template is not None:
        return _render_template(row, tokenizer, template, ends)
    return _render_pair(row, tokenizer) if row.form == "pair" else _render_labelled(row, tokenizer)


def _render_pair(row: ParsedRow, tokenizer: Any) -> _Rendered:
    prompt, completion = row.prompt, row.completion
    joined = not prompt or prompt[-1].isspace() or completion[0].isspace()
    text = prompt + ("" if joined else " ") + completion + (tokenizer.eos_token or "")
    return _Rendered(text, ((len(prompt), len(text)),), wants_bos=True)


def _render_labelled(row: ParsedRow, tokenizer: Any) -> _Rendered:
    text, answers = "", []
    for message in row.messages:
        text += ("\n\n" if text else "") + _LABELS[message.role]
        start = len(text)
        text += f" {message.content}"
        if message.role == "assistant":
            text += tokenizer.eos_token or ""
            answers.append((start, len(text)))
    return _Rendered(text, tuple(answers), wants_bos=True)


def _render_template(row: ParsedRow, tokenizer: Any, template: str, ends: Sequence[str]) -> _Rendered:
    turns = [{"role": m.role, "content": m.content} for m in row.messages]
    text = _apply(tokenizer, template, turns)
    answers: list[tuple[int, int]] = []
    for number, message in enumerate(row.messages):
        if message.role != "assistant":
            continue
        before = _apply(tokenizer, template, turns[:number], answer_next=True)
        if not text.startswith(before) or (answers and len(before) < answers[-1][1]):
            raise _Refused(
                f"turn {number + 1}: the chat template renders the turns before it differently once it is there, so "
                "that the answer cannot be told from the prompt; set model.chat_template: none"
            )
        start = len(before)
        if number + 1 == len(turns):
            text, end = _close_last(text, start, tokenizer.eos_token, ends)
        else:
            end = _turn_end(text, start, number, turns, tokenizer, template, ends)
        answers.append((start, end))
    return _Rendered(text, tuple(answers), wants_bos=False)


def _close_last(text: str, start: int, eos: str | None, ends: Sequence[str]) -> tuple[str, int]:
    """The text and the end of its last answer, with an EOS token where the template ends without any."""
    end = _without_space(text, start, len(text), ends)
    if text[start:end].endswith(tuple(ends)) or not eos:
        return text, end
    return text + eos, len(text) + len(eos)


def _turn_end(
    text: str,
    start: int,
    number: int,
    turns: Sequence[Mapping[str, str]],
    tokenizer: Any,
    template: str,
    ends: Sequence[str],
) -> int:
    """Where an answer ends that is not the last turn.

    The rendering up to the answer shows it. Templates that treat the newest answer specially (Qwen3 adds an empty
    thought to it) are not a prefix there: then the first special token behind the answer's own words ends it.
    """
    through = _apply(tokenizer, template, turns[: number + 1])
    if text.startswith(through) and len(through) > start:
        return _without_space(text, start, len(through), ends)
    words = turns[number]["content"].strip()
    found = text.find(words, start)
    behind = found + len(words)
    places = [place + len(token) for token in ends if (place := text.find(token, behind)) >= 0]
    if found < 0 or not places:
        raise _Refused(f"turn {number + 1}: the chat template changes it, so that its end cannot be found")
    return min(places)


def _without_space(text: str, start: int, end: int, ends: Sequence[str]) -> int:
    """Leave out white space behind an end-of-turn token: generation has stopped before it."""
    stripped = text[start:end].rstrip()
    return start + len(stripped) if stripped.endswith(tuple(ends)) else end


def _apply(tokenizer: Any, template: str, turns: Sequence[Mapping[str, str]], answer_next: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(turns), chat_template=template, tokenize=False, add_generation_prompt=answer_next
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise _Refused(f"the chat template refuses it: {error}") from error
    return text


# Tokens


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Hold back Python's cyclic garbage collector.

    A tokenizer hands out a tuple for every token, so that the collector goes through all that torch and transformers
    have loaded again and again: a third of the time of a preparation. None of these tuples is in a cycle.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _tokenise(rendered: Sequence[_Rendered], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per text, its ids `(n_tokens,)` int32 and which of them are learned `(n_tokens,)` bool."""
    if not rendered:
        return []
    texts = [r.text for r in rendered]
    plain = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if tokenizer.is_fast:
        output = tokenizer(texts, return_offsets_mapping=True, **plain)
        masks = [_overlapping(o, r.answers) for o, r in zip(output["offset_mapping"], rendered, strict=True)]
    else:
        output = tokenizer(texts, **plain)
        masks = [_by_prefix(i, r, tokenizer, plain) for i, r in zip(output["input_ids"], rendered, strict=True)]
    bos = _leading_bos(tokenizer)
    result = []
    for shown, ids, mask in zip(rendered, output["input_ids"], masks, strict=True):
        front = bos if shown.wants_bos and ids[:1] != bos else []
        result.append((np.asarray(front + ids, np.int32), np.concatenate([np.zeros(len(front), bool), mask])))
    return result


def _leading_bos(tokenizer: Any) -> list[int]:
    """`[bos]` if this tokenizer puts a BOS token before plain text, else `[]`."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _overlapping(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """`(n_tokens,)` bool: the tokens that share a character with an answer."""
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    learned = np.zeros(len(places), dtype=bool)
    for start, end in answers:
        learned |= (places[:, 1] > start) & (places[:, 0] < end)
    return learned


def _by_prefix(ids: Sequence[int], rendered: _Rendered, tokenizer: Any, plain: Mapping[str, Any]) -> np.ndarray:
    """The same without offsets: a border lies where the ids of the text before it stop to agree with the whole's."""
    learned = np.zeros(len(ids), dtype=bool)
    for start, end in rendered.answers:
        first = _agree(ids, tokenizer(rendered.text[:start], **plain)["input_ids"]) if start else 0
        last = len(ids)
        if end < len(rendered.text):
            upto = tokenizer(rendered.text[:end], **plain)["input_ids"]
            agree = _agree(ids, upto)
            last = agree if agree == len(upto) else agree + 1
        learned[first:last] = True
    return learned


def _agree(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences share at their front."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
