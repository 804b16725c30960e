"""`losa serve` with one client and with several, in turns, and `generate` alone in a process of its own.

    python benchmarks/serving.py MODEL [MODEL ...] --output OUT [--clients 1 8] [--requests 200] [--tokens 48]

Every model is served by a process of its own, one after the other; name a dense checkpoint too, and the table says what packing
changes. Greedy, every answer as long as asked. Writes serving.csv: requests, failures, tokens a second over all clients, median
seconds of an answer, and memory of the server.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import openai
import psutil

WORDS = ("the old man", "looked", "at her", "and said", "that", "a small house", "stood by", "the river", "in those days")
ALONE = """
import sys, time, losa, torch
model, tokenizer = losa.load(sys.argv[1])
ids, new = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"], int(sys.argv[3])
for _ in range(3):
    start = time.perf_counter()
    model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
print(new / (time.perf_counter() - start))
"""


def prompt_of(number: int) -> str:
    """Another text for every request, so that no cache knows it."""
    return " ".join(WORDS[(number * step + number // 7) % len(WORDS)] for step in range(1, 17))


def ask(client: openai.OpenAI, name: str, number: int, tokens: int) -> tuple[float, int]:
    """Seconds and tokens of one answer; 0 tokens where it failed."""
    start = time.perf_counter()
    try:
        answer = client.completions.create(model=name, prompt=prompt_of(number), max_tokens=tokens, temperature=0)
        return time.perf_counter() - start, answer.usage.completion_tokens
    except openai.OpenAIError:
        return time.perf_counter() - start, 0


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one model."""
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, name, prompt_of(0), str(arguments.tokens)], capture_output=True, text=True, check=True
    )
    rows: list[dict[str, object]] = [{"model": name, "clients": "generate", "tokens_per_second": round(float(alone.stdout), 1)}]
    print(rows[0], flush=True)
    command = [sys.executable, "-m", "losa", "serve", name, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        url = server.stdout.readline().split(" at ")[1].strip()
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        ask(client, name, 0, 4)
        for clients in arguments.clients:
            count = arguments.requests if clients > 1 else max(arguments.requests // 8, 4)
            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                done = list(pool.map(lambda number: ask(client, name, number, arguments.tokens), range(count)))
            seconds = time.perf_counter() - start
            row = {"model": name, "clients": clients, "requests": count, "failures": sum(not tokens for _, tokens in done)}
            row["tokens_per_second"] = round(sum(tokens for _, tokens in done) / seconds, 1)
            row["seconds_of_an_answer"] = round(median(second for second, _ in done), 2)
            row["resident_mib"] = psutil.Process(server.pid).memory_info().rss >> 20
            rows.append(row)
            print(row, flush=True)
        server.terminate()
        assert server.wait() == 0
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="directory for serving.csv")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 1, 8])
    parser.add_argument("--requests", type=int, default=200, help="of several clients; one asks an eighth of it")
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = [row for name in arguments.models for row in measure(name, arguments)]
    with (arguments.output / "serving.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, max(rows, key=len).keys())
        writer.writeheader()
        writer.writerows(rows)
    print((arguments.output / "serving.csv").read_text())


if __name__ == "__main__":
    main()
