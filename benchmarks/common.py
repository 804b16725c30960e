"""What several benchmarks share: random Llamas of known shapes, and one step of training them. No benchmark imports another."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from losa.adapter import attach, dense_mode, masked_linears
from losa.commands.toy import toy_tokenizer
from losa.loss import causal_loss
from losa.models import find_decoder

SHAPES = {
    "1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "7B": {"max_position_embeddings": 4096},  # LlamaConfig's own defaults are Llama-2-7B's shape
}  # fmt: skip
RANK = 16  # of adapters
Step = Callable[[Tensor], None]


def random_model(shape: dict[str, int], device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    return model.train()


def random_mask(weight: Tensor) -> Tensor:
    return torch.rand(weight.shape, device=weight.device) > 0.7


def save_random(directory: Path, sparsity: float, shape: dict[str, int], device: str = "cpu") -> None:
    """Random weights, the linear layers of the blocks with zeros at random places; `device` draws them."""
    model = random_model(shape, device)
    for linear in find_decoder(model).linears().values():
        linear.weight.data[torch.rand(linear.weight.shape, device=device) < sparsity] = 0
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    toy_tokenizer().save_pretrained(directory)


def losa_model(shape: dict[str, int], device: str) -> nn.Module:
    model = attach(random_model(shape, device), max_rank=RANK)
    for layer in masked_linears(model).values():
        layer.set_solution(random_mask(layer.weight))
    return model


def stepper(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> Step:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(ids: Tensor) -> None:
        loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def distilled_loss(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad(), dense_mode(model):
        teacher = model(input_ids=ids, use_cache=False).logits
    logits = model(input_ids=ids, use_cache=False).logits
    return causal_loss(logits, ids, teacher, distill=0.5) / ids[:, 1:].numel()
