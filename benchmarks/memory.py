"""What `losa plan` predicts on a CPU against what `losa run` has resident at its peak.

    python benchmarks/memory.py MODEL --data TEXT [--set key=value ...]

MODEL is a checkpoint, or `1.1B` for a random Llama of TinyLlama's shape. Plan and run each take a fresh process and the same
configuration. A few updates show the peak of a step as well as thousands, so `--set train.tokens=...` may be small.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import sys
from pathlib import Path
from losa.cli import main
sys.argv = ["losa", *sys.argv[1:]]
try:
    main()
except SystemExit as error:
    status = error.code
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(status)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model == "1.1B":
            from common import SHAPES, save_random

            model = str(Path(folder, "model"))
            save_random(Path(model), 0.0, SHAPES["1.1B"])
        sets = [item for pair in args.set for item in ("--set", pair)]
        command = [sys.executable, "-m", "losa", "plan", model, "--device", "cpu", "--json", *sets]
        plan = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        command = [
            sys.executable,
            "-c",
            RUN,
            "run",
            model,
            "--device",
            "cpu",
            "--data",
            args.data,
            "-o",
            str(Path(folder, "o")),
            *sets,
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        resident = int(done.stderr.split()[-1]) * 1024
        record = json.loads(Path(folder, "o", "losa.json").read_text())
    print(json.dumps({name: plan[name] >> 20 for name in ("runtime", "weights", "training", "calibration", "evaluation")}))
    print(json.dumps(record["seconds"]))
    planned = plan["peak_memory"]
    print(f"planned {planned >> 20} MiB, resident {resident >> 20} MiB, ratio {planned / resident:.3f}")


if __name__ == "__main__":
    main()
