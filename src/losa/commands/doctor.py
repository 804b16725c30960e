"""Is this machine ready? Versions, devices, and the whole method on a toy model in about five seconds."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from losa.api import run
from losa.commands.inspect import inspect
from losa.commands.toy import TOY, toy_tokenizer
from losa.config import LosaConfig
from losa.models import load
from losa.models.precision import multiplies
from losa.runtime.dispatch import available, choose
from losa.runtime.files import pack_checkpoint
from losa.system.environment import resolve_device, versions


def environment() -> dict[str, str]:
    """Versions and devices, by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    free, total = psutil.virtual_memory().available / 2**30, psutil.virtual_memory().total / 2**30
    return versions() | {
        "gpu": ", ".join(gpus) or "none visible to torch",
        "memory": f"{free:.1f} of {total:.1f} GiB available",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": "multiplied by the processor"
        if multiplies(torch.bfloat16, torch.device("cpu"))
        else "computed in float32, saved as it is",
        "sparse kernels": f"{choose()} (of {', '.join(available())})" + (f"; on the GPU {choose('cuda')}" if gpus else ""),
    }


def self_test(device: str = "auto") -> dict[str, float]:
    """Runs two dynamic steps on a toy Llama, saves, re-opens and counts zeros.

    Returns:
        Sparsity asked, read back from the file, and perplexities.

    Raises:
        RuntimeError: the result is not what it should be.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TOY, max_position_embeddings=64))
    with TemporaryDirectory() as folder:
        text, output = Path(folder, "text.txt"), Path(folder, "sparse")
        text.write_text("THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG. " * 400, encoding="utf-8")
        values = {
            "output": str(output),
            "sparsity": 0.6,
            "steps": 2,
            "device": device,
            "calibration": {"sequences": 8, "rmi_sequences": 8, "length": 32},
            "train": {"data": str(text), "tokens": 4096, "length": 32},
            "eval": {"length": 32, "windows": 4, "data": str(text)},
        }
        sparse = run(model, toy_tokenizer(), LosaConfig.from_dict(values))
        layers = inspect(output)
        zeros = sum(layer.zeros for layer in layers) / sum(layer.numel for layer in layers)
        reopened = AutoModelForCausalLM.from_pretrained(output)
        same = all(torch.equal(a.cpu(), b) for a, b in zip(sparse.parameters(), reopened.parameters(), strict=True))
        if abs(zeros - 0.6) > 1e-3 or not same:
            raise RuntimeError(f"self-test failed: sparsity {zeros:.4f} (0.6 asked), re-opened model equal: {same}")
        reopened.bfloat16().save_pretrained(output)
        pack_checkpoint(output, Path(folder, "packed"))
        place = resolve_device(device)
        packed, reopened = load(Path(folder, "packed"))[0].to(place), reopened.to(place)
        ids = torch.arange(40, device=place).view(1, -1)  # one token and forty: each goes its own way through the kernels
        difference = max((packed(part).logits - reopened(part).logits).abs().max().item() for part in (ids[:, :1], ids))
        if not difference < 0.01:
            raise RuntimeError(f"self-test failed: logits of the packed model differ by {difference:.4f}")
        found = {"sparsity asked": 0.6, "sparsity in the file": zeros, "packed model differs by": difference}
        return found | dict(sparse.losa_record["perplexity"])
