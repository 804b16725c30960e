"""What the model says before and after: words that go on from the evaluation text, to be read beside the figures."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from losa.adapter import reuse_effective_weights
from losa.models import max_length

GIVEN, SAID = 24, 40  # tokens of the prompt, and of what follows


def prompt_ids(evaluation_ST: Tensor, window: int) -> Tensor:
    """The first tokens of the evaluation text, `(1, T)`; less where the window leaves no room for what follows."""
    return evaluation_ST[:1, : max(1, min(GIVEN, window - SAID))]


@torch.no_grad()
def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_1T: Tensor) -> str:
    """How the model goes on, by the likeliest token each time."""
    ids_1T = ids_1T.to(model.get_input_embeddings().weight.device)
    room = max_length(model.config) - ids_1T.shape[1]
    with reuse_effective_weights(model):
        said_1T = model.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=min(SAID, room), do_sample=False, pad_token_id=0
        )
    return " ".join(tokenizer.decode(said_1T[0, ids_1T.shape[1] :], skip_special_tokens=True).split())
