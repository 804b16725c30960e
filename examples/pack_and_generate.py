"""Pack a sparse checkpoint and write with it: `python examples/pack_and_generate.py SPARSE PACKED [--values int8]`."""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import losa


def main() -> None:
    """Packs while opening, saves what was packed, opens it again and continues a text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sparse", type=Path, help="directory of a sparse checkpoint, as examples/recover.py leaves one")
    parser.add_argument("packed", type=Path, help="directory to write")
    parser.add_argument("--values", default="int8", help="bfloat16, int8 or int4")
    parser.add_argument("--prompt", default="The old man looked at her and said")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    packed = AutoModelForCausalLM.from_pretrained(args.sparse, quantization_config=losa.SparseConfig(args.values))
    packed.save_pretrained(args.packed)
    AutoTokenizer.from_pretrained(args.sparse).save_pretrained(args.packed)
    for folder in (args.sparse, args.packed):
        print(folder, f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 2**20:.1f} MiB")
    model, tokenizer = losa.load(str(args.packed))  # an ordinary transformers model, with packed layers
    inputs = tokenizer(args.prompt, return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=args.tokens)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
