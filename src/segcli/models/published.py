"""Weights that others have published: one record per file.

Sources: shelhamer/fcn.berkeleyvision.org (README.md, <net>/caffemodel-url), wkentaro/pytorch-fcn (README.md,
torchfcn/models/*.py), torchvision's weight records (torchvision.models.segmentation). Scores are theirs; the
authors state none for PASCAL-Context, SIFT Flow and NYUDv2. Berkeley publishes no checksums and no sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

BERKELEY = "http://dl.caffe.berkeleyvision.org/"
PYTORCH = "https://download.pytorch.org/models/"
RELEASE = "shelhamer/fcn.berkeleyvision.org"
BERKELEY_LICENCE = "unrestricted use (BVLC model licence, stated in the release's README)"
TORCHVISION_LICENCE = "BSD-3-Clause (torchvision); trained on COCO, whose images have their own terms"
ON_SEG11VALID = "VOC seg11valid, 736 images"
ON_COCO = "COCO val2017 with VOC's classes"


@dataclass(frozen=True)
class Published:
    """A file of weights on the network, and what its publishers say of it.

    Attributes:
        name: What `--model` takes.
        network: A key of `models.networks.NETWORKS`.
        classes: Names of its class sets: one, or two for two heads.
        source: Who wrote the file: a key of `models.key_maps.SOURCES`, or caffe.
        file: Its name.
        addresses: Where it is, the best first.
        checksum: As published: "md5:..." or "sha256:..." (perhaps only its first digits); None if it is not.
        mebibytes: Its size, or, where that is not published, four bytes per parameter.
        preprocessing: A key of `models.preprocessing.PREPROCESSINGS`.
        licence: Under which terms the weights may be used.
        trained_on: Data of the training.
        mean_iou: The published score in percent; None if there is none.
        scored_on: The set of that score.
        said_by: Where the score is published.
        notes: What a user should know.
    """

    name: str
    network: str
    classes: tuple[str, ...]
    source: str
    file: str
    addresses: tuple[str, ...]
    checksum: str | None
    mebibytes: float
    preprocessing: str
    licence: str
    trained_on: str
    mean_iou: float | None = None
    scored_on: str = ""
    said_by: str = ""
    notes: tuple[str, ...] = ()


def _berkeley(
    name: str,
    network: str,
    file: str,
    classes: tuple[str, ...],
    mebibytes: float,
    trained_on: str,
    preprocessing: str = "caffe",
    mean_iou: float | None = None,
    notes: tuple[str, ...] = (),
) -> Published:
    return Published(
        name=name,
        network=network,
        classes=classes,
        source="caffe",
        file=f"{file}.caffemodel",
        addresses=(f"{BERKELEY}{file}.caffemodel",),
        checksum=None,
        mebibytes=mebibytes,
        preprocessing=preprocessing,
        licence=BERKELEY_LICENCE,
        trained_on=trained_on,
        mean_iou=mean_iou,
        scored_on=ON_SEG11VALID if mean_iou else "",
        said_by=RELEASE,
        notes=notes,
    )


def _torchfcn(
    name: str, network: str, drive_id: str, md5: str, mebibytes: float, mean_iou: float
) -> Published:
    return Published(
        name=name,
        network=network,
        classes=("voc",),
        source="torchfcn",
        file=f"{network}_from_caffe.pth",
        addresses=(
            f"https://drive.usercontent.google.com/download?id={drive_id}&export=download&confirm=t",
            f"https://drive.google.com/uc?id={drive_id}",
        ),
        checksum=f"md5:{md5}",
        mebibytes=mebibytes,
        preprocessing="caffe",
        licence=BERKELEY_LICENCE,
        trained_on=SBD,
        mean_iou=mean_iou,
        scored_on=ON_SEG11VALID,
        said_by="wkentaro/pytorch-fcn",
        notes=("the authors' weights, converted to PyTorch by wkentaro/pytorch-fcn",),
    )


def _torchvision(
    name: str, network: str, file: str, sha256: str, mebibytes: float, mean_iou: float
) -> Published:
    return Published(
        name=name,
        network=network,
        classes=("voc",),
        source="torchvision",
        file=f"{file}-{sha256}.pth",
        addresses=(f"{PYTORCH}{file}-{sha256}.pth",),
        checksum=f"sha256:{sha256}",
        mebibytes=mebibytes,
        preprocessing="torchvision",
        licence=TORCHVISION_LICENCE,
        trained_on="the images of COCO train2017 that show VOC's 20 classes",
        mean_iou=mean_iou,
        scored_on=ON_COCO,
        said_by="torchvision's weight records",
    )


SBD = "SBD train, 8,498 images"
CONTEXT = "PASCAL-Context (VOC 2010 train)"
SIFTFLOW = "SIFT Flow trainval"
NYUD = "NYUDv2 trainval"
TWO_HEADS = ("siftflow", "siftflow-geometric")
GEOMETRY = ("predicts 33 semantic and 3 geometric classes; both masks are written",)
HHA = ("its images are HHA encodings of depth (Gupta et al. 2014), not photographs",)

PUBLISHED: dict[str, Published] = {
    record.name: record
    for record in (
        _torchvision("fcn-resnet50-voc", "fcn_resnet50", "fcn_resnet50_coco", "1167a1af", 135.0, 60.5),
        _torchvision("fcn-resnet101-voc", "fcn_resnet101", "fcn_resnet101_coco", "7ecb50ca", 207.7, 63.7),
        _torchvision(
            "deeplabv3-resnet50-voc", "deeplabv3_resnet50", "deeplabv3_resnet50_coco", "cd0a2569", 160.5, 66.4
        ),
        _torchvision(
            *("deeplabv3-resnet101-voc", "deeplabv3_resnet101", "deeplabv3_resnet101_coco", "586e9e4e"),
            *(233.2, 67.4),
        ),
        _torchvision(
            *("deeplabv3-mobilenet-voc", "deeplabv3_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"),
            *("fc3c493d", 42.3, 60.3),
        ),
        _torchvision(
            *("lraspp-mobilenet-voc", "lraspp_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
            *("d234d4ea", 12.5, 57.9),
        ),
        _berkeley("fcn32s-vgg16-voc", "fcn32s", "fcn32s-heavy-pascal", ("voc",), 519.4, SBD, mean_iou=63.6),
        _berkeley("fcn16s-vgg16-voc", "fcn16s", "fcn16s-heavy-pascal", ("voc",), 514.3, SBD, mean_iou=65.0),
        _berkeley(
            *("fcn8s-vgg16-voc", "fcn8s", "fcn8s-heavy-pascal", ("voc",), 513.0, SBD),
            mean_iou=65.5,
            notes=("67.2 on VOC 2012 test, as published",),
        ),
        _berkeley(
            *("fcn8s-atonce-vgg16-voc", "fcn8s-atonce", "fcn8s-atonce-pascal", ("voc",), 513.0, SBD),
            mean_iou=65.4,
        ),
        _berkeley(
            "fcn-alexnet-voc", "fcn-alexnet", "fcn-alexnet-pascal", ("voc",), 223.9, SBD, mean_iou=48.0
        ),
        _torchfcn(
            "fcn32s-vgg16-voc-pth",
            "fcn32s",
            "11k2Q0bvRQgQbT6-jYWeh6nmAsWlSCY3f",
            "d3eb467a80e7da0468a20dfcbc13e6c8",
            519.4,
            63.63,
        ),
        _torchfcn(
            "fcn16s-vgg16-voc-pth",
            "fcn16s",
            "1bctu58B6YH9bu6lBBSBB2rUeGlGhYLoP",
            "a2d4035f669f09483b39c9a14a0d6670",
            514.3,
            65.01,
        ),
        _torchfcn(
            "fcn8s-vgg16-voc-pth",
            "fcn8s",
            "1ieXWyoG68xqoHJPWdyrDyaIaaWlfmUxI",
            "de93e540ec79512f8770033849c8ae89",
            513.0,
            65.51,
        ),
        _torchfcn(
            "fcn8s-atonce-vgg16-voc-pth",
            "fcn8s-atonce",
            "0B9P1L--7Wd2vblE1VUIxV1o2d2M",
            "bfed4437e941fef58932891217fe6464",
            513.0,
            65.40,
        ),
        *(
            _berkeley(
                *(f"{net}-vgg16-context", net, f"pascalcontext-{net}-heavy", ("pascal-context",)),
                *(mebibytes, CONTEXT),
            )
            for net, mebibytes in (("fcn32s", 569.4), ("fcn16s", 527.5), ("fcn8s", 517.2))
        ),
        *(
            _berkeley(
                *(f"{net}-vgg16-siftflow", net, f"siftflow-{net}-heavy", TWO_HEADS, mebibytes, SIFTFLOW),
                preprocessing="siftflow",
                notes=GEOMETRY,
            )
            for net, mebibytes in (("fcn32s", 529.9), ("fcn16s", 517.2), ("fcn8s", 514.0))
        ),
        _berkeley(
            *("fcn32s-vgg16-nyud", "fcn32s", "nyud-fcn32s-color-heavy", ("nyud",), 537.8, NYUD),
            preprocessing="nyud",
        ),
        _berkeley(
            *("fcn32s-vgg16-nyud-hha", "fcn32s", "nyud-fcn32s-hha-heavy", ("nyud",), 537.8, NYUD),
            preprocessing="nyud-hha",
            notes=HHA,
        ),
    )
}
