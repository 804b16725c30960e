"""An outside reference: llama.cpp on the architecture of benchmarks/decode.py, random weights, BF16 and Q8_0.

    pip install llama-cpp-python gguf
    python benchmarks/outside.py --threads 2

Needs none of losa. Prints tokens per second of decoding after a prompt of 32 tokens, batch 1: the median of the rounds.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import gguf
import numpy as np

HIDDEN, INNER, BLOCKS, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 22, 32, 4, 32000


def write(path: Path, kind: gguf.GGMLQuantizationType) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * VOCABULARY)
    generator = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        weights = generator.standard_normal((rows, columns), dtype=np.float32) * 0.02
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    key_rows = HIDDEN // HEADS * KV_HEADS
    matrix("token_embd.weight", VOCABULARY, HIDDEN)
    matrix("output.weight", VOCABULARY, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    for block in range(BLOCKS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(HIDDEN, dtype=np.float32))
        for name, rows, columns in [
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", key_rows, HIDDEN),
            ("attn_v", key_rows, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ]:
            matrix(f"blk.{block}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode(path: Path, threads: int, new: int) -> float:
    """Tokens per second."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval(list(range(1, 33)))
    start = time.perf_counter()
    for token in range(new):
        model.eval([token + 1])
    return new / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=31)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("BF16", "Q8_0"):
            path = Path(folder, f"{name}.gguf")
            write(path, gguf.GGMLQuantizationType[name])
            rates = [decode(path, arguments.threads, arguments.new) for _ in range(arguments.rounds)]
            print(f"llama.cpp {name}: {median(rates):.2f} tokens/s, {path.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
