"""How long a fresh process takes: `import torch`, `segcli --help`, and the first mask of the default model.

    OMP_NUM_THREADS=1 python benchmarks/startup.py [--rounds 5]

All take turns after one round to warm up, with compiled Python files at hand as on a user's machine. Printed
are medians of wall and processor time, and what they take beyond `import torch`. The mask is that of one
photo of 500 x 375 from the command line to the end of the process: import, load, decode, forward, write.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
from pathlib import Path

from colorize import compiled_python, take_turns

from segcli.device import cpus
from segcli.inference.benchmark import Size, processor_name, write_photos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}, {processor_name()}, {cpus()} CPUs in use, Python {sys.version.split()[0]}"
    )
    with compiled_python(), tempfile.TemporaryDirectory() as name:
        out = str(Path(name, "masks"))
        (photo,) = write_photos(Path(name, "photos"), [Size(500, 375)], 1)
        segcli = [sys.executable, "-m", "segcli"]
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "segcli --help": [*segcli, "--help"],
            "first mask": [*segcli, "predict", str(photo), "--out", out, "--quiet"],
        }
        times = take_turns(commands, options.rounds, Path(out))
    medians = {
        name: [statistics.median(column) for column in zip(*times[name], strict=True)] for name in times
    }
    torch = medians["import torch"]
    print("seconds           wall  processor   beyond import torch")
    for name, (wall, processor) in medians.items():
        print(f"{name:14} {wall:8.2f} {processor:10.2f} {wall - torch[0]:10.2f} {processor - torch[1]:10.2f}")


if __name__ == "__main__":
    main()
