"""Promised: every architecture either goes all the way, or is refused at once, in a true sentence; docs/supported.md says which.

`python tests/test_architectures.py` writes the table. Models are tiny and random, made from transformers' own configurations.
"""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from losa.adapter import attach, merge
from losa.calibration import prune_blocks
from losa.config import TrainConfig
from losa.integrations import transformers  # noqa: F401 - opens packed checkpoints
from losa.models import check_supported, find_decoder, logits_by_block
from losa.pruning import Pattern, get_pruner
from losa.runtime.files import pack_checkpoint
from losa.session.result import write_verified
from losa.training import train

PAGE = Path(__file__).parents[1] / "docs" / "supported.md"
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"

# What sizes are called, by whichever names a configuration has them.
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **{
        "num_key_value_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rotary_dim": 4,
        "encoder_layers": 1,
        "num_experts_per_tok": 1,
    },
    **{"state_size": 4, "expand": 2, "layerdrop": 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# Architectures by `model_type`, with what else they need.
TRIED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "vaultgemma": {},
    "phi": {},
    "phi3": {},
    "opt": {},
    "bloom": {},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gptj": {},
    "gpt_bigcode": {},
    "codegen": {},
    "xglm": {},
    "biogpt": {},
    "mpt": {},
    "stablelm": {},
    "starcoder2": {},
    "persimmon": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "granite": {},
    "cohere": {},
    "cohere2": {},
    "glm": {},
    "glm4": {},
    "exaone4": {},
    "smollm3": {},
    "helium": {},
    "diffllama": {},
    "doge": {},
    "apertus": {},
    "arcee": {},
    "ernie4_5": {},
    "seed_oss": {},
    "hunyuan_v1_dense": {},
    "nanochat": {},
    "bitnet": {},
    "modernbert-decoder": {},
    "lfm2": {},
    "ctrl": {},
    "falcon": {},
    "gpt2": {},
    "openai-gpt": {},
    "xlnet": {},
    "mixtral": {},
    "olmoe": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "jamba": {},
    "mamba": {},
    "falcon_mamba": {},
    "recurrent_gemma": {},
    "rwkv": {},
    "bart": {},
    "bert": {},
    "roberta": {},
}


def make(family: str) -> PreTrainedModel:
    """A tiny random model in eval mode."""
    known = AutoConfig.for_model(family).to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in known and not isinstance(known[name], dict | list)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes | TRIED[family])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def go_through(model: PreTrainedModel, folder: Path) -> None:
    """Streams, prunes, trains one step, merges, saves, re-opens and packs a model."""
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = model(input_ids=ids).logits
    streamed = torch.cat([logits for _, logits in logits_by_block(model, ids, 3, torch.device("cpu"))])
    torch.testing.assert_close(streamed, own, rtol=1e-5, atol=1e-5)
    attach(model, whole=True)
    names = [name.removeprefix(f"{find_decoder(model).name}.") for name in find_decoder(model).linears()]
    wanda, free = get_pruner("wanda"), Pattern.parse("unstructured")
    prune_blocks(model, ids, dict.fromkeys(names, 0.5), wanda, free, batch_size=3)
    losses = train(model, ids, TrainConfig(lr=1e-3, batch_size=4), name="step", seed=0, work_dir=folder)
    assert len(losses) == 1
    masks = merge(model)
    zeros = sum(int((~keep).sum()) for keep in masks.values()) / sum(keep.numel() for keep in masks.values())
    assert zeros == pytest.approx(0.5, abs=0.01)
    saved = write_verified(folder, model, None, masks, "")
    with torch.no_grad():
        reopened = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
        assert torch.equal(reopened(input_ids=ids).logits, model(input_ids=ids).logits)
        pack_checkpoint(saved, folder / "packed")
        packed = AutoModelForCausalLM.from_pretrained(folder / "packed").eval()
        rounded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).eval()
        torch.testing.assert_close(packed(input_ids=ids).logits, rounded(input_ids=ids).logits, rtol=0.05, atol=0.02)


def outcome(family: str, folder: Path) -> str:
    """What the table says."""
    model = make(family)
    try:
        check_supported(model)
    except ValueError as error:
        return str(error)
    go_through(model, folder)
    return "works"


def refusal_of_the_skeleton(family: str) -> str | None:
    """What `losa plan` says, which loads no weights."""
    model = make(family)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    try:
        check_supported(skeleton.eval())
    except ValueError as error:
        return str(error)
    return None


def rows() -> dict[str, str]:
    """Of the page, by model type."""
    table = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    return dict(re.findall(r"^\| `([^`]+)` \| [^|]* \| (.*) \|$", table, re.MULTILINE))


@pytest.mark.parametrize("family", TRIED)
def test_architecture(family, tmp_path):
    found = outcome(family, tmp_path)
    assert found == rows()[family]
    assert "\n" not in found
    assert refusal_of_the_skeleton(family) == (None if found == "works" else found)


def test_the_table_is_complete():
    assert rows().keys() == TRIED.keys()
    assert len(TRIED) >= 40


def test_layerdrop_is_off_while_training_and_back_after(tmp_path):
    model = attach(make("biogpt"), whole=True)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.biogpt.layerdrop))
    train(model, torch.ones(4, 8, dtype=torch.int64), TrainConfig(lr=1e-3, batch_size=4), name="x", seed=0, work_dir=tmp_path)
    assert set(seen) == {0.0}
    assert model.biogpt.layerdrop == 0.5


def write() -> None:
    """The table, anew."""
    lines = ["| model type | class | |", "|---|---|---|"]
    for family in TRIED:
        with TemporaryDirectory() as folder:
            found = outcome(family, Path(folder))
        lines.append(f"| `{family}` | {type(make(family)).__name__} | {found} |")
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    sys.exit(write())
