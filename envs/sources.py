"""The public datasets: what each is made of, byte for byte, where it is downloaded from, and where it is kept."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MB = 2**20
BUILT_IN = {"shapes": (32, 3), "shapes_grey": (28, 1)}  # side and channels


@dataclass(frozen=True)
class File:
    """A file, known by its content. One that is gzipped is known by what it unpacks to as well: others pack it anew."""

    name: str
    md5: str
    size: int
    inner_md5: str = ""
    inner_size: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What it is called: its own name, and where it is packed those of what is in it."""
        inner = self.name.removesuffix(".gz")
        return (self.name, inner, inner.replace("-idx", ".idx")) if self.inner_md5 else (self.name,)


@dataclass(frozen=True)
class Source:
    """A public dataset: what is downloaded, from where, and what is kept of it (by default just that)."""

    files: tuple[File, ...]
    mirrors: tuple[str, ...]  # folders, tried in order
    classes: tuple[str, ...]
    kept: tuple[File, ...] = ()  # of the one archive that `files` is
    labels: int = 0  # bytes before a record's pixels, the last of which is the label; 0 for MNIST's format

    @property
    def wanted(self) -> tuple[File, ...]:
        """What is in the cache when the dataset is there."""
        return self.kept or self.files

    @property
    def size(self) -> str:
        """How much there is to download, in words."""
        return f"{max(1, round(sum(file.size for file in self.files) / MB))} MB"


IDX = (
    ("train-images-idx3-ubyte.gz", 47_040_016),
    ("train-labels-idx1-ubyte.gz", 60_008),
    ("t10k-images-idx3-ubyte.gz", 7_840_016),
    ("t10k-labels-idx1-ubyte.gz", 10_008),
)


def _idx(*known: tuple[str, int, str]) -> tuple[File, ...]:
    """The files of MNIST's format: of each, the sum and the size as it is packed, and the sum of what is in it."""
    return tuple(File(name, *own, size) for (name, size), own in zip(IDX, known, strict=True))


KRIZHEVSKY = (
    "https://www.cs.toronto.edu/~kriz/",
    "https://cave.cs.toronto.edu/kriz/",
    "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/",
)
CLOTHES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle_boot"
THINGS = "airplane automobile bird cat deer dog frog horse ship truck"
FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
SOURCES = {
    "mnist": Source(
        files=_idx(
            ("f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422, "6bbc9ace898e44ae57da46a324031adb"),
            ("d53e105ee54ea40749a09fcbcd1e9432", 28_881, "a25bea736e30d166cdddb491f175f624"),
            ("9fb629c4189551a2d022fa330f9573f3", 1_648_877, "2646ac647ad5339dbf082846283269ea"),
            ("ec29112dd5afa0611ce80d1b7f02629c", 4_542, "27ae3e4e09519cfbb04c329615203637"),
        ),
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        classes=tuple("0123456789"),
    ),
    "fashion_mnist": Source(
        files=_idx(
            ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880, "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
            ("25c81989df183df01b3e8a0aad5dffbe", 29_515, "9018921c3c673c538a1fc5bad174d6f9"),
            ("bef4ecab320f06d8554ea6380940ec79", 4_422_102, "8181f5470baa50b63fa0f6fddb340f0a"),
            ("bb300cfdad3c16e7a12a480ee83cd310", 5_148, "15d484375f8d13e6eb1aabb0c3f46965"),
        ),
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        ),
        classes=tuple(CLOTHES.split()),
    ),
    "cifar10": Source(
        files=(File("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170_052_171),),
        mirrors=KRIZHEVSKY,
        classes=tuple(THINGS.split()),
        kept=(
            File("data_batch_1.bin", "5dd7e06a14cb22eb9f671a540d1b7c25", 30_730_000),
            File("data_batch_2.bin", "5ea93a67294ea407fff1d09f752e9692", 30_730_000),
            File("data_batch_3.bin", "942cd6a4bcdd0dd3c604fbe906cb4421", 30_730_000),
            File("data_batch_4.bin", "ae636b3ba5c66a11e91e8cb52e771fcb", 30_730_000),
            File("data_batch_5.bin", "53f37980c15c3d472c316c40844f3f0d", 30_730_000),
            File("test_batch.bin", "803d5f7f4d78ea53de84dbe85f74fb6d", 30_730_000),
        ),
        labels=1,
    ),
    "cifar100": Source(
        files=(File("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 168_513_733),),
        mirrors=KRIZHEVSKY,
        classes=tuple(FINE.split()),
        kept=(
            File("train.bin", "6172c7755cfe09b2fe270c85cebc1b15", 153_700_000),
            File("test.bin", "4499cfba6c016c1be1438163640a0898", 30_740_000),
        ),
        labels=2,  # the coarse one, then the fine one
    ),
}


def cache() -> Path:
    """The folder that downloaded data lies in, a folder a dataset: `CRL_DATA_DIR`, or where the platform keeps such."""
    if own := os.environ.get("CRL_DATA_DIR"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "crl"
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    return Path(os.environ.get(variable) or Path.home() / ".cache") / "crl"


def unknown(name: str, names: Sequence[str]) -> str:
    """What to say of a name that is none of these: the nearest of them, or all.

    >>> unknown("mnits", ["mnist", "shapes"])
    "unknown dataset 'mnits'; did you mean mnist?"
    """
    near = difflib.get_close_matches(name, names, 1)
    return f"unknown dataset {name!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}")
