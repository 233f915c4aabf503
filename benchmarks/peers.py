"""From one photo to its label map: segcli beside what people would use instead.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2 python benchmarks/peers.py [--size 375 500] [--rounds 5]

(PASSIVE is what segcli itself asks for with `--runtime openvino`, before PyTorch is imported.)
All jobs take turns in one run; medians of wall and processor time are printed (on a busy machine believe the
processor time), and multiplications as PyTorch counts them. Weights are random, but for the bundled models:
time does not depend on them. Peers, each used as its documentation shows:

- the released FCN-8s, written plainly in PyTorch, float32 under no_grad
- torchvision's fcn_resnet50
- transformers' image-segmentation pipeline with SegFormers

Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Mapping
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
CPU = torch.device("cpu")
VOC = CLASS_SETS["voc"]
WAYS = (
    ("torch", "fp32"),
    ("torch", "bf16"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
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


def fcn8s_jobs(photo: Image, widths: tuple[int, ...] = WIDTHS) -> dict[str, Job]:
    """FCN-8s on VGG16 in every way. Prints how far the scores lie from the first's."""
    network = random_vgg16(widths=widths)
    peer = ReleasedFCN8s(network.num_classes, widths).eval()
    peer.load_state_dict(network.state_dict())
    model = random_model(network, "fcn8s", "caffe")
    images = to_tensor(photo, model.info.preprocessing)

    def labels(network: nn.Module) -> npt.NDArray[np.int64]:
        with torch.no_grad():
            scores: Tensor = network(to_tensor(photo, model.info.preprocessing))
            return scores.argmax(1)[0].numpy()

    segmenters = segcli_ways(model, photo)
    with torch.inference_mode():
        expected = peer(images)
        for way, segmenter in segmenters.items():
            apart = (segmenter.network(images) - expected).abs().max() / expected.abs().max()
            print(f"FCN-8s by {way}: scores {apart:.1e} of the largest score apart")
    jobs: dict[str, Job] = {
        "written plainly in PyTorch": partial(labels, peer),
        "segcli, plain": partial(labels, network),
        "segcli, windowed": partial(labels, segmenters["torch fp32"].network),
    }
    return jobs | segcli_jobs(segmenters, photo)


def segcli_ways(model: Model, photo: Image) -> dict[str, Segmenter]:
    """What `segcli predict` computes with, by runtime and precision; int8 is calibrated on the photo."""
    ways = {}
    for runtime, precision in WAYS:
        ranges = None
        if precision == "int8":
            ranges, _ = ranges_on(model.network, [to_tensor(photo, model.info.preprocessing)])
        ways[f"{runtime} {precision}"] = Segmenter(
            model, CPU, ["mask"], precision=precision, runtime=runtime, ranges=ranges
        )
    return ways


def segcli_jobs(segmenters: Mapping[str, Segmenter], photo: Image) -> dict[str, Job]:
    """What `segcli predict` does between reading a photo and writing its mask, with all threads for it."""
    picture = Decoded(Input("photo.jpg", "photo.jpg"), photo)

    def job(segmenter: Segmenter) -> object:
        return segmenter.begin([picture]).results()

    return {f"segcli, {way}": partial(job, segmenter) for way, segmenter in segmenters.items()}


def torchvision_jobs(photo: Image) -> dict[str, Job]:
    """fcn_resnet50 as torchvision's page on semantic segmentation uses it, and by segcli."""
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

    network = get("fcn_resnet50", len(VOC)).eval()
    model = random_model(network, "fcn_resnet50", "torchvision")
    jobs: dict[str, Job] = {
        "torchvision, as documented": documented,
        "torchvision, under no_grad": without_gradients,
    }
    return jobs | segcli_jobs(segcli_ways(model, photo), photo)


def segformer_jobs(variant: str, photo: Image) -> dict[str, Job]:
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


def bundled_jobs(photo: Image) -> dict[str, Job]:
    """The bundled models."""
    jobs: dict[str, Job] = {}
    for name, file in bundled_models().items():
        found = segcli_jobs(segcli_ways(load_model(file), photo), photo)
        jobs |= {f"{name}, {way}": job for way, job in found.items()}
    return jobs


def compare(groups: Mapping[str, Mapping[str, Job]], rounds: int) -> None:
    """Time all jobs of all groups in turns, and print each group beside its first job."""
    jobs = {f"{group}: {name}": job for group, found in groups.items() for name, job in found.items()}
    counts = {key: multiplications(job) for key, job in jobs.items()}
    timings = interleaved(jobs, rounds)
    for group, found in groups.items():
        print(f"\n{group:40} 10^9 mult.  wall ms  processor ms  ratios to the first")
        first = timings[f"{group}: {next(iter(found))}"]
        for name in found:
            timing, count = timings[f"{group}: {name}"], counts[f"{group}: {name}"]
            shown = "-" if "openvino" in name else f"{count / 1e9:.1f}"  # PyTorch does not see OpenVINO's
            ratios = f"{first.median / timing.median:5.2f}x {first.processor / timing.processor:5.2f}x"
            print(f"  {name:38} {shown:>10} {timing.median:8.0f} {timing.processor:13.0f}  {ratios}")


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
    groups = {
        "FCN-8s on VGG16": fcn8s_jobs(photo) | segformer_jobs("B4", photo),
        "fcn_resnet50": torchvision_jobs(photo),
        "bundled models": segformer_jobs("B0", photo) | bundled_jobs(photo),
    }
    compare(groups, options.rounds)


if __name__ == "__main__":
    main()
