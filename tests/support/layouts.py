"""The layouts in which sets are published, as miniatures, with the labels that their publishers' own rules give.

A miniature is a function that returns what it holds and what must come of it; docs/sources.md has a row for each. The pictures are
texts: nothing here is decoded. What a row says is written out of the publisher's own words, never by the code under test.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.io import savemat

Row = tuple[str, str, int]  # split, class, label
Rows = dict[str, Row]  # by path, in an archive ARCHIVE/MEMBER


@dataclass(frozen=True)
class Miniature:
    """A set as it is unpacked, in a few files.

    Attributes:
        files: content by path; a path that ends in "/" is an empty folder.
        rows: what is read without any option; None where there is a question or a refusal.
        layout: the layout as which it is read.
        ways: what is read with options, where there is a question: these must be among those that it prints.
        words: of the question, the refusal, or the warning that must come.
    """

    files: Mapping[str, bytes]
    rows: Rows | None = None
    layout: str = "folders"
    ways: Mapping[str, Rows] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    def write(self, root: Path) -> Path:
        """Makes its files below `root`."""
        for path, content in self.files.items():
            place = os.path.join(root, path)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            if not path.endswith("/"):
                with open(place, "wb") as file:
                    file.write(content)
        return root


MINIATURES: dict[str, Callable[[], Miniature]] = {}
WNIDS = ("n01443537", "n01629819", "n02124075", "n04067472")


def miniature(name: str) -> Callable[[Callable[[], Miniature]], Callable[[], Miniature]]:
    """Notes a function under the name that docs/sources.md has."""

    def note(function: Callable[[], Miniature]) -> Callable[[], Miniature]:
        MINIATURES[name] = function
        return function

    return note


def pictures(paths: Iterable[str]) -> dict[str, bytes]:
    """A content for each path, like no other."""
    return {path: b"picture " + path.encode() for path in paths}


def texts(lists: Mapping[str, Iterable[str]]) -> dict[str, bytes]:
    """Files of lines."""
    return {path: "".join(f"{line}\n" for line in lines).encode() for path, lines in lists.items()}


def tar_of(members: Mapping[str, bytes]) -> bytes:
    """A tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def matlab(**variables: object) -> bytes:
    """A MATLAB file."""
    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


def in_folders(folders: Mapping[str, tuple[str, str]], numbers: Mapping[str, int], each: int = 2) -> Rows:
    """`each` pictures in every folder, which has a split and class; `numbers` are the classes' labels."""
    return {
        f"{folder}/{n}.jpg": (split, name, numbers[name])
        for folder, (split, name) in folders.items()
        for n in range(each)
    }


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Names in this order, from 0."""
    return {name: number for number, name in enumerate(names)}


def split_folders(folders: Mapping[str, str], names: Iterable[str], each: int = 2) -> Rows:
    """The split of each folder, and class folders of these names, which are in ascending order, in each."""
    names = list(names)
    pairs = {f"{folder}/{name}": (split, name) for folder, split in folders.items() for name in names}
    return in_folders(pairs, numbered(names), each)


def plain(rows: Rows, more: Mapping[str, bytes] | None = None, words: tuple[str, ...] = ()) -> Miniature:
    """Class folders that are read without a list."""
    return Miniature({**pictures(rows), **(more or {})}, rows, words=words)


# ImageNet and its kin.


@miniature("ImageNet, sorted into folders")
def imagenet_folders() -> Miniature:
    return plain(split_folders({"train": "train", "val": "val"}, WNIDS))


@miniature("ImageNet, val flat with val.txt")
def imagenet_flat_val() -> Miniature:
    """Caffe's val.txt numbers the sorted synsets from 0."""
    numbers = (2, 0, 3, 1)
    rows = split_folders({"train": "train"}, WNIDS)
    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 5)]
    rows |= {f"val/{name}": ("val", WNIDS[k], k) for name, k in zip(names, numbers, strict=True)}
    lists = texts({"val.txt": [f"{name} {k}" for name, k in zip(names, numbers, strict=True)]})
    return Miniature({**pictures(rows), **lists, "val/new folder/": b""}, rows)


@miniature("ImageNet, as Kaggle packs it")
def imagenet_kaggle() -> Miniature:
    """LOC_val_solution.csv has the synset before the first box; the test images have no class."""
    base = "ILSVRC/Data/CLS-LOC"
    rows: Rows = {f"{base}/train/{w}/{w}_{n}.JPEG": ("train", w, k) for k, w in enumerate(WNIDS) for n in range(2)}
    val = {f"ILSVRC2012_val_{n:08d}": WNIDS[n % 4] for n in range(1, 6)}
    rows |= {f"{base}/val/{name}.JPEG": ("val", w, WNIDS.index(w)) for name, w in val.items()}
    rows |= {f"{base}/test/ILSVRC2012_test_{n:08d}.JPEG": ("test", "", -1) for n in range(1, 3)}
    solution = ["ImageId,PredictionString", *(f"{name},{w} 1 2 3 4 " for name, w in val.items())]
    lists = texts(
        {
            "LOC_val_solution.csv": solution,
            "LOC_train_solution.csv": ["ImageId,PredictionString"],
            "LOC_sample_submission.csv": ["ImageId,PredictionString"],
            "LOC_synset_mapping.txt": [f"{w} a name, another" for w in WNIDS],
            "ILSVRC/ImageSets/CLS-LOC/val.txt": [f"{name} {n}" for n, name in enumerate(val, 1)],
            "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": ["<annotation/>"],
        }
    )
    return Miniature({**pictures(rows), **lists}, rows, "kaggle")


@miniature("ImageNet, the archives")
def imagenet_archives() -> Miniature:
    """train is a tar of a tar a synset; a line of the ground truth has the ILSVRC ID of a val picture, by name."""
    ids = [WNIDS[2], WNIDS[0], WNIDS[3], WNIDS[1]]
    tars = {f"{w}.tar": tar_of(pictures([f"{w}_{n}.JPEG" for n in range(2)])) for w in WNIDS}
    truth = (4, 1, 1, 3)
    val = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 5)]
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array([(k + 1, w, "w", "g", 0) for k, w in enumerate(ids)], dtype=dtype).reshape(-1, 1)
    kit = "ILSVRC2012_devkit_t12/data"
    files = {
        "ILSVRC2012_img_train.tar": tar_of(tars),
        "ILSVRC2012_img_val.tar": tar_of(pictures(val)),
        f"{kit}/meta.mat": matlab(synsets=synsets),
        **texts({f"{kit}/ILSVRC2012_validation_ground_truth.txt": map(str, truth)}),
    }
    rows: Rows = {
        f"ILSVRC2012_img_train.tar/{w}.tar/{w}_{n}.JPEG": ("train", w, k) for k, w in enumerate(WNIDS) for n in range(2)
    }
    rows |= {
        f"ILSVRC2012_img_val.tar/{name}": ("val", ids[k - 1], WNIDS.index(ids[k - 1]))
        for name, k in zip(val, truth, strict=True)
    }
    return Miniature(files, rows, "ilsvrc")


@miniature("ImageNet-21k (winter21), a tar a synset")
def imagenet_21k() -> Miniature:
    tars = {f"winter21_whole/{w}.tar": [f"{w}_{n}.JPEG" for n in (10, 9)] for w in WNIDS}
    rows: Rows = {
        f"{path}/{name}": ("train", os.path.basename(path)[:-4], k)
        for k, (path, names) in enumerate(tars.items())
        for name in names
    }
    return Miniature({path: tar_of(pictures(names)) for path, names in tars.items()}, rows, "synset-tars")


@miniature("ImageNet-21K-P")
def imagenet_21k_p() -> Miniature:
    return plain(split_folders({"imagenet21k_train": "train", "imagenet21k_val": "val"}, WNIDS))


@miniature("ImageNet-V2")
def imagenet_v2() -> Miniature:
    """The folder's number is the label of the sorted synsets: folder 10 is label 10. Nothing else tells a split."""
    names = [str(n) for n in range(12)]
    folder = "imagenetv2-matched-frequency-format-val"
    rows = in_folders({f"{folder}/{name}": ("train", name) for name in names}, {name: int(name) for name in names})
    return plain(rows)


@miniature("ImageNet-A and ImageNet-R")
def imagenet_a() -> Miniature:
    rows = in_folders({f"imagenet-a/{w}": ("train", w) for w in WNIDS}, numbered(WNIDS))
    return plain(rows, texts({"imagenet-a/README.txt": ["n01443537 goldfish"]}))


@miniature("ImageNet-Sketch")
def imagenet_sketch() -> Miniature:
    return plain(in_folders({f"sketch/{w}": ("train", w) for w in WNIDS}, numbered(WNIDS)))


@miniature("ImageNet-100, as Kaggle has it")
def imagenet_100() -> Miniature:
    rows = {
        f"{folder}/{wnid}/{wnid}_{n}.JPEG": (split, wnid, WNIDS.index(wnid))
        for folder, split, wnids in (
            ("train.X1", "train", WNIDS[::2]),
            ("train.X2", "train", WNIDS[1::2]),
            ("val.X", "val", WNIDS),
        )
        for wnid in wnids
        for n in range(2)
    }
    return plain(rows, {"Labels.json": b"{}"})


@miniature("Tiny ImageNet")
def tiny_imagenet() -> Miniature:
    """val_annotations.txt: name, synset and box; wnids.txt is in no order; the test pictures have no class."""
    rows: Rows = {
        f"tiny-imagenet-200/train/{w}/images/{w}_{n}.JPEG": ("train", w, k)
        for k, w in enumerate(WNIDS)
        for n in range(2)
    }
    val = (3, 0, 2, 1, 0)
    rows |= {f"tiny-imagenet-200/val/images/val_{n}.JPEG": ("val", WNIDS[k], k) for n, k in enumerate(val)}
    rows |= {f"tiny-imagenet-200/test/images/test_{n}.JPEG": ("test", "", -1) for n in range(3)}
    lists = texts(
        {
            "wnids.txt": (WNIDS[2], WNIDS[3], WNIDS[0], WNIDS[1]),
            "words.txt": (f"{w}\ta name, another" for w in WNIDS),
            "val/val_annotations.txt": (f"val_{n}.JPEG\t{WNIDS[k]}\t0\t32\t44\t62" for n, k in enumerate(val)),
            **{f"train/{w}/{w}_boxes.txt": (f"{w}_{n}.JPEG\t0\t10\t63\t58" for n in range(2)) for w in WNIDS},
        }
    )
    files = {**pictures(rows), **{f"tiny-imagenet-200/{path}": content for path, content in lists.items()}}
    return Miniature(files, rows, "tiny-imagenet")


@miniature("Tiny ImageNet, val sorted by a script")
def tiny_imagenet_sorted() -> Miniature:
    """As scripts leave it: val like train, and what they leave beside it."""
    rows: Rows = {
        f"{split}/{w}/images/{w}_{n}.JPEG": (split, w, k)
        for split in ("train", "val")
        for k, w in enumerate(WNIDS)
        for n in range(2)
    }
    lists = texts(
        {
            "wnids.txt": WNIDS,
            "val/val_annotations.txt": [f"{w}_0.JPEG\t{w}\t0\t32\t44\t62" for w in WNIDS],
            **{f"train/{w}/{w}_boxes.txt": [f"{w}_0.JPEG\t0\t10\t63\t58"] for w in WNIDS},
        }
    )
    return Miniature({**pictures(rows), **lists}, rows)


@miniature("imagenette, imagewoof")
def imagenette() -> Miniature:
    rows = split_folders({"imagenette2-160/train": "train", "imagenette2-160/val": "val"}, WNIDS)
    return plain(
        rows, texts({"imagenette2-160/noisy_imagenette.csv": ["path,noisy_labels_0", f"train/{WNIDS[0]}/0.jpg,x"]})
    )


# Sets with lists.


_PLACES = {"a/airfield": 0, "a/apartment_building/outdoor": 1, "b/bar": 2}


@miniature("Places365")
def places365() -> Miniature:
    """categories_places365.txt numbers /LETTER/NAME from 0; the lists have a path and a number a line."""
    rows = in_folders({f"data_256/{name}": ("train", name) for name in _PLACES}, _PLACES)
    val = (2, 0, 1, 0)
    rows |= {f"val_256/Places365_val_{n:08d}.jpg": ("val", list(_PLACES)[k], k) for n, k in enumerate(val, 1)}
    rows |= {f"test_256/Places365_test_{n:08d}.jpg": ("test", "", -1) for n in range(1, 3)}
    train = (f"{path.removeprefix('data_256')} {row[2]}" for path, row in rows.items() if row[0] == "train")
    lists = texts(
        {
            "categories_places365.txt": (f"/{name} {k}" for name, k in _PLACES.items()),
            "places365_train_standard.txt": train,
            "places365_val.txt": (f"Places365_val_{n:08d}.jpg {k}" for n, k in enumerate(val, 1)),
            "places365_test.txt": (f"Places365_test_{n:08d}.jpg" for n in range(1, 3)),
        }
    )
    return Miniature({**pictures(rows), **lists}, rows, "places365")


@miniature("Places365, high resolution, without the list of train")
def places365_large() -> Miniature:
    rows = in_folders({f"data_large/{name}": ("train", name) for name in _PLACES}, _PLACES)
    rows["val_large/Places365_val_00000001.jpg"] = ("val", "b/bar", 2)
    lists = texts(
        {
            "filelist_places365-standard/categories_places365.txt": (f"/{name} {k}" for name, k in _PLACES.items()),
            "filelist_places365-standard/places365_val.txt": ["Places365_val_00000001.jpg 2"],
        }
    )
    return Miniature({**pictures(rows), **lists}, rows, "places365")


@miniature("Places365, easy directory structure")
def places365_easy() -> Miniature:
    names = ("airfield", "apartment_building-outdoor", "bar")
    rows = split_folders({"places365_standard/train": "train", "places365_standard/val": "val"}, names)
    lists = {
        f"places365_standard/{split}.txt": [
            p.removeprefix("places365_standard/") for p, r in rows.items() if r[0] == split
        ]
        for split in ("train", "val")
    }
    return plain(rows, texts(lists))


@miniature("SUN397")
def sun397() -> Miniature:
    names = {"a/abbey": 0, "a/apartment_building/outdoor": 1, "b/bar": 2}
    rows = in_folders({f"SUN397/{name}": ("train", name) for name in names}, names)
    lists = texts({"SUN397/ClassName.txt": (f"/{name}" for name in names), "SUN397/README.txt": ["SUN"]})
    return Miniature({**pictures(rows), **lists}, rows, "sun397")


@miniature("Food-101")
def food101() -> Miniature:
    """classes.txt in its order; train.txt and test.txt: CLASS/NUMBER."""
    names = ("apple_pie", "baby_back_ribs", "waffles")
    rows: Rows = {
        f"food-101/images/{name}/{100 + n}.jpg": ("test" if n == 1 else "train", name, k)
        for k, name in enumerate(names)
        for n in range(3)
    }
    stems = {path: path.removeprefix("food-101/images/").removesuffix(".jpg") for path in rows}
    lists = texts(
        {
            "meta/classes.txt": names,
            "meta/labels.txt": ("Apple pie", "Baby back ribs", "Waffles"),
            "meta/train.txt": (stems[path] for path, row in rows.items() if row[0] == "train"),
            "meta/test.txt": (stems[path] for path, row in rows.items() if row[0] == "test"),
            "meta/train.json": ["{}"],
            "README.txt": ["Food-101"],
            "license_agreement.txt": ["terms"],
        }
    )
    files = {**pictures(rows), **{f"food-101/{path}": content for path, content in lists.items()}}
    return Miniature(files, rows, "food-101")


@miniature("CUB-200-2011")
def cub200() -> Miniature:
    """images.txt numbers pictures, image_class_labels.txt has their class from 1, train_test_split.txt a 1 for train."""
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "010.Red_winged_Blackbird")
    listed = [(f"{name}/{name[4:]}_{n:04d}_{n}.jpg", k, (k + n) % 2) for k, name in enumerate(names) for n in range(2)]
    rows: Rows = {
        f"CUB_200_2011/images/{path}": ("train" if train else "test", names[k], k) for path, k, train in listed
    }
    lists = texts(
        {
            "classes.txt": (f"{k} {name}" for k, name in enumerate(names, 1)),
            "images.txt": (f"{n} {path}" for n, (path, _, _) in enumerate(listed, 1)),
            "image_class_labels.txt": (f"{n} {k + 1}" for n, (_, k, _) in enumerate(listed, 1)),
            "train_test_split.txt": (f"{n} {train}" for n, (_, _, train) in enumerate(listed, 1)),
            "bounding_boxes.txt": (f"{n} 60.0 27.0 325.0 304.0" for n in range(1, 7)),
            "attributes/certainties.txt": ["1 not visible"],
            "parts/parts.txt": ["1 back"],
            "README": ["CUB"],
        }
    )
    files = {**pictures(rows), **{f"CUB_200_2011/{path}": content for path, content in lists.items()}}
    return Miniature({**files, "attributes.txt": b"1 has_bill_shape::curved\n"}, rows, "cub-200-2011")


@miniature("Oxford-IIIT Pet")
def oxford_pets() -> Miniature:
    """A line is IMAGE CLASS-ID SPECIES BREED-ID, classes from 1; a few pictures stand in no list."""
    names = ("Abyssinian", "american_bulldog", "Bengal")
    lines = {
        "train": ["Abyssinian_100 1 1 1", "american_bulldog_1 2 2 1", "Bengal_7 3 1 2"],
        "test": ["Bengal_2 3 1 2"],
    }
    rows: Rows = {
        f"images/{line.split()[0]}.jpg": (split, names[int(line.split()[1]) - 1], int(line.split()[1]) - 1)
        for split, listed in lines.items()
        for line in listed
    }
    files = {
        **pictures([*rows, "images/Bengal_99.jpg", "annotations/trimaps/Bengal_7.png"]),
        "images/Abyssinian_100.mat": b"m",
    }
    lists = texts(
        {
            "annotations/list.txt": ["#Image CLASS-ID SPECIES BREED ID", *lines["train"], *lines["test"]],
            "annotations/trainval.txt": lines["train"],
            "annotations/test.txt": lines["test"],
            "annotations/xmls/Bengal_7.xml": ["<annotation/>"],
        }
    )
    return Miniature({**files, **lists}, rows, "oxford-pets", words=("1 picture", "images/Bengal_99.jpg"))


@miniature("Oxford 102 Flower")
def flowers102() -> Miniature:
    """imagelabels.mat has the class of picture 1, 2, …, from 1; setid.mat the pictures of each split."""
    labels, splits = (3, 1, 2, 1, 2, 3), {"train": (4, 1), "val": (6,), "test": (2, 3, 5)}
    rows: Rows = {
        f"jpg/image_{n:05d}.jpg": (split, str(labels[n - 1]), labels[n - 1] - 1)
        for split, numbers in splits.items()
        for n in numbers
    }
    lists = {
        "imagelabels.mat": matlab(labels=np.array([labels], np.uint8)),
        "setid.mat": matlab(trnid=[splits["train"]], valid=[splits["val"]], tstid=[splits["test"]]),
    }
    return Miniature({**pictures(rows), **lists}, rows, "flowers-102")


@miniature("DTD (Describable Textures)")
def textures() -> Miniature:
    names = ("banded", "zigzagged")
    order = ("train", "val", "test")
    rows: Rows = {
        f"dtd/images/{name}/{name}_{n:04d}.jpg": (order[n], name, k) for k, name in enumerate(names) for n in range(3)
    }
    lists = {
        f"dtd/labels/{split}{part}.txt": [
            path.removeprefix("dtd/images/") for path, row in rows.items() if row[0] == order[(n + part - 1) % 3]
        ]
        for n, split in enumerate(order)
        for part in (1, 2)
    }
    joint = texts({**lists, "dtd/labels/labels_joint_anno.txt": ["banded/banded_0000.jpg banded"]})
    return Miniature({**pictures(rows), **joint}, rows, "dtd")


@miniature("FGVC-Aircraft")
def aircraft() -> Miniature:
    names = ("707-320", "Boeing 717", "A300B4")  # the order of the list, not of the names
    listed = {"train": ((1025794, 1), (1340192, 2)), "val": ((1056978, 0),), "test": ((1514522, 2), (2222222, 0))}
    base = "fgvc-aircraft-2013b/data"
    rows: Rows = {f"{base}/images/{n}.jpg": (split, names[k], k) for split, pairs in listed.items() for n, k in pairs}
    lists = texts(
        {
            f"{base}/variants.txt": names,
            f"{base}/families.txt": ["A300", "Boeing 707"],
            **{
                f"{base}/images_variant_{split}.txt": (f"{n} {names[k]}" for n, k in pairs)
                for split, pairs in listed.items()
            },
            **{f"{base}/images_family_{split}.txt": ["1025794 Boeing 707"] for split in listed},
            "fgvc-aircraft-2013b/README.md": ["aircraft"],
        }
    )
    return Miniature({**pictures(rows), **lists}, rows, "fgvc-aircraft")


@miniature("Stanford Dogs")
def stanford_dogs() -> Miniature:
    """train_list.mat and test_list.mat: paths, and classes from 1."""
    names = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")
    listed = {
        "train": [(f"{names[0]}/n02085620_1.jpg", 1), (f"{names[1]}/n02085782_2.jpg", 2)],
        "test": [(f"{names[1]}/n02085782_10.jpg", 2), (f"{names[0]}/n02085620_7.jpg", 1)],
    }
    rows: Rows = {
        f"Images/{path}": (split, names[k - 1], k - 1) for split, pairs in listed.items() for path, k in pairs
    }
    files = {**pictures(rows), **texts({f"Annotation/{names[0]}/n02085620_1": ["<annotation/>"]})}
    for split, pairs in listed.items():
        cells = np.empty((len(pairs), 1), object)
        cells[:, 0] = [path for path, _ in pairs]
        files[f"{split}_list.mat"] = matlab(file_list=cells, labels=np.array([[float(k)] for _, k in pairs]))
    return Miniature(files, rows, "stanford-dogs")


@miniature("GTSRB")
def gtsrb() -> Miniature:
    """The folder is the class, and ClassId in GT-final_test.csv."""
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    rows: Rows = {
        f"GTSRB/Final_Training/Images/{k:05d}/0000{n}_00000.ppm": ("train", f"{k:05d}", k)
        for k in (0, 2, 14)
        for n in range(2)
    }
    rows |= {f"GTSRB/Final_Test/Images/0000{n}.ppm": ("test", f"{k:05d}", k) for n, k in enumerate((14, 0))}
    lists = texts(
        {
            "GTSRB/GT-final_test.csv": [head, "00000.ppm;53;54;6;5;48;49;14", "00001.ppm;42;45;5;5;36;40;0"],
            "GTSRB/Final_Test/Images/GT-final_test.test.csv": [
                head.removesuffix(";ClassId"),
                "00000.ppm;53;54;6;5;48;49",
            ],
            "GTSRB/Readme.txt": ["signs"],
            **{
                f"GTSRB/Final_Training/Images/{k:05d}/GT-{k:05d}.csv": [head, f"00000_00000.ppm;29;30;5;6;24;25;{k}"]
                for k in (0, 2, 14)
            },
        }
    )
    return Miniature({**pictures(rows), **lists}, rows, "gtsrb")


# Class folders, as they are unpacked.


@miniature("Intel Image Classification")
def intel_scenes() -> Miniature:
    rows = split_folders({"seg_train/seg_train": "train", "seg_test/seg_test": "test"}, ("buildings", "forest", "sea"))
    return plain(rows, pictures(f"seg_pred/seg_pred/{n}.jpg" for n in range(3)), words=("seg_pred",))


@miniature("EuroSAT")
def eurosat() -> Miniature:
    names = ("AnnualCrop", "Forest", "SeaLake")
    return plain(in_folders({f"EuroSAT/2750/{name}": ("train", name) for name in names}, numbered(names)))


@miniature("iNaturalist 2021")
def inaturalist_2021() -> Miniature:
    names = ("00000_Animalia_Annelida_Clitellata", "00001_Animalia_Chordata_Aves", "09999_Plantae_Pinophyta")
    rows = split_folders({"train": "train", "val": "val"}, names)
    return plain(rows, texts({"train.json": ["{}"], "val.json": ["{}"]}))


@miniature("iNaturalist 2017 to 2019")
def inaturalist_2018() -> Miniature:
    """Groups of class folders with numbers, which are the categories of the publisher's JSON."""
    leaves = {"Aves": ("2", "10"), "Plantae": ("5",)}
    paths = [
        f"train_val2018/{group}/{name}/{n}.jpg" for group, names in leaves.items() for name in names for n in range(2)
    ]
    deep = numbered(("Aves/10", "Aves/2", "Plantae/5"))
    shallow = numbered(("Aves", "Plantae"))

    def rows(depth: int, numbers: Mapping[str, int]) -> Rows:
        names = {path: "/".join(path.split("/")[1 : 1 + depth]) for path in paths}
        return {path: ("train", name, numbers[name]) for path, name in names.items()}

    return Miniature(pictures(paths), ways={"--class-depth 1": rows(1, shallow), "--class-depth 2": rows(2, deep)})


@miniature("mnist_png")
def mnist_png() -> Miniature:
    folders = {"mnist_png/training": "train", "mnist_png/testing": "test"}
    return plain(split_folders(folders, map(str, range(10))))


@miniature("CINIC-10, Country211")
def cinic10() -> Miniature:
    names = ("airplane", "automobile", "bird")
    return plain(split_folders({"train": "train", "valid": "val", "test": "test"}, names), {"README.md": b"CINIC"})


@miniature("Caltech-101")
def caltech101() -> Miniature:
    names = ("BACKGROUND_Google", "Faces", "accordion")  # in the order of bytes
    return plain(in_folders({f"101_ObjectCategories/{name}": ("train", name) for name in names}, numbered(names)))


@miniature("Caltech-256")
def caltech256() -> Miniature:
    names = ("001.ak47", "002.american-flag", "257.clutter")
    return plain(in_folders({f"256_ObjectCategories/{name}": ("train", name) for name in names}, numbered(names)))


@miniature("UC Merced, NWPU-RESISC45")
def uc_merced() -> Miniature:
    names = ("agricultural", "airplane", "tenniscourt")
    rows = in_folders({f"UCMerced_LandUse/Images/{name}": ("train", name) for name in names}, numbered(names))
    return plain(rows, {"UCMerced_LandUse/readme.txt": b"UC"})


@miniature("TensorFlow's flower_photos")
def flower_photos() -> Miniature:
    names = ("daisy", "roses", "tulips")
    rows = in_folders({f"flower_photos/{name}": ("train", name) for name in names}, numbered(names))
    return plain(rows, {"flower_photos/LICENSE.txt": b"CC-BY"})


@miniature("PyTorch's hymenoptera_data")
def hymenoptera() -> Miniature:
    return plain(split_folders({"hymenoptera_data/train": "train", "hymenoptera_data/val": "val"}, ("ants", "bees")))


@miniature("Microsoft's Cats and Dogs (PetImages)")
def pet_images() -> Miniature:
    rows = in_folders({f"PetImages/{name}": ("train", name) for name in ("Cat", "Dog")}, {"Cat": 0, "Dog": 1})
    more = {
        "PetImages/Cat/Thumbs.db": b"t",
        "PetImages/Dog/Thumbs.db": b"t",
        "readme[1].txt": b"r",
        "MSR-LA - 3467.docx": b"d",
    }
    return plain(rows, more)


@miniature("Labeled Faces in the Wild")
def lfw() -> Miniature:
    names = ("Aaron_Eckhart", "Zydrunas_Ilgauskas")
    return plain(in_folders({f"lfw/{name}": ("train", name) for name in names}, numbered(names)))


@miniature("Chest X-Ray (Kermany)")
def chest_xray() -> Miniature:
    folders = {f"chest_xray/{split}": split for split in ("train", "val", "test")}
    rows = split_folders(folders, ("NORMAL", "PNEUMONIA"))
    more = {"chest_xray/.DS_Store": b"s", "chest_xray/__MACOSX/._train": b"m", "chest_xray/train/.DS_Store": b"s"}
    return plain(rows, more)


@miniature("ASL Alphabet (Kaggle)")
def asl_alphabet() -> Miniature:
    rows = in_folders({f"asl_alphabet_train/asl_alphabet_train/{c}": ("train", c) for c in "ABC"}, numbered("ABC"))
    rows |= {f"asl_alphabet_test/asl_alphabet_test/{c}_test.jpg": ("test", "", -1) for c in "ABC"}
    return plain(rows, words=("asl_alphabet_test",))


# What is asked, and what is refused.


@miniature("Class folders beside a test folder")
def classes_beside_test() -> Miniature:
    """train at the root: nothing tells that the folders beside test/ are classes of train, but that they hold pictures."""
    rows = split_folders({".": "train", "test": "test"}, ("cats", "dogs"))
    rows = {os.path.normpath(path): row for path, row in rows.items()}
    alone = {path: ("train", *row[1:]) for path, row in rows.items() if row[0] == "train"}
    alone |= {path: ("train", "test", 2) for path, row in rows.items() if row[0] == "test"}
    return Miniature(pictures(rows), ways={"--split-folders train=.,test=test": rows})


@miniature("A class whose name means a split (cars, planes, train)")
def class_named_train() -> Miniature:
    names = ("car", "plane", "train")
    rows = in_folders({name: ("train", name) for name in names}, numbered(names))
    return Miniature(pictures(rows), ways={"--split-folders none": rows}, words=("train",))


@miniature("CycleGAN's sets (horse2zebra)")
def cyclegan() -> Miniature:
    names = ("testA", "testB", "trainA", "trainB")
    rows = in_folders({name: ("train", name) for name in names}, numbered(names))
    return Miniature(pictures(rows), ways={"--class-depth 1": rows}, words=("testA",))


@miniature("Office-Home, PACS, DomainNet")
def domains() -> Miniature:
    """Domains of classes: the class may be either, and which one is meant is for the user to say."""
    paths = [
        f"{domain}/{name}/{n}.jpg" for domain in ("Art", "Product") for name in ("Alarm_Clock", "Bed") for n in range(2)
    ]
    deep = numbered(("Art/Alarm_Clock", "Art/Bed", "Product/Alarm_Clock", "Product/Bed"))
    one: Rows = {path: ("train", path.split("/")[0], int(path.startswith("P"))) for path in paths}
    two: Rows = {path: ("train", os.path.dirname(path), deep[os.path.dirname(path)]) for path in paths}
    return Miniature(pictures(paths), ways={"--class-depth 1": one, "--class-depth 2": two})


@miniature("Kaggle's Dogs vs. Cats")
def dogs_vs_cats() -> Miniature:
    paths = [f"train/{name}.{n}.jpg" for name in ("cat", "dog") for n in range(3)]
    return Miniature(pictures([*paths, "test1/1.jpg", "test1/2.jpg"]), words=("train",))


@miniature("COCO")
def coco() -> Miniature:
    lists = texts({"annotations/instances_train2017.json": ['{"images": [], "annotations": [], "categories": []}']})
    paths = [f"{split}2017/{n:012d}.jpg" for split in ("train", "val") for n in range(3)]
    return Miniature({**pictures(paths), **lists}, words=("COCO",))


@miniature("Pascal VOC")
def pascal_voc() -> Miniature:
    base = "VOCdevkit/VOC2012"
    lists = texts({f"{base}/Annotations/2007_{n:06d}.xml": ["<annotation/>"] for n in range(3)})
    lists |= texts({f"{base}/ImageSets/Main/train.txt": [f"2007_{n:06d}" for n in range(3)]})
    return Miniature({**pictures(f"{base}/JPEGImages/2007_{n:06d}.jpg" for n in range(3)), **lists}, words=("VOC",))


@miniature("YOLO")
def yolo() -> Miniature:
    paths = [f"images/{split}/{n}.jpg" for split in ("train", "val") for n in range(3)]
    lists = texts({path.replace("images", "labels").replace(".jpg", ".txt"): ["0 0.5 0.5 0.1 0.1"] for path in paths})
    return Miniature({**pictures(paths), **lists, "data.yaml": b"train: images/train\n"}, words=("YOLO",))
