"""From one photo to its label map: segcli beside what people would use instead.

    OMP_NUM_THREADS=2 python benchmarks/peers.py [--size 375 500] [--rounds 5]

The jobs of a group take turns; medians of wall and processor time are printed (on a busy machine believe the
processor time), and multiplications as PyTorch counts them. What OpenVINO does runs in a process of its own,
whose threads wait as segcli has it with `--runtime openvino`; PyTorch's, which wait otherwise, would be
slower by that. Weights are random, but for the bundled models: time does not depend on them. Peers, each used
as its documentation shows:

- the released FCN-8s, written plainly in PyTorch, float32 under no_grad
- torchvision's fcn_resnet50
- transformers' image-segmentation pipeline with SegFormers

Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from segcli.device import cpus
from segcli.inference.benchmark import (
    Size,
    interleaved,
    multiplications,
    processor_name,
    synthetic_photo,
)
from segcli.inference.calibration import ranges_on
from segcli.inference.decoders import Decoded
from segcli.inference.segmentation import Segmenter
from segcli.inference.sources import Input
from segcli.models.checkpoint import Model, load_model
from segcli.models.fcn import Network
from segcli.models.info import ModelInfo
from segcli.models.networks import get
from segcli.models.preprocessing import PREPROCESSINGS, to_tensor
from segcli.models.vgg import VGG16FCN, WIDTHS
from segcli.models.zoo import bundled_models
from segcli.palettes import CLASS_SETS

Image = npt.NDArray[np.uint8]  # (H, W, 3) RGB
Job = Callable[[], object]
Jobs = dict[str, Job]
CPU = torch.device("cpu")
VOC = CLASS_SETS["voc"]
PRECISIONS = {"torch": ("fp32", "bf16"), "openvino": ("fp32", "bf16", "int8")}
LIBRARIES = ("torch", "torchvision", "openvino", "transformers")
SEGFORMERS = {  # Xie et al. 2021, table 6: blocks of the four stages, and their channels; decoder's channels
    "B0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "B4": ((3, 8, 27, 3), (64, 128, 320, 512), 768),
}


class ReleasedFCN8s(nn.Module):
    """voc-fcn8s/net.py layer by layer, as one writes it in PyTorch; it takes `VGG16FCN`'s weights."""

    def __init__(self, classes: int, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        w1, w2, w3, w4, w5, w6 = widths
        self.conv1_1 = nn.Conv2d(3, w1, 3, padding=100)
        self.conv1_2 = nn.Conv2d(w1, w1, 3, padding=1)
        self.conv2_1 = nn.Conv2d(w1, w2, 3, padding=1)
        self.conv2_2 = nn.Conv2d(w2, w2, 3, padding=1)
        self.conv3_1 = nn.Conv2d(w2, w3, 3, padding=1)
        self.conv3_2 = nn.Conv2d(w3, w3, 3, padding=1)
        self.conv3_3 = nn.Conv2d(w3, w3, 3, padding=1)
        self.conv4_1 = nn.Conv2d(w3, w4, 3, padding=1)
        self.conv4_2 = nn.Conv2d(w4, w4, 3, padding=1)
        self.conv4_3 = nn.Conv2d(w4, w4, 3, padding=1)
        self.conv5_1 = nn.Conv2d(w4, w5, 3, padding=1)
        self.conv5_2 = nn.Conv2d(w5, w5, 3, padding=1)
        self.conv5_3 = nn.Conv2d(w5, w5, 3, padding=1)
        self.fc6 = nn.Conv2d(w5, w6, 7)
        self.fc7 = nn.Conv2d(w6, w6, 1)
        self.score_fr = nn.Conv2d(w6, classes, 1)
        self.score_pool3 = nn.Conv2d(w3, classes, 1)
        self.score_pool4 = nn.Conv2d(w4, classes, 1)
        self.upscore2 = nn.ConvTranspose2d(classes, classes, 4, stride=2, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(classes, classes, 4, stride=2, bias=False)
        self.upscore8 = nn.ConvTranspose2d(classes, classes, 16, stride=8, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.drop = nn.Dropout2d()

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        h = self.relu(self.conv1_1(x))
        h = self.pool(self.relu(self.conv1_2(h)))
        h = self.relu(self.conv2_1(h))
        h = self.pool(self.relu(self.conv2_2(h)))
        h = self.relu(self.conv3_1(h))
        h = self.relu(self.conv3_2(h))
        pool3 = self.pool(self.relu(self.conv3_3(h)))
        h = self.relu(self.conv4_1(pool3))
        h = self.relu(self.conv4_2(h))
        pool4 = self.pool(self.relu(self.conv4_3(h)))
        h = self.relu(self.conv5_1(pool4))
        h = self.relu(self.conv5_2(h))
        h = self.pool(self.relu(self.conv5_3(h)))
        h = self.drop(self.relu(self.fc6(h)))
        h = self.drop(self.relu(self.fc7(h)))
        up2 = self.upscore2(self.score_fr(h))
        score4 = self.score_pool4(pool4)[:, :, 5 : 5 + up2.shape[2], 5 : 5 + up2.shape[3]]
        up4 = self.upscore_pool4(up2 + score4)
        score3 = self.score_pool3(pool3)[:, :, 9 : 9 + up4.shape[2], 9 : 9 + up4.shape[3]]
        scores: Tensor = self.upscore8(up4 + score3)
        return scores[:, :, 31 : 31 + size[0], 31 : 31 + size[1]]


def random_vgg16(classes: int = len(VOC), widths: tuple[int, ...] = WIDTHS) -> VGG16FCN:
    """FCN-8s with random weights that keep signals at one size from layer to layer."""
    network = VGG16FCN(classes, 8, widths=widths).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)  # type: ignore[arg-type]
    return network


def random_model(network: Network, name: str, preprocessing: str) -> Model:
    return Model(network, ModelInfo(name, VOC, PREPROCESSINGS[preprocessing]), Path("random"), "")


def fcn8s_jobs(photo: Image, runtime: str, widths: tuple[int, ...] = WIDTHS) -> Jobs:
    """FCN-8s on VGG16 by a runtime, PyTorch's beside the peer. Prints how far scores lie from the peer's."""
    network = random_vgg16(widths=widths)
    peer = ReleasedFCN8s(network.num_classes, widths).eval()
    peer.load_state_dict(network.state_dict())
    model = random_model(network, "fcn8s", "caffe")
    images = to_tensor(photo, model.info.preprocessing)

    def labels(network: nn.Module) -> npt.NDArray[np.int64]:
        with torch.no_grad():
            scores: Tensor = network(to_tensor(photo, model.info.preprocessing))
            return scores.argmax(1)[0].numpy()

    segmenters = segcli_ways(model, photo, runtime)
    with torch.inference_mode():
        expected = peer(images)
        for way, segmenter in segmenters.items():
            apart = (segmenter.network(images) - expected).abs().max() / expected.abs().max()
            print(f"FCN-8s by {way}: scores {apart:.1e} of the largest score apart", flush=True)
    if runtime != "torch":
        return segcli_jobs(segmenters, photo)
    jobs: Jobs = {
        "written plainly in PyTorch": partial(labels, peer),
        "segcli, plain": partial(labels, network),
        "segcli, windowed": partial(labels, segmenters["torch fp32"].network),
    }
    return jobs | segcli_jobs(segmenters, photo)


def segcli_ways(model: Model, photo: Image, runtime: str) -> dict[str, Segmenter]:
    """What `segcli predict` computes with, by runtime and precision; int8 is calibrated on the photo."""
    ways = {}
    for precision in PRECISIONS[runtime]:
        ranges = None
        if precision == "int8":
            ranges, _ = ranges_on(model.network, [to_tensor(photo, model.info.preprocessing)])
        ways[f"{runtime} {precision}"] = Segmenter(
            model, CPU, ["mask"], precision=precision, runtime=runtime, ranges=ranges
        )
    return ways


def segcli_jobs(segmenters: Mapping[str, Segmenter], photo: Image) -> Jobs:
    """What `segcli predict` does between reading a photo and writing its mask, with all threads for it."""
    picture = Decoded(Input("photo.jpg", "photo.jpg"), photo)

    def job(segmenter: Segmenter) -> object:
        return segmenter.begin([picture]).results()

    return {f"segcli, {way}": partial(job, segmenter) for way, segmenter in segmenters.items()}


def torchvision_jobs(photo: Image) -> Jobs:
    """fcn_resnet50 as torchvision's page on semantic segmentation uses it."""
    from torchvision.models.segmentation import FCN_ResNet50_Weights, fcn_resnet50

    peer = fcn_resnet50(weights=None, weights_backbone=None, num_classes=len(VOC), aux_loss=True).eval()
    preprocess = FCN_ResNet50_Weights.DEFAULT.transforms()
    image = torch.from_numpy(photo).permute(2, 0, 1)

    def documented() -> Tensor:
        batch = preprocess(image).unsqueeze(0)
        prediction = peer(batch)["out"]
        labels: Tensor = prediction.softmax(dim=1).argmax(1)
        return labels

    def without_gradients() -> Tensor:
        with torch.no_grad():
            return documented()

    return {"torchvision, as documented": documented, "torchvision, under no_grad": without_gradients}


def fcn_resnet50_jobs(photo: Image, runtime: str) -> Jobs:
    """The same network by segcli, PyTorch's beside the peer."""
    network = get("fcn_resnet50", len(VOC)).eval()
    model = random_model(network, "fcn_resnet50", "torchvision")
    jobs = torchvision_jobs(photo) if runtime == "torch" else {}
    return jobs | segcli_jobs(segcli_ways(model, photo, runtime), photo)


def segformer_jobs(variant: str, photo: Image) -> Jobs:
    """transformers' image-segmentation pipeline with a SegFormer of random weights."""
    from PIL import Image as pillow
    from transformers import (
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessor,
        pipeline,
    )

    depths, channels, decoder = SEGFORMERS[variant]
    config = SegformerConfig(depths=depths, hidden_sizes=channels, decoder_hidden_size=decoder)
    config.num_labels = len(VOC)
    network = SegformerForSemanticSegmentation(config).train(False)
    segment = pipeline("image-segmentation", model=network, image_processor=SegformerImageProcessor())
    return {f"transformers, SegFormer-{variant}": partial(segment, pillow.fromarray(photo))}


def bundled_jobs(photo: Image, runtime: str) -> Jobs:
    """The bundled models by a runtime, PyTorch's beside the peer."""
    jobs = segformer_jobs("B0", photo) if runtime == "torch" else {}
    for name, file in bundled_models().items():
        found = segcli_jobs(segcli_ways(load_model(file), photo, runtime), photo)
        jobs |= {f"{name}, {way}": job for way, job in found.items()}
    return jobs


def vgg16_jobs(photo: Image, runtime: str) -> Jobs:
    """FCN-8s by a runtime, with PyTorch's a SegFormer of like cost."""
    return fcn8s_jobs(photo, runtime) | (segformer_jobs("B4", photo) if runtime == "torch" else {})


GROUPS: dict[str, Callable[[Image, str], Jobs]] = {
    "FCN-8s on VGG16": vgg16_jobs,
    "fcn_resnet50": fcn_resnet50_jobs,
    "bundled models": bundled_jobs,
}
_jobs: Jobs = {}  # of the process that was started for OpenVINO


@contextlib.contextmanager
def by_openvino(group: str, photo: Image) -> Iterator[Jobs]:
    """What OpenVINO does, in a process of its own whose threads sleep while they wait."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # PyTorch in this process has read it when it was imported
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        names = pool.submit(_prepare, group, photo).result()
        yield {name: partial(_ask, pool, name) for name in names}


def _ask(pool: ProcessPoolExecutor, name: str) -> None:
    pool.submit(_do, name).result()


def _prepare(group: str, photo: Image) -> list[str]:
    torch.manual_seed(0)
    _jobs.update(GROUPS[group](photo, "openvino"))
    return list(_jobs)


def _do(name: str) -> None:
    _jobs[name]()


def compare(group: str, jobs: Jobs, rounds: int) -> None:
    """Time jobs in turns, and print each beside the first."""
    counts = {name: multiplications(job) for name, job in jobs.items()}
    timings = interleaved(jobs, rounds)
    first, *_ = timings.values()
    print(f"\n{group:40} 10^9 mult.  wall ms  processor ms  ratios to the first")
    for name, timing in timings.items():
        counted, used = f"{counts[name] / 1e9:.1f}", f"{timing.processor:.0f}"
        ratios = f"{first.median / timing.median:5.2f}x {first.processor / timing.processor:5.2f}x"
        if "openvino" in name:  # another process, whose multiplications PyTorch does not see
            counted, used, ratios = "-", "-", ratios.split()[0].rjust(6)
        print(f"  {name:38} {counted:>10} {timing.median:8.0f} {used:>13}  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", nargs=2, type=int, default=(375, 500), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    height, width = options.size
    torch.manual_seed(0)
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    where = f"{processor_name()}, {cpus()} CPUs in use, {torch.get_num_threads()} threads"
    print(f"{datetime.date.today()}, {where}")
    print(f"{libraries}; a photo of {width} x {height}, medians of {options.rounds} rounds")
    photo = synthetic_photo(Size(width, height), 0)
    for group, jobs in GROUPS.items():
        with by_openvino(group, photo) as others:
            compare(group, jobs(photo, "torch") | others, options.rounds)


if __name__ == "__main__":
    main()
