"""How far is `duet validate`'s memory estimate from what a training really takes?

    OMP_NUM_THREADS=1 python benchmarks/memory.py
    OMP_NUM_THREADS=1 python benchmarks/memory.py --methods fused full
    python benchmarks/memory.py --device cuda --shape 1b --at-once 3

Every setting trains two optimizer steps (the second has Adam's states) in a process of its own. Measured is the peak of
that process's resident memory on a CPU, and of what torch allocated on a GPU. A CPU process is some hundred MiB before
it has a model, so the model's own part is compared too: the peak less what the imports took. Rows are random tokens of
one length, all of them in the loss, which is the worst case that the estimate is for.

A large model is `--model` (a local folder), or one of random weights in the shape of a well-known one (`--shape`); a
tiny Llama is made for the others. `ratio` is estimated / measured: above 1 is on the safe side.

On a GPU the settings are larger, and `held` is what torch's allocator had of the GPU for the same tensors.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from duet_ray.config import StudyConfig, config_from
from duet_ray.training.estimate import CUDA_GIB, GIB, PROCESS_GIB, MemoryEstimate, estimate_memory

TINY = "tiny"
COMMON = {"rank": 16, "alpha": 32}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"model": TINY, "dtype": "float32", "n_tokens": 256, "micro_batch_size": 8},
    {"model": TINY, "dtype": "float32", "n_tokens": 256, "micro_batch_size": 64},
    {"model": TINY, "dtype": "bfloat16", "n_tokens": 256, "micro_batch_size": 64},
    {"dtype": "bfloat16", "n_tokens": 64, "micro_batch_size": 2},
    {"dtype": "bfloat16", "n_tokens": 128, "micro_batch_size": 4},
    {"dtype": "bfloat16", "n_tokens": 128, "micro_batch_size": 8},
    {"dtype": "bfloat16", "n_tokens": 512, "micro_batch_size": 4},
    {"dtype": "bfloat16", "n_tokens": 512, "micro_batch_size": 4, "gradient_checkpointing": True},
    {"dtype": "bfloat16", "n_tokens": 128, "micro_batch_size": 4, "rank": 128},
    {"dtype": "bfloat16", "n_tokens": 128, "micro_batch_size": 4, "target_modules": ["q_proj", "v_proj"]},
    {"dtype": "float32", "n_tokens": 128, "micro_batch_size": 4},
    {"dtype": "float32", "n_tokens": 512, "micro_batch_size": 2},
    {"dtype": "float32", "n_tokens": 512, "micro_batch_size": 4, "gradient_checkpointing": True},
    {"dtype": "bfloat16", "n_tokens": 128, "micro_batch_size": 2, "fuse": 4},
    {"dtype": "bfloat16", "n_tokens": 64, "micro_batch_size": 2, "method": "full"},
    {"dtype": "bfloat16", "n_tokens": 512, "micro_batch_size": 4, "method": "full"},
    {"dtype": "float32", "n_tokens": 128, "micro_batch_size": 4, "method": "full"},
    {"dtype": "bfloat16", "n_tokens": 128, "micro_batch_size": 4, "method": "full", "zero": {"stage": 1}},
    {"dtype": "bfloat16", "n_tokens": 128, "micro_batch_size": 4, "method": "full", "zero": {"stage": 3}},
)

_GPU: dict[str, Any] = {"dtype": "bfloat16", "n_tokens": 512, "micro_batch_size": 4}
GPU_SETTINGS: tuple[dict[str, Any], ...] = (
    _GPU | {"n_tokens": 128},
    _GPU,
    _GPU | {"micro_batch_size": 8},
    _GPU | {"micro_batch_size": 2, "n_tokens": 2048},
    _GPU | {"gradient_checkpointing": True},
    _GPU | {"micro_batch_size": 2, "n_tokens": 2048, "gradient_checkpointing": True},
    _GPU | {"rank": 128},
    _GPU | {"target_modules": ["q_proj", "v_proj"]},
    _GPU | {"dropout": 0.05},
    _GPU | {"dtype": "float32"},
    _GPU | {"dtype": "float32", "n_tokens": 128},
    _GPU | {"dtype": "float32", "gradient_checkpointing": True},
    _GPU | {"fuse": 4, "n_tokens": 128},
    _GPU | {"fuse": 8, "n_tokens": 128},
    _GPU | {"fuse": 8, "n_tokens": 64, "rank": 128, "dropout": 0.05},
    _GPU | {"fuse": 8, "n_tokens": 128, "gradient_checkpointing": True},
    _GPU | {"method": "full"},
    _GPU | {"method": "full", "n_tokens": 128, "zero": {"stage": 1}},
    _GPU | {"method": "full", "n_tokens": 128, "zero": {"stage": 3}},
    _GPU | {"method": "full", "n_tokens": 128, "zero": {"offload_optimizer": True}},
    _GPU | {"method": "full", "n_tokens": 128, "dtype": "float32"},
)

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
"""Of Llama-3.2-1B and of SmolLM2-135M."""


def study_of(setting: dict[str, Any], model: Path, device: str) -> StudyConfig:
    """The study file of a setting: only the model and the training matter here."""
    of_training = {k: v for k, v in setting.items() if k not in ("model", "dtype", "n_tokens")}
    size = of_training["micro_batch_size"]
    data: dict[str, Any] = {
        "name": "memory",
        "model": {"path": str(model), "dtype": setting["dtype"]},
        "domains": [{"name": "rows", "source": "rows.jsonl"}],
        "training": {"fuse": 1} | COMMON | of_training | {"batch_size": size, "max_tokens": setting["n_tokens"]},
        "feedback": {"kind": "heldout_loss", "file": "rows.jsonl", "batch_size": 1},
        "sampling": {"k": setting.get("fuse", 1)},
        "fleet": {"gpus_per_worker": int(device == "cuda")},
    }
    return config_from(data, folder=model.parent)


def write_tiny(folder: Path) -> Path:
    """An untrained Llama of 2 layers, hidden size 64 and 4,096 tokens, of which the first are letters."""
    shape = {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    return write_model(folder, shape)


def made_up(shape: dict[str, Any], dtype: str = "float32", device: str = "cpu") -> Any:
    """A Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(before)


def write_model(folder: Path, shape: dict[str, Any], dtype: str = "float32", device: str = "cpu") -> Path:
    """A Llama of random weights with a tokenizer that has letters and no words, as a model folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    made_up(shape, dtype, device).save_pretrained(folder)
    letters = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate([*letters, *(f"t{i}" for i in range(len(letters), 4096))])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def peak_bytes(reset: bool = False) -> int:
    """The highest resident memory of this process, since the last `reset` (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def measure(config: StudyConfig, device: str) -> dict[str, float]:
    """Train two steps here. Bytes: `imports` before a model is there, `load` at its loading, `train` after it."""
    import numpy as np
    import peft  # noqa: F401  (imported first, so that it counts as the process's and not as the model's)
    import torch

    from duet_ray.records import TokenRow
    from duet_ray.training import load_base, make_trainer

    torch.set_num_threads(1)
    training = config.training
    for module in ("full",) if training.method == "full" else ("lora", "fused_lora"):
        import_module(f"duet_ray.training.{module}")
    if training.method == "full":
        import_module("deepspeed")
    imports = psutil.Process().memory_info().rss
    model, tokenizer = load_base(config, device)
    n_vocab = model.get_input_embeddings().weight.shape[0]
    load = torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()
    generator = np.random.default_rng(0)

    def rows() -> list[TokenRow]:
        ids = generator.integers(2, n_vocab, size=(2 * training.batch_size, training.max_tokens), dtype=np.int32)
        return [TokenRow(one, np.ones(len(one), dtype=bool)) for one in ids]

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        peak_bytes(reset=True)
    if training.fuse == 1:
        make_trainer(training, model, tokenizer).train(rows(), seed=0)
    else:
        from duet_ray.training.fused_lora import FusedSample, train_fused

        with tempfile.TemporaryDirectory() as folder:
            assert training.fuse != "auto"
            samples = [FusedSample(rows=rows(), seed=s, folder=Path(folder) / str(s)) for s in range(training.fuse)]
            if failed := [r for r in train_fused(model, tokenizer, training, samples) if isinstance(r, Exception)]:
                raise failed[0]
    if device == "cuda":
        train, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"imports": 0, "load": load, "train": train, "held": held}
    return {"imports": imports, "load": load, "train": peak_bytes()}


def measure_apart(setting: dict[str, Any], model: Path, device: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(setting), "--model", str(model), "--device", device]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(ended.stderr[-2000:])
    measured: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".demo/model"))
    parser.add_argument("--shape", choices=SHAPES, help="random weights in this shape, instead of a model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--at-once", type=int, default=1, help="settings that are measured at the same time")
    parser.add_argument("--skip", type=int, default=0, help="so many settings to leave out at the beginning")
    parser.add_argument("--methods", nargs="+", default=["lora", "fused", "full"])
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.model = asked.model.resolve()
    if asked.one is not None:
        print(json.dumps(measure(study_of(asked.one, asked.model, asked.device), asked.device)))
        return
    names = ("torch", "transformers", "peft")
    where = platform.machine() if asked.device == "cpu" else gpu_name()
    print(f"{where}, {os.cpu_count()} cores, Python {platform.python_version()},", end=" ")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names), f"({time.strftime('%Y-%m-%d')})\n")
    header = "| model | type | method | rows x tokens | measured GiB | estimated GiB | ratio | model's part, ratio |"
    header += " held GiB |" if asked.device == "cuda" else ""
    print(header + "\n|" + "---|" * (header.count("|") - 1))
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_tiny(Path(folder) / "tiny")
        large = asked.model
        if asked.shape:
            large = write_model(Path(folder) / asked.shape, SHAPES[asked.shape], "bfloat16", asked.device)

        def measured_line(setting: dict[str, Any]) -> str:
            model = tiny if setting.get("model") == TINY else large
            measured = measure_apart(setting, model, asked.device)
            return line(setting, model.name, measured, estimate_memory(study_of(setting, model, asked.device)))

        settings = (SETTINGS if asked.device == "cpu" else GPU_SETTINGS)[asked.skip :]
        with ThreadPoolExecutor(asked.at_once) as pool:
            for found in pool.map(measured_line, [s for s in settings if kind(s) in asked.methods]):
                print(found, flush=True)


def kind(setting: dict[str, Any]) -> str:
    """What `--methods` calls it."""
    return "fused" if setting.get("fuse", 1) > 1 else setting.get("method", "lora")


def line(setting: dict[str, Any], model: str, measured: dict[str, float], estimate: MemoryEstimate) -> str:
    peak = max(measured["load"], measured["train"])
    own = peak - measured["imports"]
    guess = estimate.total_gib
    guess_own = guess - (PROCESS_GIB["cpu"] if estimate.device == "cpu" else CUDA_GIB)
    extras = ["rank", "dropout", "fuse", "target_modules", "zero"]
    method = " ".join([setting.get("method", "lora"), *(f"{k} {setting[k]}" for k in extras if k in setting)])
    method += ", checkpointing" if setting.get("gradient_checkpointing") else ""
    shape = f"{setting['micro_batch_size']} x {setting['n_tokens']}"
    on_gpu = f" {measured['held'] / GIB:.2f} |" if "held" in measured else ""
    return (
        f"| {model} | {setting['dtype']} | {method} | {shape} | {peak / GIB:.2f} | {guess:.2f} | "
        f"{guess * GIB / peak:.2f} | {guess_own * GIB / own:.2f} |{on_gpu}"
    )


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
