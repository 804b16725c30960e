"""What the model says before and after, to be read beside the figures: the same words go in each time.

They are ours, not the user's: what a run leaves is published, and texts may be private.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from losa.adapter import reuse_effective_weights
from losa.models import max_length
from losa.runtime.generate import encode, is_chat
from losa.runtime.sampling import for_generation

BEGINNING, QUESTION = "The old man looked at her and said", "What is the capital of France, and what is it known for?"
SAID = 40  # tokens of an answer


def opening(tokenizer: PreTrainedTokenizerBase, window: int) -> tuple[str, Tensor]:
    """A question to a model with a chat template, the beginning of a sentence to any other; and its tokens, `(1, T)`, fewer where
    the window leaves no room for an answer."""
    words = QUESTION if is_chat(tokenizer) else BEGINNING
    ids_1T = encode(tokenizer, [{"role": "user", "content": words}] if is_chat(tokenizer) else words)["input_ids"]
    return words, ids_1T[:, : max(1, window - SAID)]


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_1T: Tensor) -> str:
    """How the model goes on, by the likeliest token each time."""
    ids_1T = ids_1T.to(model.get_input_embeddings().weight.device)
    tokens = min(SAID, max_length(model.config) - ids_1T.shape[1])
    ends = model.generation_config.eos_token_id  # and nothing else of it: whatever a model's files ask for, this is what is said
    greedy = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=ends, pad_token_id=0)
    with reuse_effective_weights(model):
        said_1T = for_generation(model, greedy).generate(ids_1T, attention_mask=torch.ones_like(ids_1T))
    return " ".join(tokenizer.decode(said_1T[0, ids_1T.shape[1] :], skip_special_tokens=True).split())
