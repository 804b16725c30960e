"""`generate` without overhead: transformers' loop around the compiled step takes a tenth of a small packed model's token.

`attach` gives a model another `generate`, which prepares a text as transformers does: its configuration, cache, processors of
logits, and criteria to stop by. Where one text is continued, greedily or by sampling, and nothing but its tokens is asked for,
the loop of this file takes over, by transformers' own door (`custom_generate`): the same processors, draws, criteria and
streamer, around the model's decoder and head alone. Beams, batches, padding, assistants, scores and caches that somebody
brings go the way they always went.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationMixin, MaxLengthCriteria, PreTrainedModel

from losa.runtime.decode import DecodeStep

TAKEN = {"inputs", "input_ids", "attention_mask", "generation_config", "logits_processor", "stopping_criteria", "streamer"}
PASSED = ("cache", "past_key_values", "logits_to_keep")  # to the model with the prompt, as far as `generate` prepares them
ORDINARY: dict[str, tuple[Any, ...]] = {  # what the generation configuration may say where the loop takes over
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "return_dict_in_generate": (None, False),
    "use_cache": (None, True),
    "use_mtp": (None, False),
    "guidance_scale": (None, 1),
    **dict.fromkeys(("cache_implementation", "prefill_chunk_size", "penalty_alpha", "dola_layers"), (None,)),
    **dict.fromkeys(("prompt_lookup_num_tokens", "constraints", "force_words_ids"), (None,)),
}
BETWEEN = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")  # what transformers' loop does between tokens


class Generate:
    """The `generate` of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`, whose documentation holds."""
        step, own = _step(self.model), {}
        if step is not None and step.verified is not False and _plain(self.model, args, kwargs) and step.plan.holds():
            # transformers 5.24 hands everything to a loop but the streamer
            own["custom_generate"] = partial(_decode, step=step, streamer=kwargs.get("streamer"))
        return type(self.model).generate(self.model, *args, **kwargs, **own)


def attach(model: PreTrainedModel) -> None:
    """Gives a model whose decoder has the compiled step (`decode.attach`) the loop."""
    if _step(model) is not None:
        vars(model)["generate"] = Generate(model)


def detach(model: PreTrainedModel) -> None:
    """Takes it away again; a `generate` that somebody else gave the model stays."""
    if isinstance(vars(model).get("generate"), Generate):
        del vars(model)["generate"]


def _plain(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether one text without padding is to be continued, token by token."""
    given = {"inputs": args[0]} | kwargs if len(args) == 1 else kwargs
    ids, mask, config = given.get("inputs", given.get("input_ids")), given.get("attention_mask"), given.get("generation_config")
    sources = [given, *(vars(source) for source in (config, model.generation_config) if source is not None)]
    if any(name in vars(model) or getattr(type(model), name) is not getattr(GenerationMixin, name) for name in BETWEEN):
        return False
    if len(args) > 1 or any(name not in TAKEN and not hasattr(model.generation_config, name) for name in given):
        return False
    if any(source.get(name) not in allowed for source in sources for name, allowed in ORDINARY.items()):
        return False
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        return False
    if mask is not None:
        return mask.shape == ids.shape and bool(mask.all())
    pads = [pad for source in sources if (pad := source.get("pad_token_id")) is not None]  # `generate` would leave them out
    return not any(bool((ids == pad).any()) for pad in pads)


def _step(model: Any) -> DecodeStep | None:
    forward = vars(model.get_decoder()).get("forward")
    return forward if isinstance(forward, DecodeStep) else None


def _decode(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, step: DecodeStep,
    streamer: Any = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The loop: `[1, T]` of the prompt -> `[1, T + new]`."""
    outputs = _prompt(model, step, input_ids, {name: kwargs[name] for name in PASSED if name in kwargs})
    word = "cache" if "cache" in outputs else "past_key_values"
    cached, logits = {word: outputs[word], "use_cache": True, "return_dict": True}, outputs.logits
    head, short, ends = model.get_output_embeddings(), _is_head_alone(model, step), _Ends(stopping_criteria)
    while True:
        scores_1V = logits_processor(input_ids, logits[:, -1].to(torch.float32, copy=True))
        if generation_config.do_sample:
            next_11 = torch.multinomial(scores_1V.softmax(-1), 1)
        else:
            next_11 = scores_1V.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, next_11], 1)
        if streamer is not None:
            streamer.put(next_11[0].cpu())
        if ends.may_end(input_ids.shape[1], next_11) and stopping_criteria(input_ids, None).all():
            break
        hidden_11H = step.after(next_11, cached[word]) if short else None
        logits = model(input_ids=next_11, **cached).logits if hidden_11H is None else head(hidden_11H)
    if streamer is not None:
        streamer.end()
    return input_ids


class _Ends:
    """Tells that no criterion can be met for a fraction of what asking them costs a token: each makes tensors."""

    def __init__(self, criteria: Any) -> None:
        lengths = [one for one in criteria if type(one) is MaxLengthCriteria]
        tokens = [one for one in criteria if type(one) is EosTokenCriteria]
        self.only = len(lengths) + len(tokens) == len(criteria)
        bounds = [bound for one in lengths for bound in (one.max_length, one.max_position_embeddings) if bound]
        self.limit = min(bounds, default=0)
        self.tokens = {token for one in tokens for token in one.eos_token_id.flatten().tolist()}

    def may_end(self, length: int, last: Tensor) -> bool:
        """Whether the criteria have to be asked; beyond the model's positions always, because they warn."""
        return not self.only or length >= self.limit or (bool(self.tokens) and last.item() in self.tokens)


def _prompt(model: Any, step: DecodeStep, input_ids: Tensor, options: dict[str, Any]) -> Any:
    """What the model makes of the prompt. The first one shows whether logits are what the head makes of the decoder's output."""
    if step.head_alone is not None:
        return model(input_ids=input_ids, use_cache=True, return_dict=True, **options)
    hidden = list[Tensor]()
    handle = step.decoder.register_forward_hook(lambda *told: hidden.append(told[-1].last_hidden_state[:, -1:]))
    try:
        outputs = model(input_ids=input_ids, use_cache=True, return_dict=True, **options)
    finally:
        handle.remove()
    head, logits = model.get_output_embeddings(), outputs.logits[:, -1:]
    step.head_alone = any(torch.equal(head(one), logits) for one in hidden)  # several, where threads share the model
    return outputs


def _is_head_alone(model: Any, step: DecodeStep) -> bool:
    """Whether nothing between decoder and logits but the head would be left out."""
    heard = any(module._forward_hooks or module._forward_pre_hooks for module in (model, step.decoder))
    return bool(step.head_alone) and not heard and "forward" not in vars(model)
