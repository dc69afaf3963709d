from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PythonBackend

from duet_ray.domains import BadRow, EncodedRow, EncodeSettings, Message, ParsedRow, encode_rows
from tests.domains.domain_toys import CHATML, make_tokenizer

LONG = EncodeSettings(max_tokens=10_000)


def pair(prompt: str, completion: str) -> ParsedRow:
    return ParsedRow(
        file="f", line=1, form="pair", messages=(Message("user", prompt), Message("assistant", completion))
    )


def chat(*turns: tuple[str, str]) -> ParsedRow:
    return ParsedRow(file="f", line=1, form="chat", messages=tuple(Message(r, c) for r, c in turns))  # type: ignore[arg-type]


def text(content: str) -> ParsedRow:
    return ParsedRow(file="f", line=1, form="text", messages=(Message("assistant", content),))


def encode(row: ParsedRow, tokenizer: Any, settings: EncodeSettings = LONG) -> EncodedRow:
    (encoded,) = encode_rows([row], tokenizer, settings)
    assert isinstance(encoded, EncodedRow), encoded
    return encoded


def learned(encoded: EncodedRow, tokenizer: Any) -> list[str]:
    """The text of every run of learned tokens."""
    ids, mask = encoded.tokens.input_ids, encoded.tokens.loss_mask
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    borders = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return [tokenizer.decode(ids[a:b]) for a, b in borders.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("prompt", "completion", "whole", "answer"),
    [
        ("two plus two is", "four", "two plus two is four</s>", " four</s>"),
        ("Q: two\nA:\n", "four", "Q: two\nA:\nfour</s>", "four</s>"),
        ("two is", "\ntwo", "two is\ntwo</s>", "\ntwo</s>"),
        ("é🙂", "🙂", "é🙂 🙂</s>", " 🙂</s>"),
    ],
)
def test_plain_pairs_learn_the_completion_and_eos(plain_tokenizer, prompt, completion, whole, answer):
    encoded = encode(pair(prompt, completion), plain_tokenizer)
    assert encoded.text == whole
    assert plain_tokenizer.decode(encoded.tokens.input_ids) == whole
    assert learned(encoded, plain_tokenizer) == [answer]


def test_an_empty_prompt_still_leaves_token_0_unpredicted(plain_tokenizer):
    encoded = encode(pair("", "two plus two"), plain_tokenizer)
    assert encoded.text == "two plus two</s>"
    assert list(encoded.tokens.loss_mask) == [False] + [True] * (len(encoded.tokens) - 1)


def test_text_learns_all_but_the_first(plain_tokenizer):
    encoded = encode(text("two plus two"), plain_tokenizer)
    assert plain_tokenizer.decode(encoded.tokens.input_ids) == "two plus two</s>"
    assert list(encoded.tokens.loss_mask) == [False] + [True] * (len(encoded.tokens) - 1)


def test_bos_where_the_tokenizer_has_that_habit(plain_tokenizer):
    habit = make_tokenizer(bos=True)
    without = encode(pair("two plus", "two"), plain_tokenizer).tokens
    with_bos = encode(pair("two plus", "two"), habit).tokens
    assert list(with_bos.input_ids) == [habit.bos_token_id, *without.input_ids]
    assert list(with_bos.loss_mask) == [False, *without.loss_mask]
    # With BOS in front, the first token of a text is predicted.
    assert encode(text("two"), habit).tokens.loss_mask.tolist()[:2] == [False, True]
    # A template brings its own: nothing is put before it.
    templated = make_tokenizer(CHATML, bos=True)
    assert encode(pair("two", "two"), templated).tokens.input_ids[0] == templated.convert_tokens_to_ids("<|im_start|>")


def test_template_learns_every_answer_with_its_end_of_turn(chat_tokenizer):
    row = chat(("user", "how are you"), ("assistant", "fine"), ("user", "and two plus two"), ("assistant", "is four"))
    encoded = encode(row, chat_tokenizer)
    assert encoded.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhow are you<|im_end|>\n"
        "<|im_start|>assistant\nfine<|im_end|>\n<|im_start|>user\nand two plus two<|im_end|>\n"
        "<|im_start|>assistant\nis four<|im_end|>\n"
    )
    assert learned(encoded, chat_tokenizer) == ["fine<|im_end|>", "is four<|im_end|>"]


def test_a_pair_is_a_conversation_of_two_turns(chat_tokenizer):
    one = encode(pair("how", "fine"), chat_tokenizer)
    two = encode(chat(("user", "how"), ("assistant", "fine")), chat_tokenizer)
    assert one.text == two.text
    assert np.array_equal(one.tokens.input_ids, two.tokens.input_ids)
    assert np.array_equal(one.tokens.loss_mask, two.tokens.loss_mask)


def test_mask_agrees_with_the_templates_own_generation_tags():
    """transformers' `return_assistant_tokens_mask`, on a template with generation tags, as reference."""
    tagged = CHATML.replace(
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n\n",
    )
    tokenizer = make_tokenizer(tagged)
    turns = [
        ("system", "s"),
        ("user", "how are you"),
        ("assistant", "fine"),
        ("user", "é"),
        ("assistant", "and 🙂 you"),
    ]
    encoded = encode(chat(*turns), tokenizer)
    reference = tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in turns], return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.tokens.input_ids.tolist() == reference["input_ids"]
    assert encoded.tokens.loss_mask.tolist() == [bool(m) for m in reference["assistant_masks"]]
    assert sum(reference["assistant_masks"]) > 5


def test_template_without_end_token_gets_eos():
    tokenizer = make_tokenizer(
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    encoded = encode(chat(("user", "how"), ("assistant", "fine"), ("user", "you"), ("assistant", "two")), tokenizer)
    assert encoded.text.endswith("two\n</s>")
    assert learned(encoded, tokenizer) == ["fine\n", "two\n</s>"]


def test_template_that_treats_the_newest_answer_specially():
    """Qwen3 puts an empty thought into the answer after the last question only."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = chat(("user", "how"), ("assistant", " fine "), ("user", "you"), ("assistant", "two"))
    assert learned(encode(row, tokenizer), tokenizer) == [" fine <|im_end|>", "<think></think>two<|im_end|>"]


def test_template_that_treats_the_newest_answer_specially_and_ends_no_other():
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: "
        "{% if m.role == 'assistant' and loop.last %}!{{ m.content }}</s>{% else %}{{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = chat(("user", "how"), ("assistant", "fine"), ("user", "you"), ("assistant", "two"))
    (bad,) = encode_rows([row], tokenizer, LONG)
    assert str(bad).startswith("f:1 turn 4: the chat template renders the turns before it differently")
    assert learned(encode(pair("how", "fine"), tokenizer), tokenizer) == ["!fine</s>"]


def test_template_that_rewrites_the_prompt_gives_a_bad_row():
    tokenizer = make_tokenizer(
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    good_or_bad = encode_rows([pair("how", "fine")], tokenizer, LONG)
    assert [str(row) for row in good_or_bad] == [
        "f:1 turn 2: the chat template renders the turns before it differently once it is there, so that the answer "
        "cannot be told from the prompt; set model.chat_template: none"
    ]
    off = EncodeSettings(max_tokens=100, chat_template="none")
    assert encode(pair("how", "fine"), tokenizer, off).text == "how fine</s>"


def test_template_that_refuses_a_role():
    tokenizer = make_tokenizer("{{ raise_exception('System role not supported') }}")
    assert encode_rows([pair("how", "fine")], tokenizer, LONG) == [
        BadRow("f", 1, "the chat template refuses it: System role not supported")
    ]


def test_template_with_todays_date_does_not_depend_on_the_day():
    tokenizer = make_tokenizer("\nToday: {{ strftime_now('%d %b %Y') }}\n" + CHATML)
    assert encode(pair("how", "fine"), tokenizer).text.startswith("\nToday: 26 Jul 2024\n<|im_start|>system")


def test_conversations_without_a_template_are_labelled(plain_tokenizer):
    row = chat(("system", "be"), ("user", "how"), ("assistant", "fine"), ("user", "you"), ("assistant", "two"))
    encoded = encode(row, plain_tokenizer)
    assert encoded.text == "System: be\n\nUser: how\n\nAssistant: fine</s>\n\nUser: you\n\nAssistant: two</s>"
    assert learned(encoded, plain_tokenizer) == [" fine</s>", " two</s>"]


def test_loss_on_all(chat_tokenizer):
    everything = EncodeSettings(max_tokens=100, loss_on="all")
    mask = encode(pair("how", "fine"), chat_tokenizer, everything).tokens.loss_mask
    assert mask.tolist() == [False] + [True] * (len(mask) - 1)


def test_cut_from_the_right(plain_tokenizer):
    whole = encode(pair("two plus two is", "four " * 9), plain_tokenizer).tokens
    prompt = int(np.flatnonzero(whole.loss_mask)[0])
    cut = encode(pair("two plus two is", "four " * 9), plain_tokenizer, EncodeSettings(max_tokens=prompt + 2))
    assert cut.was_cut
    assert cut.tokens.input_ids.tolist() == whole.input_ids[: prompt + 2].tolist()
    assert cut.tokens.loss_mask.sum() == 2
    exact = encode(pair("two plus two is", "four " * 9), plain_tokenizer, EncodeSettings(max_tokens=len(whole)))
    assert not exact.was_cut
    (bad,) = encode_rows([pair("two plus two is", "four")], plain_tokenizer, EncodeSettings(max_tokens=prompt))
    assert str(bad) == (f"f:1 nothing left to predict within training.max_tokens = {prompt} of its {prompt + 2} tokens")


class Letters(PythonBackend):
    """A slow tokenizer without offsets: one token a letter, and one for each of two special words."""

    def __init__(self, **options: Any) -> None:
        self.known: dict[str, int] = {}
        super().__init__(eos_token="</s>", pad_token="</s>", **options)

    @property
    def vocab_size(self) -> int:
        return 1000

    def get_vocab(self) -> dict[str, int]:
        return {**{chr(i): i for i in range(1000)}, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def test_slow_tokenizers_give_the_mask_without_offsets():
    tokenizer = Letters()
    assert not tokenizer.is_fast
    row = chat(("user", "how"), ("assistant", "fine"), ("user", "you"), ("assistant", "two"))
    encoded = encode(row, tokenizer)
    eos = tokenizer.eos_token_id
    shown = "".join("#" if i == eos else chr(i) for i in encoded.tokens.input_ids)
    assert shown == "User: how\n\nAssistant: fine#\n\nUser: you\n\nAssistant: two#"
    marks = "".join("^" if m else " " for m in encoded.tokens.loss_mask)
    assert marks == "                     ^^^^^^                       ^^^^^"


words = st.text(alphabet="abc é🙂\n<>_.|", min_size=1, max_size=12)
contents = words.filter(lambda t: t.strip())
rows_of_any_form = st.one_of(
    st.builds(pair, words, contents),
    st.builds(text, contents),
    st.builds(lambda a, b, c, d: chat(("user", a), ("assistant", b), ("user", c), ("assistant", d)),
              words, contents, words, contents),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(rows_of_any_form, max_size=6), st.booleans(), st.integers(4, 60))
def test_a_batch_equals_row_by_row(rows, with_template, max_tokens):
    tokenizer = TOKENIZERS[with_template]
    limit = EncodeSettings(max_tokens=max_tokens)
    together = encode_rows(rows, tokenizer, limit)
    apart = [encode_rows([row], tokenizer, limit)[0] for row in rows]
    assert len(together) == len(rows)
    for a, b in zip(together, apart, strict=True):
        assert type(a) is type(b)
        if isinstance(a, EncodedRow) and isinstance(b, EncodedRow):
            assert a.tokens.input_ids.tolist() == b.tokens.input_ids.tolist()
            assert a.tokens.loss_mask.tolist() == b.tokens.loss_mask.tolist()
            assert (a.text, a.was_cut) == (b.text, b.was_cut)
            assert len(a.tokens) <= max_tokens
            assert a.tokens.loss_mask.any()
            assert not a.tokens.loss_mask[0]


TOKENIZERS = [make_tokenizer(), make_tokenizer(CHATML)]
