"""losa against what people run on a CPU: llama.cpp's formats and dense transformers, in turns.

    python benchmarks/engines.py --output OUT --llama BUILD [--model smollm2-135m] [--sparsities 0.5,0.6,0.7] [--threads 2]

Without `--model`, a Llama of TinyLlama's shape with random weights. Speed does not depend on what the weights are, so zeros are
put at random places, and llama.cpp is given the same matrices, without a tokenizer. BUILD is a folder with llama.cpp's
`llama-bench` and `llama-quantize`; build it for this machine (GGML_NATIVE), or llama.cpp is slower than it is.

Every engine runs in a process of its own, all of them once a round; llama.cpp's formats before *and* after losa's, so that a
machine that slows down meanwhile shows. Medians of the rounds go to engines.csv, engines.md and engines.png: tokens a second
after a prompt of 32 (with `--contexts` after one of 512, too), seconds to the first token of 512, memory that the model adds,
bytes that a token reads, and the share of what the measured bandwidth allows. What a GGUF file really holds is counted: where a
width is not a multiple of 256, llama.cpp takes another type than the one asked for, and says so only in its log.

Dense transformers are there in bfloat16 and in float32: a processor without instructions for bfloat16 multiplies prompts in
float32 faster, and reads twice as much for a token.
"""

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

PROMPT, NEW, LONG = 32, 64, 512
A8 = "-a8"  # behind a type of values: activations are rounded to int8, as llama.cpp rounds them
GGUF = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
NAMES = {  # transformers' name of a layer -> llama.cpp's
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(directory: Path, file: Path) -> None:
    """A Llama checkpoint as a bfloat16 GGUF file, for speed only: no tokenizer, no permutation for llama.cpp's rotary order."""
    import gguf
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    tied = config.tie_word_embeddings
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names |= {} if tied else {"lm_head.weight": "output.weight"}
    for block in range(config.num_hidden_layers):
        names |= {f"model.layers.{block}.{ours}.weight": f"blk.{block}.{theirs}.weight" for ours, theirs in NAMES.items()}
    tensors = dict(model.named_parameters())
    for ours, theirs in names.items():
        tensor = tensors[ours].detach()
        if tensor.ndim == 1:
            writer.add_tensor(theirs, tensor.float().numpy())
        else:
            data = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(theirs, np.ascontiguousarray(data), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def contents(file: Path) -> tuple[str, int]:
    """What types a GGUF file's matrices are, by share of the weights, and the bytes that a token reads."""
    import gguf

    tensors = [tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) == 2]
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    read = [tensor for tensor in tensors if not (untied and tensor.name == "token_embd.weight")]
    weights: Counter[str] = Counter()
    for tensor in read:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    total = weights.total()
    return ", ".join(f"{count / total:.0%} {kind}" for kind, count in weights.most_common()), sum(int(t.n_bytes) for t in read)


def llama_bench(build: Path, file: Path, threads: int) -> dict:
    """One run of llama.cpp's own benchmark."""
    line = [
        tool(build, "llama-bench"),
        "-m",
        file,
        "-t",
        str(threads),
        "-p",
        str(LONG),
        "-n",
        str(NEW),
        "-r",
        "1",
        "-ngl",
        "0",
        "-o",
        "json",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    rates = {row["n_gen"] > 0: row["avg_ts"] for row in found}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"tokens_per_s": rates[True], "first_token_s": LONG / rates[False], "peak_mib": max(before, peak) / 1024}


def tool(build: Path, name: str) -> Path:
    """One of llama.cpp's programs."""
    return next(path for path in (build / name, build / "bin" / name) if path.exists())


def ours(directory: str, threads: int, contexts: bool, dtype: str) -> dict:
    """One run of a checkpoint through transformers' `generate`, packed or dense; in this process. With `contexts`, also tokens a
    second after a prompt of 512."""
    import torch

    from losa.models import load
    from losa.runtime.bench import bandwidth, greedy, weight_bytes
    from losa.runtime.clock import Clock
    from losa.runtime.linear import SparseLinear
    from losa.runtime.memory import move_to_huge_pages, resident_bytes

    torch.set_num_threads(threads)
    before = resident_bytes()
    model, _ = load(directory)
    if dtype == "float32":
        model.float()
    if not any(isinstance(module, SparseLinear) for module in model.modules()):
        move_to_huge_pages(model)
    clocks = []
    for prompt, new in ((PROMPT, 8), (PROMPT, NEW), (LONG, NEW if contexts else 2)):
        ids = torch.randint(1000, (1, prompt), generator=torch.Generator().manual_seed(0))
        clocks.append(Clock())
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy(new), streamer=clocks[-1])
    added = resident_bytes() - before  # rows of the embedding that were read, as well
    return {
        "tokens_per_s": clocks[1].rate, "after_512_per_s": clocks[2].rate if contexts else 0.0,
        "first_token_s": clocks[2].first, "added_mib": added / 2**20,
        "token_bytes": weight_bytes(model), "bandwidth": bandwidth(torch.device("cpu")),
    }  # fmt: skip


def prepare(args: argparse.Namespace) -> dict[str, list[Path | str]]:
    """Engines by name: what runs each, and on which file. Files that are there are used again."""
    from common import SHAPES, save_random

    from losa.runtime.files import pack_checkpoint

    folder = args.output / "files" / (args.model.name if args.model else "1.1B")
    folder.mkdir(parents=True, exist_ok=True)
    dense = args.model or folder / "dense"
    if not dense.exists():
        save_random(dense, 0.0, SHAPES["1.1B"])
    engines: dict[str, list[Path | str]] = {}
    if args.llama:
        if not (folder / "BF16.gguf").exists():
            write_gguf(dense, folder / "BF16.gguf")
        for kind in filter(None, args.formats.split(",")):
            file = folder / f"{kind}.gguf"
            if not file.exists():
                subprocess.run(
                    [tool(args.llama, "llama-quantize"), folder / "BF16.gguf", file, kind], check=True, capture_output=True
                )
            engines[f"llama.cpp {kind}"] = ["llama", file]
    for dtype in filter(None, args.dense.split(",")):
        engines[f"transformers, dense {dtype}"] = [dtype, dense]
    for sparsity in args.sparsities.split(","):
        for values in args.values.split(","):
            packed = folder / f"{sparsity}-{values}"
            if not packed.exists():
                zeros(dense, folder / "sparse", float(sparsity))
                kind, rounded = values.removesuffix(A8), "int8" if values.endswith(A8) else "bfloat16"
                head = "keep" if kind == "bfloat16" else args.head
                pack_checkpoint(folder / "sparse", packed, kind, head=head, activations=rounded)
                shutil.rmtree(folder / "sparse")
            engines[f"losa {float(sparsity):.0%} {values}"] = ["bfloat16", packed]
    return engines


def zeros(dense: Path, to: Path, sparsity: float) -> None:
    """A copy of a checkpoint with zeros at random places of its blocks' linear layers."""
    import torch

    from losa.models import find_decoder, load

    shutil.rmtree(to, ignore_errors=True)
    model, tokenizer = load(str(dense))
    torch.manual_seed(0)
    for linear in find_decoder(model).linears().values():
        linear.weight.data[torch.rand(linear.weight.shape) < sparsity] = 0
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


def measure(args: argparse.Namespace, kind: str, file: Path | str) -> dict:
    """One run, in a process of its own."""
    line = [sys.executable, __file__, "--one", kind, str(file), "--threads", str(args.threads), "--output", str(args.output)]
    line += ["--llama", str(args.llama)] if args.llama else []
    line += ["--contexts"] if args.contexts else []
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "THP_MEM_ALLOC_ENABLE": "1", "LOSA_PROGRESS": "0"}
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()[-1])


def table(engines: dict[str, list[Path | str]], runs: dict[str, list[dict]]) -> list[dict]:
    """Medians."""
    bandwidths = [run["bandwidth"] for found in runs.values() for run in found if "bandwidth" in run]
    rows = []
    for name, (kind, file) in engines.items():
        found = runs[name]
        middle = {key: median(run[key] for run in found) for key in found[0]}
        holds, token_bytes = contents(Path(file)) if kind == "llama" else ("", middle["token_bytes"])
        rate, limit = middle["tokens_per_s"], median(bandwidths) / token_bytes
        rows.append(
            {
                "engine": name, "holds": holds, "tokens_per_s": round(rate, 2),
                "slowest": round(min(run["tokens_per_s"] for run in found), 2),
                "after_512_per_s": round(middle.get("after_512_per_s", 0), 2) or "",
                "first_token_s": round(middle["first_token_s"], 2),
                "memory_mib": round(middle.get("added_mib", middle.get("peak_mib", 0))),
                "token_mb": round(token_bytes / 1e6, 1), "limit": round(limit, 1), "of_limit": round(rate / limit, 2),
            }
        )  # fmt: skip
    return rows


def write(args: argparse.Namespace, rows: list[dict], title: str) -> None:
    """engines.csv, engines.md, engines.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with (args.output / "engines.csv").open("w", newline="") as file:
        print(f"# {title}", file=file)
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        title,
        "",
        "| engine | tokens/s | first token of 512, s | memory, MiB | MB a token | of the memory limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row['engine']} ({row['holds']})" if row["holds"] else row["engine"]
        numbers = [row[key] for key in ("tokens_per_s", "first_token_s", "memory_mib", "token_mb")]
        lines.append(f"| {name} | " + " | ".join(map(str, numbers)) + f" | {row['of_limit']:.0%} |")
    (args.output / "engines.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(rows) + 1), layout="constrained")
    colours = [
        "#8a8a8a" if row["engine"].startswith("llama") else "#c7c7c7" if "dense" in row["engine"] else "#1f77b4" for row in rows
    ]
    bars = axes.barh([row["engine"] for row in rows], [row["tokens_per_s"] for row in rows], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="tokens a second, batch 1", title=title)
    axes.title.set_fontsize(9)
    figure.savefig(args.output / "engines.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--llama", type=Path, help="folder with llama-bench and llama-quantize; without it, no rows of llama.cpp")
    parser.add_argument("--model", type=Path, help="a Llama checkpoint; random weights of TinyLlama's shape when not given")
    parser.add_argument("--sparsities", default="0.5,0.6,0.7")
    parser.add_argument("--formats", default=",".join(GGUF), help="of llama.cpp")
    parser.add_argument("--values", default="bfloat16,int8,int4", help="also int8-a8, int4-a8: activations rounded to int8, too")
    parser.add_argument("--head", default="int8", help="of the output head beside rounded values: int8, int4 or keep")
    parser.add_argument("--dense", default="bfloat16,float32", help="what transformers' dense model computes in, one row each")
    parser.add_argument("--contexts", action="store_true", help="tokens a second after a prompt of 512, too; not of llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, file = args.one
        if kind == "llama":
            print(json.dumps(llama_bench(args.llama, Path(file), args.threads)))
        else:
            print(json.dumps(ours(file, args.threads, args.contexts, kind)))
        return
    import torch

    from losa.system.environment import machine

    torch.set_num_threads(args.threads)
    engines = prepare(args)
    runs: dict[str, list[dict]] = {name: [] for name in engines}
    llama = [name for name, (kind, _) in engines.items() if kind == "llama"]
    for turn in range(args.rounds):
        for name in [*engines, *llama]:
            runs[name].append(measure(args, *engines[name]))
            print(turn + 1, name, json.dumps(runs[name][-1]), flush=True)
    shape = args.model.name if args.model else "TinyLlama's shape"
    write(args, table(engines, runs), f"{shape}, {machine('cpu')}, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
