"""A randomly initialised Llama and a character tokenizer: a real causal LM that trains in a second.

`write_tiny_model(folder)` saves both, so that a study file can point `model.path` at the folder.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(ALPHABET)
"""100: four special tokens, the newline and the printable ASCII characters, one token each."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_llama(
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    *,
    hidden_size: int = 32,
    n_layers: int = 2,
    max_tokens: int = 256,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A Llama of some 40,000 random weights, in eval mode. The global generator is left as it was."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def tiny_tokenizer(*, chat_template: bool = False) -> PreTrainedTokenizerFast:
    """One token a character, `<unk>` for what is not printable ASCII. No BOS is added."""
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *ALPHABET))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=256,
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )


def write_tiny_model(folder: Path | str, *, seed: int = 0, chat_template: bool = False) -> Path:
    """Save `tiny_llama` and `tiny_tokenizer` as an ordinary model folder."""
    folder = Path(folder)
    tiny_llama(seed=seed).save_pretrained(folder)
    tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder
