"""Toy tokenizers and rows for the tests of domains."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from duet_ray.domains import RowSet

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As SmolLM2's: a default system prompt, and a line break behind every end of turn."""


def make_tokenizer(chat_template: str | None = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE over a few words, with trimmed offsets as GPT-2's and Llama 3's have them."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    words = "user assistant system how are you fine thanks what is two plus four question answer the of and"
    raw.train_from_iterator(
        [words] * 3,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    raw.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(n: int, word: str = "apple") -> list[dict[str, str]]:
    return [{"prompt": f"what is {word} {i}?", "completion": f"the answer {i}"} for i in range(n)]


def prompts(half: RowSet) -> list[str]:
    """The prompts of all rows, in order."""
    return [text["prompt"] for text in half.texts(range(len(half)))]
