"""A toy that goes through everything in seconds: sizes of a two-block Llama, and a character tokenizer."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TOY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer of 64 pieces, made in memory."""
    characters = {chr(code): code - 32 for code in range(32, 95)}
    vocabulary = characters | {"</s>": len(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
