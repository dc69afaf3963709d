"""The models that the quality of selection is measured on, each with its tokenizer and its way of being fine-tuned.

Two are Llamas of two layers that are trained from scratch within a minute, so that they can be fine-tuned again some
hundred times: one on texts, one on made-up facts. The third is a real model from a folder.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import facts
import numpy as np
import torch
import transformers
from corrupted_texts import Text, read_texts
from small_domain import MemoryDomain, MemoryRows, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.domains.encode import EncodedRow, EncodeSettings, encode_rows
from duet_ray.domains.formats import Message, ParsedRow
from duet_ray.likelihood import collate, length_groups, token_nll
from duet_ray.selection.base import SelectionContext

VOCAB_SIZE = 1024
SPECIAL = ("<pad>", "<bos>", "<eos>")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The domain that is scored, and the others."""

    domain: list[Text]
    others: list[Text]
    n_validation: int = 128
    n_test: int = 256

    @classmethod
    def read(cls, folder: Path, domain: str) -> "Texts":
        found = {file.stem: read_texts(file) for file in sorted(folder.glob("*.jsonl")) if "eval" not in file.stem}
        if domain not in found:
            raise SystemExit(f"{folder} has no {domain}.jsonl; there are: {', '.join(found)}")
        return cls(domain=found.pop(domain), others=[text for texts in found.values() for text in texts])


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A base model, its tokenizer, and how it is fine-tuned and scored with."""

    model: Any
    tokenizer: Any
    settings: SelectionConfig
    training: TrainingConfig

    def encode(self, texts: Sequence[Text]) -> MemoryRows:
        rows = [
            ParsedRow(
                file="",
                line=line,
                form="pair",
                messages=(Message("user", text.prompt), Message("assistant", text.response)),
            )
            for line, text in enumerate(texts)
        ]
        settings = EncodeSettings(max_tokens=self.training.max_tokens, chat_template="none")
        found = encode_rows(rows, self.tokenizer, settings)
        assert all(isinstance(row, EncodedRow) for row in found)
        return MemoryRows([row.tokens for row in found if isinstance(row, EncodedRow)])

    def domain(self, train: Sequence[Text], validation: Sequence[Text]) -> MemoryDomain:
        digest = hashlib.sha256(repr((train, validation)).encode()).hexdigest()
        return MemoryDomain("rows", self.encode(train), self.encode(validation), digest[:16])

    def context(self, seed: int, settings: Mapping[str, Any] | None = None) -> SelectionContext:
        return SelectionContext(
            settings=self.settings.model_copy(update=dict(settings or {})),
            training=self.training,
            seed=seed,
            load_base=lambda: (self.model, self.tokenizer),
        )


def mean_loss(model: Any, rows: MemoryRows) -> float:
    """NLL per completion token."""
    total, n_tokens = 0.0, 0
    with torch.no_grad():
        for ids in length_groups(rows.n_tokens.tolist(), 32):
            batch = collate(rows.rows(ids), 0)
            total += float(token_nll(model, batch).sum())
            n_tokens += batch.n_loss_tokens
    return total / n_tokens


def learner_of_texts(texts: Texts, n_steps: int) -> Learner:
    """A Llama of two layers over a small vocabulary, trained from scratch on the other domains."""
    learner = Learner(
        model=tiny_llama(VOCAB_SIZE, 0),
        tokenizer=small_tokenizer([f"{text.prompt} {text.response}" for text in (*texts.others, *texts.domain)]),
        settings=SelectionConfig(method="influence", batch_size=16),
        training=TrainingConfig(rank=8, alpha=16, learning_rate=3e-3, epochs=3, batch_size=16, max_tokens=96),
    )
    rows = learner.encode(texts.others)
    train_from_scratch(learner.model, lambda draws: [rows.row(i) for i in draws.integers(len(rows), size=32)], n_steps)
    return learner


def learner_of_facts(former: facts.Facts, n_steps: int) -> Learner:
    """The same on rows of other facts."""
    learner = Learner(
        model=tiny_llama(facts.VOCAB_SIZE, 0),
        tokenizer=SimpleNamespace(
            pad_token_id=0, bos_token_id=1, eos_token_id=facts.EOS, decode=lambda ids, **_: " ".join(map(str, ids))
        ),
        settings=SelectionConfig(method="influence", batch_size=16),
        training=TrainingConfig(rank=8, alpha=16, learning_rate=5e-3, epochs=4, batch_size=16, max_tokens=16),
    )
    train_from_scratch(learner.model, lambda draws: former.any_rows(64, draws), n_steps)
    return learner


def train_from_scratch(model: Any, batch_of: Callable[[np.random.Generator], list[Any]], n_steps: int) -> None:
    """All weights, on every token of the rows; frozen afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    draws = np.random.default_rng(0)
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / n_steps)
        batch = collate(batch_of(draws), 0)
        mask = batch.attention_mask.bool()
        mask[:, 0] = False
        token_nll(model, replace(batch, loss_mask=mask)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


def small_tokenizer(texts: Sequence[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def real_learner(folder: Path) -> Learner:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return Learner(
        model=model.requires_grad_(False).eval(),
        tokenizer=tokenizer,
        settings=SelectionConfig(method="influence", n_hessian_rows=32, n_prompts=24, epochs=2),
        training=TrainingConfig(
            rank=16,
            learning_rate=2e-4,
            batch_size=16,
            micro_batch_size=8,
            max_tokens=96,
            target_modules=["v_proj", "o_proj"],
        ),
    )
