"""Networks on the CPU with packed weights, beside the same ones that rearrange them at every call.

    python benchmarks/packed.py [--rounds 20] [--models fcn8s-voc fcn8s-resnet50 ...]

Each is a bundled model, or the name of a network, which gets random weights. One thread and one image of
341 x 256, as the network sees it; FCN-AlexNet sees 500 x 375.
"""

from __future__ import annotations

import argparse
import datetime
from functools import partial
from unittest.mock import patch

import torch
from border import show

from segcli.inference.benchmark import interleaved, processor_name
from segcli.models.checkpoint import load_model
from segcli.models.fcn import Network
from segcli.models.networks import get
from segcli.models.packed import can_pack
from segcli.models.prepared import prepare
from segcli.models.zoo import bundled_models

MODELS = ("fcn8s-voc", "fcn8s-mobilenet_v3_large", "fcn8s-resnet50", "fcn_resnet50", "fcn-alexnet")


def network_of(name: str) -> Network:
    bundled = bundled_models()
    return load_model(bundled[name]).network if name in bundled else get(name, 21)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", nargs="+", default=MODELS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{datetime.date.today()}, {processor_name()}, torch {torch.__version__}, one thread")
    for name in options.models:
        network = network_of(name)
        images = torch.randn(1, 3, 375, 500) if name == "fcn-alexnet" else torch.randn(1, 3, 256, 341)
        for precision in ("fp32", "bf16"):
            jobs = {}
            for told, possible in {"plain": lambda dtype: False, "packed": can_pack}.items():
                with patch("segcli.models.prepared.can_pack", possible):
                    made = prepare(network, torch.device("cpu"), precision)
                jobs[told] = partial(made.score_pyramid, images)
            with torch.inference_mode():
                show(f"{name} in {precision}", interleaved(jobs, options.rounds))
                plain, packed = (job()[-1] for job in jobs.values())
                error = float((packed - plain).abs().max() / plain.abs().max())
                print(f"  largest difference of scores, of the largest score: {error:.1e}")


if __name__ == "__main__":
    main()
