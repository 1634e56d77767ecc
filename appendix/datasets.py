"""Real data for HMR: joint orders, crops, readers of the published formats, batches, measures.

    python -m appendix.datasets orders      # the table of joint orders
    python -m appendix.datasets train --data coco:ANNOTATIONS.json@IMAGES spin:FILE.npz@IMAGES \
        lsp:DIR --mocap AMASS [flags of train.py]
    python -m appendix.datasets measure CHECKPOINT --data spin:h36m_valid_protocol1.npz@IMAGES

`train` is train.py's command with another world, RealPeople (Sec. 3.4 and 4.1; the official
data_loader and converters; SPIN's files).

Axes:  N people of a data set   B pictures of a batch   H, W pixels of a picture   V vertices
       size = 224 pixels of a crop   19 keypoints   24 joints: SMPL's in pose and rotmats, SPIN's
       "J24" in S and part   M recorded frames   P points, or joints that are compared
2D as everywhere: crop coordinates in [-1, 1]; a picture's pixel i covers [i, i + 1).  Annotations
that count whole pixels get + 0.5 where they are read, MATLAB's, which count from 1, - 0.5.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as vision

import train
from appendix.spin import Network, load_network
from data import CROPS, Batch, SyntheticPeople, load_mocap
from hmr import BETAS, LEFT_HIP, LSP, RIGHT_HIP, mean_theta
from smpl import (FLIP_JOINTS, FLIP_KEYPOINTS, JOINT_NAMES, KEYPOINT_NAMES, SMPL, batch_rodrigues,
                  exit_status, plain_file, printable, rot6d_to_rotmat, say, write_atomically)
from train import Config, compute_similarity_transform, summarize

# --------------------------------------------------------------------------------------------
# 1. Joint orders.  Every map below is made by name; the published number tables are in the tests.

# SPIN's 24 slots: LSP's 14, other data sets' points, the face.
J24_NAMES = (*KEYPOINT_NAMES[:LSP], "pelvis_mpii", "thorax_mpii", "spine_h36m", "jaw_h36m",
             "head_h36m", *KEYPOINT_NAMES[LSP:])
COCO_NAMES = ("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder",
              "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
              "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle")
# Rows of J_regressor_h36m.npy, left leg first; the neck is the same point as LSP's.
H36M_NAMES = ("pelvis_h36m", "left_hip", "left_knee", "left_ankle", "right_hip", "right_knee",
              "right_ankle", "spine_h36m", "neck", "jaw_h36m", "head_h36m", "left_shoulder",
              "left_elbow", "left_wrist", "right_shoulder", "right_elbow", "right_wrist")
# The field's 14 joints for H3.6M, 3DHP and 3DPW: LSP's, but the head's centre for its top.
FIELD14 = (*KEYPOINT_NAMES[:13], "head_h36m")


def to_19(names: Sequence[str]) -> list[int]:
    """Where each of the 19 keypoints stands in another order; -1: nowhere."""
    return [names.index(name) if name in names else -1 for name in KEYPOINT_NAMES]


J24_TO_19, COCO_TO_19 = to_19(J24_NAMES), to_19(COCO_NAMES)
J24_TO_14 = [J24_NAMES.index(name) for name in FIELD14]
H36M_TO_14 = [H36M_NAMES.index(name) for name in FIELD14]
J24_PELVIS = J24_NAMES.index("pelvis_mpii")         # the root of H3.6M's and 3DHP's S
HEAD_TOP, HEAD = (J24_NAMES.index(name) for name in ("head_top", "head_h36m"))
# Slots of J24 at both ends of shins, thighs, forearms and upper arms.
LIMB_ENDS = [0, 1, 4, 5, 6, 7, 10, 11], [1, 2, 3, 4, 7, 8, 9, 10]

ORDERS = {"keypoints (HMR)": KEYPOINT_NAMES, "LSP, LSPET": KEYPOINT_NAMES[:LSP],
          "part, S (SPIN)": J24_NAMES, "COCO": COCO_NAMES, "J_regressor_h36m": H36M_NAMES,
          "joints (SMPL)": JOINT_NAMES}


# --------------------------------------------------------------------------------------------
# 2. The crop (official data_loader) and the flip

def point_windows(points: Tensor, visible: Tensor, crop: str) -> tuple[Tensor, Tensor]:
    """Where people are cut out: points (N, 19 or 24, 2) pixels, visible (N, 19 or 24) -> middles
    (N, 2) and sides (N,) of squares, NaN for less than 2 points or 5 pixels.

    By COCO's official converter: where an ankle is visible, the diagonal of the visible points' box
    becomes 150 pixels of 224; where none is (the person is cut off), the mean shoulder-to-hip
    distance 75; without that the box 50.  crop: of data.CROPS, another than the official one scales
    all three alike; or "spin": 1.2 times the box's longer side.
    """
    points = torch.where(visible[..., None] > 0, points, math.nan)    # (N, P, 2)
    low = points.nan_to_num(math.inf).amin(1)                         # (N, 2)
    high = points.nan_to_num(-math.inf).amax(1)                       # (N, 2)
    ankles, shoulders, hips = (0, 5), (8, 9), (2, 3)                  # right and left
    torso = (points[:, shoulders] - points[:, hips]).norm(dim=-1).nanmean(1)      # (N,) or NaN
    cut_off = points[:, ankles, 0].isnan().all(1)                     # (N,)
    by_torso = cut_off & ~torso.isnan()                               # (N,)
    length = torch.where(by_torso, torso, (high - low).norm(dim=-1))  # (N,)
    wanted = torch.where(by_torso, 75, torch.where(cut_off, 50, 150))             # (N,)
    side = 1.2 * (high - low).amax(1) if crop == "spin" else (
        224 * 150 / CROPS[crop][0] * length / wanted)                 # (N,)
    good = (length >= 5) & (length < math.inf)                        # (N,) infinite: no point
    return (low + high) / 2, torch.where(good, side, math.nan)


def person_window(keypoints: Tensor, visible: Tensor, crop: str = "official"
                  ) -> tuple[Tensor, float]:
    """One person's: (19, 2) pixels, (19,) -> middle (2,), side.  Raises ValueError."""
    middles, sides = point_windows(keypoints[None], visible[None], crop)          # (1, 2), (1,)
    if sides.isnan():
        raise ValueError("cropping needs at least 2 visible keypoints, at least 5 pixels apart")
    return middles[0], sides.item()


def cut_window(image: Tensor, center: Tensor, side: float, size: int,
               padding: str = "border") -> Tensor:
    """A square window of a picture -> (3, size, size), of the picture's dtype.

    image (3, H, W), bytes or numbers; center (2,) and side in the picture's pixels.  A picture that
    shrinks is low-passed, or it aliases.  Beyond its border it is repeated, or 0 (padding "zeros").
    """
    reach = side / 2 + 2 * max(1.0, side / size)       # low-pass and interpolation look further
    end = center.new_tensor(image.shape[:0:-1])                       # (2,) W, H
    start = (center - reach).floor().clamp(min=0).minimum(end - 1)    # (2,)
    extent = (center + reach).ceil().minimum(end).maximum(start + 1) - start      # (2,)
    (x, y), (w, h) = start.int().tolist(), extent.int().tolist()
    part = image[:, y:y + h, x:x + w]                                 # (3, h, w)
    if side > size:                   # PyTorch fails where bytes shrink to a single pixel
        shrunk = [max(2, round(length * size / side)) for length in (h, w)]
        part = vision.resize(part, shrunk, antialias=True)            # (3, smaller h, w)
    # Crop coordinates in [-1, 1] -> the part's, in [-1, 1] as well, so the shrinking drops out.
    middle = 2 * (center - start) / extent - 1                        # (2,)
    window = torch.cat([torch.diag(side / extent), middle[:, None]], 1).float()   # (2, 3)
    grid = F.affine_grid(window[None], [1, 3, size, size], align_corners=False)
    cut = F.grid_sample(part[None].float(), grid, "bilinear", padding_mode=padding,
                        align_corners=False)[0]                       # (3, size, size)
    return cut if image.is_floating_point() else cut.round().to(image.dtype)


def crop_person(image: Tensor, keypoints: Tensor, visible: Tensor, size: int = 224,
                shift: tuple[float, float] = (0, 0), zoom: float = 1.0, crop: str = "official",
                window: tuple[Tensor, float] | None = None) -> tuple[Tensor, Tensor]:
    """Cut a person out as HMR does -> crop (3, size, size), keypoints2d (19, 2) in [-1, 1].

    image (3, H, W), bytes or numbers; keypoints (19, 2) pixels where pixel i covers [i, i + 1);
    visible (19,).  `shift` (pixels of a 224 crop; official training: within 20) moves the person's
    window (`person_window`, unless one is given) before `zoom` (0.8 to 1.23) scales it.  Beyond the
    picture its edge is repeated; crop "spin" has zeros there.  Unlabelled points become 0, whatever
    they hold.  Raises ValueError.
    """
    if image.ndim != 3 or len(image) != 3:
        raise ValueError(f"the picture must be (3, H, W), colours first; got {tuple(image.shape)}")
    center, side = window or person_window(keypoints, visible, crop)  # (2,)
    center, side = center + center.new_tensor(shift) * side / 224, side / zoom    # (2,)
    points = torch.where(visible[:, None] > 0, 2 * (keypoints - center) / side, 0)      # (19, 2)
    padding = "zeros" if crop == "spin" else "border"
    return cut_window(image, center, side, size, padding), points


def flip_batch(batch: Batch) -> Batch:
    """Mirror pictures and ALL their labels.  x -> -x, and left things become right things."""
    M = batch.keypoints3d.new_tensor([-1, 1, 1])
    return batch._replace(
        image=batch.image.flip(-1),
        keypoints2d=batch.keypoints2d[:, FLIP_KEYPOINTS] * M[:2],
        visible=batch.visible[:, FLIP_KEYPOINTS],
        keypoints3d=batch.keypoints3d[:, FLIP_KEYPOINTS] * M,
        has_3d=batch.has_3d[:, FLIP_KEYPOINTS],
        rotmats=batch.rotmats[:, FLIP_JOINTS] * M[:, None] * M,       # M R M, root included
        cam=batch.cam * batch.cam.new_tensor([1, -1, 1]))


# --------------------------------------------------------------------------------------------
# 3. People: the readers' arrays, brought to one form

class People(NamedTuple):
    """N labelled people of one data set: 50,000 of them are 55 MB and not objects.  0: no label."""
    name: str             # as on the command line, "coco:person_keypoints_train2014.json"
    folder: Path          # of the pictures
    image: np.ndarray     # (N,) bytes: the picture's path in it
    part: Tensor          # (N, 24, 3) J24: x, y pixels (pixel i covers [i, i + 1)), labelled
    S: Tensor             # (N, 24, 4) J24: X, Y, Z metres in the camera's frame, labelled
    pose: Tensor          # (N, 72) axis-angle, root in the camera's frame
    betas: Tensor         # (N, 10)
    has_smpl: Tensor      # (N,) bool: pose and betas are labels
    gender: Tensor        # (N,) whose body pose and betas are of: 1 male, 2 female, 0 other
    box: Tensor           # (N, 3) middle x, y, and side: SPIN's, 1.2 times the longer side; or NaN
    size: Tensor          # (N, 2) width, height of the labelled picture; 0: not said
    skipped: Counter      # why, and how many, rows of the file are left out


CONFIDENT = 0.2                   # a detector's confidence from which a point counts as labelled


def labelled(visible: np.ndarray, where: str = "") -> np.ndarray:
    """Visibility as bool: labels are 0, 1 or 2, a detector's confidences lie between 0 and 1."""
    visible = np.where(np.isfinite(visible), visible, 0).astype(float)
    if odd := visible[(visible < 0) | (visible > 1) & (visible != 2)].tolist():
        raise ValueError(f"{where}a visibility of {odd[0]:g}; expected 0, 1 or 2, or confidences")
    return visible >= CONFIDENT


@np.errstate(over="ignore")                     # what is too large for float32 becomes infinite
def make_people(name: str, folder: Path, image: list[bytes], skipped: dict[str, int] = {},
                **labels: np.ndarray) -> People:
    """The readers' arrays as People, of whose fields `labels` has what there is.

    What is not finite as float32 is not labelled: a 2D or 3D point alone, pose and betas together.
    Without both hips a person has no 3D (they are its origin).  Raises ValueError.
    """
    for path in image:
        if re.match(rb"[/\\]|.:|(.*[/\\])?\.\.([/\\]|$)", path):
            raise ValueError(f"{name}: its picture {os.fsdecode(path)!r} lies outside the folder "
                             f"of pictures; expected paths that start in that folder")
    shapes = {"part": (24, 3), "S": (24, 4), "pose": (72,), "betas": (10,), "has_smpl": (),
              "gender": (), "box": (3,), "size": (2,)}
    absent = {"pose": np.nan, "has_smpl": 1}            # without has_smpl each pose is a label
    part, S, pose, betas, has_smpl, gender, box, size = (
        np.array(labels.get(key, np.full((len(image), *shape), absent.get(key, 0))), np.float32)
        for key, shape in shapes.items())
    seen = labelled(part[..., 2], f"{name}: ") & np.isfinite(part).all(-1)        # (N, 24)
    known = (S[..., 3] > 0) & np.isfinite(S).all(-1)                  # (N, 24)
    known &= known[:, [RIGHT_HIP, LEFT_HIP]].all(1, keepdims=True)
    for array, good in ((part, seen), (S, known)):
        array[~good], array[good, -1] = 0, 1
    a, b = (S[:, ends] for ends in LIMB_ENDS)                         # (N, 8, 4) each
    limb = np.linalg.norm(a - b, axis=2) * a[..., 3] * b[..., 3]      # (N, 8)
    if limb.max(initial=0) > 3:
        raise ValueError(f"{name}: a limb of row {limb.max(1).argmax()} is {limb.max():.0f} m "
                         f"long; expected S in metres; is it in millimetres?")
    has_smpl = (has_smpl > 0) & np.isfinite(pose).all(1) & np.isfinite(betas).all(1)      # (N,)
    pose[~has_smpl], betas[~has_smpl] = 0, 0
    box[~(np.isfinite(box).all(1) & (box[:, 2] >= 5))] = np.nan
    return usable(People(name, folder, np.array(image, "S"), *map(torch.from_numpy, (
        part, S, pose, betas, has_smpl, gender.astype(int), box, size.astype(int))),
        Counter(skipped)))


def which_labels(found: People) -> Tensor:
    """Who has 2D, 3D and SMPL labels: (3, N) bool."""
    return torch.stack([found.part[..., 2].any(1), found.S[..., 3].any(1), found.has_smpl])


def usable(found: People) -> People:
    """The people who have a label and can be cropped; the others are counted by their reason."""
    some_label = which_labels(found).any(0)                           # (N,)
    keep = some_label & windows(found)[1].isfinite()                  # (N,)
    skipped = found.skipped + Counter({
        "without any label": int((~some_label).sum()),
        "no 2 keypoints nor box of 5 pixels": int((some_label & ~keep).sum())})
    if not keep.any():
        raise ValueError(f"{found.name}: nobody in it can be trained on ({reasons(skipped)}); is "
                         f"it the right file?")
    kept = (x[keep] if isinstance(x, Tensor) else x for x in found)
    return People(*kept)._replace(image=found.image[keep.numpy()], skipped=skipped)


def reasons(skipped: Counter) -> str:
    return ", ".join(f"{n:,} {why}" for why, n in skipped.items()) or "nobody left out"


# SPIN's box is 1.2 times the keypoints' longer side, and their diagonal is 1.12 times it (measured:
# the median over data.py's training poses under any heading is 1.11 to 1.13).
DIAGONAL_OF_BOX = 1.12 / 1.2


def windows(found: People, crop: str = "official") -> tuple[Tensor, Tensor]:
    """Where each person is cut out: centres (N, 2) and sides (N,), pixels, before jitter.

    By all labelled points, also by those that are no keypoints (H3.6M's head); where there are less
    than two by the box, so that a whole person comes out as large.  SPIN takes the box itself.
    """
    middle, side = point_windows(found.part[..., :2], found.part[..., 2], crop)   # (N, 2), (N,)
    box = found.box[:, 2] * (1 if crop == "spin" else DIAGONAL_OF_BOX * 224 / CROPS[crop][0])
    by_box = box.isfinite() if crop == "spin" else side.isnan()       # (N,)
    return (torch.where(by_box[:, None], found.box[:, :2], middle),
            torch.where(by_box, box, side))


# --------------------------------------------------------------------------------------------
# 4. Readers of the published files

def read_people(text: str) -> People:
    """KIND:ANNOTATIONS@IMAGES -> People: KIND before the first ":", IMAGES after the last "@"."""
    kind, _, rest = text.partition(":")
    file, _, images = rest.rpartition("@") if "@" in rest else (rest, "", "")
    readers = {"coco": read_coco, "spin": read_spin_file, "lsp": read_lsp}
    if kind not in readers or not file or (kind != "lsp" and not images):
        raise ValueError(f"--data {text}: expected coco:ANNOTATIONS.json@IMAGES, "
                         f"spin:FILE.npz@IMAGES or lsp:DIR, IMAGES being the pictures' folder")
    return readers[kind](Path(file), Path(images or file))


@contextlib.contextmanager
def reading(path: str | os.PathLike, wrong: str, expected: str) -> Iterator[Path]:
    """What goes wrong here becomes a sentence.  Raises FileNotFoundError, ValueError."""
    path = plain_file(path, expected)
    try:
        yield path
    except Exception as error:                  # zipfile's, numpy's, scipy's, json's own
        raise ValueError(f"{path}: {wrong} ({error!r:.200}); expected {expected}") from None


MOST_BYTES = 2 ** 30              # that a file of numbers may hold, unpacked
KINDS = {"imgname": "SU", "gender": "SUfiub"}       # text, or text or numbers; else numbers


def load_arrays(path: Path, wanted: Iterable[str], expected: str
                ) -> tuple[dict[str, np.ndarray], set[str]]:
    """Those of the wanted arrays that an .npz has, and its other keys.  No object is unpickled,
    and nothing of more than 1 GiB is unpacked.  Raises FileNotFoundError, ValueError."""
    with (reading(path, "not a whole .npz of plain arrays", expected) as path,
          np.load(path, allow_pickle=False) as file):
        keys = [key for key in wanted if key in file.files]
        if sum(file.zip.getinfo(key + ".npy").file_size for key in keys) > MOST_BYTES:
            raise ValueError("more than 1 GiB of numbers")
        arrays = {key: file[key] for key in keys}
        for key, array in arrays.items():
            if array.dtype.kind not in KINDS.get(key, "fiub"):
                raise ValueError(f"{key} is {array.dtype}")
        return arrays, {*file.files} - {*wanted}


SPIN_FILE = {"imgname": (), "center": (2,), "scale": (), "part": (24, 3), "S": (24, 4),
             "pose": (72,), "shape": (10,), "has_smpl": (), "gender": ()}
GENDERS = {"m": 1, "male": 1, "0": 1, "0.0": 1, "f": 2, "female": 2, "1": 2, "1.0": 2}


def read_spin_file(path: Path, images: Path) -> People:
    """SPIN's .npz: imgname and any of center, scale, part, S, pose, shape, has_smpl, gender.

    Its boxes are scale * 200 pixels, its points J24; openpose (detections, to which SPIN itself
    gives no weight) is not used.  By the file's name: pixels of LSP, LSPET and MPII count from 1,
    as MATLAB's (- 0.5), all others whole pixels (+ 0.5); 3DHP's head top stands in slot 18 and is
    keypoint 13, as in the official code.
    """
    (rows, others), name = load_arrays(path, SPIN_FILE, "SPIN's .npz"), path.name.lower()
    if others := others - {"openpose", "maskname", "partname"}:
        say(printable(f"{path.name}: not used, as SPIN's lack them: {', '.join(sorted(others))}"))
    for key, partner in (("imgname", None), ("pose", "shape"), ("shape", "pose"),
                         ("center", "scale"), ("scale", "center")):
        if key not in rows and partner in (None, *rows):
            raise ValueError(f"{path}: lacks {key} (N, ..); expected SPIN's .npz")
    N = rows["imgname"].size
    for key, array in rows.items():
        if array.shape != (shape := (N, *SPIN_FILE[key])):
            raise ValueError(f"{path}: {key} is {array.dtype} {array.shape}, expected "
                             f"{'text' if key == 'imgname' else 'numbers'} {shape}")
    for array in (rows[key] for key in ("part", "S") if key in rows and "3dhp" in name):
        if not array[:, HEAD_TOP, -1].any():
            array[:, HEAD_TOP] = array[:, HEAD]
    origin = -0.5 if "lsp" in name or "mpii" in name else 0.5
    if "part" in rows:
        rows["part"] = rows["part"] + (origin, origin, 0)             # (N, 24, 3)
        if (rows["part"][..., 2] % 1 > 0).any():
            say(f"{path.name}: points of a confidence below {CONFIDENT} are not labelled")
    if "center" in rows:
        rows["box"] = np.column_stack([rows["center"] + origin, 200 * rows["scale"]])     # (N, 3)
    if "gender" in rows:
        rows["gender"] = np.array([GENDERS.get(x.strip().lower(), 0)
                                   for x in rows["gender"].astype(str).tolist()])         # (N,)
    rows["betas"] = rows.get("shape", np.zeros((N, 10)))              # (N, 10)
    image = [os.fsencode(x) for x in rows["imgname"].tolist()]        # text or bytes
    return make_people(f"spin:{path.name}", images, image, **rows)


def read_json(path: Path, expected: str):
    """What a JSON file holds.  Raises FileNotFoundError, ValueError."""
    with reading(path, "not JSON", expected) as path:
        return json.loads(path.read_text(encoding="utf-8-sig"))       # a byte order mark, or none


def person_points(content: dict) -> dict[str, Sequence[str]]:
    """A COCO file's categories that are people -> their points' names, in the file's order.  Who
    has the limbs' names is a person, whatever the number.  Without any names: COCO's order."""
    named, people = {}, {}
    for category in content.get("categories") or []:
        if category.get("keypoints"):
            named[str(category["id"])] = [re.sub(r"[\s-]+", "_", str(name).strip().lower())
                                          for name in category["keypoints"]]
        if str(category.get("name")).lower() == "person":
            people[str(category["id"])] = COCO_NAMES
    if named:
        people = {id: names for id, names in named.items() if {*KEYPOINT_NAMES[:12]} <= {*names}}
        if not people:
            points = ", ".join(name for names in named.values() for name in names)
            raise ValueError(f"the points of its categories ({points:.99}) are no person's")
    return people or {"1": COCO_NAMES}


NOBODY = "crowds or no persons"


def numbers_of(row: dict, key: str, shape: tuple[int, ...], default: Sequence = ()) -> np.ndarray:
    """A list of an annotation, flat or of lists -> an array.  Raises ValueError."""
    try:
        value = row.get(key) or default
        value = np.hstack(value) if value and isinstance(value[0], list) else value
        return np.array(value, float).reshape(shape)
    except (ValueError, TypeError, LookupError, OverflowError):
        raise ValueError("broken rows", f"annotation {row.get('id')!s:.20}'s {key}") from None


def coco_person(row: dict, people: dict[str, Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """One annotation -> points (19, 3) = x, y, visibility; box (4,) = x, y, w, h of edges.  Raises
    ValueError(why) for a row that is no person, ValueError("broken rows", where)."""
    if not isinstance(row, dict):
        raise ValueError("broken rows", f"{row!s:.20}")
    names = people.get(str(row.get("category_id", 1)))
    if names is None or str(row.get("iscrowd") or 0).lower() not in ("0", "0.0", "false"):
        raise ValueError(NOBODY)
    if not row.get("keypoints"):
        raise ValueError("without keypoints (person_keypoints_*.json has them)")
    k, box = numbers_of(row, "keypoints", (len(names), 3)), numbers_of(row, "bbox", (4,), [0] * 4)
    k = np.concatenate([k, np.zeros((1, 3))])[to_19(names)]           # (19, 3) -1: the zeros
    if not (np.isfinite(box).all() and (box[2:] > 0).all()):          # none: the points' own
        seen = k[k[:, 2] > 0, :2]                                     # (n, 2)
        low, high = seen.min(0, initial=math.inf), seen.max(0, initial=-math.inf)     # (2,) each
        box = np.concatenate([low, high - low])                       # (4,)
    return k, box


def filter_officially(row: dict, k: np.ndarray, box: np.ndarray) -> None:
    """Raises ValueError(why) for a person whom COCO's official converter leaves out.  Of the mask
    it tests the height alone, here the longer side counts.  Without a polygon: the box."""
    is_coded = isinstance(row.get("segmentation"), dict)              # run lengths, no polygon
    corners = numbers_of({} if is_coded else row, "segmentation", (-1, 2))        # (n, 2)
    if (k[:, 2] == 2).sum() < 6:
        raise ValueError("with fewer than 6 points of visibility 2, which alone counts in COCO's "
                         "converter (in a file of 0 and 1 write 2 for 1)")
    if not max(np.ptp(corners, axis=0) if len(corners) else box[2:]) > 60:
        raise ValueError("60 pixels or smaller")
    if not (k[[*range(8), 10, 11], 2] > 0).any():
        raise ValueError("with face and shoulders only")


def read_coco(path: Path, images: Path) -> People:
    """COCO's person_keypoints_*.json, filtered as the official converter does.  Visibility 1
    (occluded) is a label like 2; neck and head's top have none.  It counts whole pixels: + 0.5."""
    expected = "COCO's person_keypoints_*.json, with images, annotations and categories"
    content = read_json(path, expected)
    with reading(path, "not COCO's layout", expected):
        people, annotations = person_points(content), list(content["annotations"])
        pictures = {str(row["id"]): (row["file_name"].encode(), [
            int(row.get(key) or 0) for key in ("width", "height")]) for row in content["images"]}
    kept, skipped = [], []
    for row in annotations:
        try:
            k, box = coco_person(row, people)
            filter_officially(row, k, box)
            if str(row.get("image_id")) not in pictures:
                raise ValueError("broken rows", f"annotation {row.get('id')!s:.20}'s image_id")
            kept.append((*pictures[str(row["image_id"])], k))
        except ValueError as error:
            skipped.append(error.args)                                # why, and sometimes where
    first = {args[0]: ", the first ".join(args) for args in reversed(skipped)}
    image, size, k = zip(*kept) if kept else [()] * 3
    k = np.array(k).reshape(-1, 19, 3)                                # (N, 19, 3)
    if odd := [v for v in np.unique(k[..., 2]) if v not in (0, 1, 2) and math.isfinite(v)]:
        raise ValueError(f"{path}: a visibility of {odd[0]:g}; expected 0, 1 or 2; are these a "
                         f"detector's confidences? They are no labels")
    part = np.insert(k + (0.5, 0.5, 0), [LSP] * 5, 0, axis=1)         # (N, 24, 3) J24
    return make_people(f"coco:{path.name}", images, image, Counter(
        first[why] for why, *_ in skipped), part=part, size=np.array(size))


def is_small(path: Path) -> bool:
    """Does a MATLAB 5 file's every compressed variable unpack to at most 1 GiB?"""
    content, at = path.read_bytes(), 128
    order = "little" if content[126:128] == b"IM" else "big"
    while at + 8 <= len(content):
        kind, size = (int.from_bytes(content[n:n + 4], order) for n in (at, at + 4))
        stream, at = zlib.decompressobj(), at + 8 + size
        if kind == 15 and (stream.decompress(content[at - size:at], MOST_BYTES)
                           and stream.unconsumed_tail):               # 15: miCOMPRESSED
            return False
    return True


def read_lsp(folder: Path, images: Path) -> People:
    """Leeds Sports Pose: DIR/joints.mat, DIR/images/im0001.jpg; or its extended set, im00001.

    LSP, joints (3, 14, 2000): flag 0 is visible, 1 occluded (and not used, as in the official
    code); its second half is the test set and never read.  LSPET, joints (14, 3, 10000): flag 1 is
    visible.  hr-lspet has .png beside joints.mat.  MATLAB's pixels count from 1: - 0.5.
    """
    expected = ("LSP's joints (3, 14, 2000) or LSPET's (14, 3, 10000), at most 1 GiB; not of "
                "MATLAB 7.3, save it by -v7")
    with reading(folder / "joints.mat", "not a readable .mat", expected) as path:
        headers = {name: what for name, *what in scipy.io.whosmat(path)}
        shape, kind = headers.get("joints", ("", "no"))
        good = len(shape) == 3 and shape[:2] in ((3, 14), (14, 3)) and re.fullmatch(
            r"double|single|u?int\d+", kind) and is_small(path)
        joints = good and scipy.io.loadmat(path, variable_names=["joints"])["joints"]
    if not good:
        raise ValueError(f"{path}: {kind} joints{shape and f' {shape}'}; expected {expected}")
    if extended := joints.shape[0] == 14:
        joints = joints.transpose(2, 0, 1)                            # (N, 14, 3)
    else:
        joints = joints.transpose(2, 1, 0)[:joints.shape[2] // 2]     # (N, 14, 3) the training half
    visible = joints[..., 2] == (1 if extended else 0)                # (N, 14)
    part = np.dstack([joints[..., :2].astype(float) - 0.5, visible])  # (N, 14, 3)
    name = "im{:05d}" if extended else "im{:04d}"
    places = [(place, name + end) for place in (images / "images", images)
              for end in (".jpg", ".png")]
    place, name = next((p for p in places if (p[0] / p[1].format(1)).is_file()), places[0])
    N = len(joints)
    return make_people(f"lsp:{folder.name}", place, [name.format(n + 1).encode() for n in range(N)],
                       {} if extended else {"in the test half": N},
                       part=np.pad(part, ((0, 0), (0, 10), (0, 0))))


# AMASS' SMPL-H has 52 joints: 22 of the body, then 15 of each hand.  SMPL's hands are its first
# knuckles, 22 and 37 (left and right index finger).
SMPLH_TO_SMPL = [*range(22), 22, 37]


def read_amass(folder: Path) -> tuple[Tensor, Tensor]:
    """AMASS' SMPL+H folders of *.npz -> frames (M, 24, 3) at 10 a second, betas (M, 10).

    For the adversary, which sees neither the root (AMASS is z-up) nor a picture.  Hands that a clip
    leaves still are drawn (assets/README.md): else D would learn to look for the constant.  betas
    are the first 10 of a MALE or FEMALE body's 16, not quite the official clips' neutral space.
    """
    files = sorted(path for path in folder.rglob("*.npz") if path.name != "shape.npz")
    if not files:
        raise FileNotFoundError(f"--mocap {folder}: holds no .npz; expected AMASS' SMPL+H folders")
    clips = [read_clip(path, n) for n, path in enumerate(files)]
    poses, betas = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*clips))
    say(f"--mocap {folder}: {len(clips):,} clips, {len(poses):,} frames at 10 a second; betas of "
        f"gendered bodies")
    return poses, betas


@np.errstate(over="ignore")                     # what is too large becomes infinite: refused
def read_clip(path: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One AMASS file -> pose (M, 24, 3), betas (M, 10).  Raises ValueError."""
    expected = "SMPL+H's poses (M, 156), betas (16,), mocap_framerate, finite numbers"
    found = dict.fromkeys(("poses", "betas", "mocap_framerate"), [])
    poses, betas, rate = map(np.float32, (found | load_arrays(path, found, expected)[0]).values())
    if not (poses.shape[1:] == (156,) and len(poses) and betas.ndim == 1 and len(betas) >= 10
            and np.isfinite(poses).all() and np.isfinite(betas).all()
            and rate.size == 1 and 1 <= rate.item() <= 1000):
        raise ValueError(f"{path}: expected {expected}; got {poses.shape}, {betas.shape}, "
                         f"{rate.shape} (SMPL-X's has 165); delete it, or name another folder")
    poses = poses[np.arange(0, len(poses), max(1, rate.item() / 10)).astype(int)]     # (M, 156)
    pose = poses.reshape(-1, 52, 3)[:, SMPLH_TO_SMPL]                 # (M, 24, 3)
    for hand, sign in ((22, 1), (23, -1)):
        # Of one frame alone, a hand is still if it is not bent at all; radians.
        moved = np.ptp(pose[:, hand], axis=0) if len(pose) > 1 else np.abs(pose[0, hand])
        if moved.max() < 1e-3:
            pose[:, hand] = wandering_hand(len(pose), [seed, hand]) * (1, sign, sign)
    return pose, np.repeat(betas[None, :10], len(pose), 0)


def wandering_hand(frames: int, seed: list[int]) -> np.ndarray:
    """A left hand (frames, 3) in radians, 10 a second: closed by 10 degrees about -z, wandering by
    3, 3 and 10 degrees, smooth over 0.15 s: what make_assets.py gives the open clips."""
    width = 1.5                                                       # frames
    # At least 16 frames are drawn: the filter spans 13, and a shorter clip would meet itself in it.
    white = np.random.default_rng(seed).standard_normal((max(frames, 16), 3))
    smooth = gaussian_filter1d(white, width, axis=0, mode="wrap")[:frames]
    smooth *= math.sqrt(2 * width * math.sqrt(math.pi))               # back to variance 1
    return np.radians(smooth * (3, 3, 10) - (0, 0, 10)).astype(np.float32)


def read_mean_params(path: Path, rotation: str) -> Tensor:
    """Theta-bar from a file of mean parameters, as the official codes make it -> (1, 85 or 157).

    HMR's neutral_smpl_mean_params.h5 (read by h5py, if that is there) has pose (72,) and shape
    (10,): the camera is 0.9, 0, 0, and the root Rx(pi).  SPIN's smpl_mean_params.npz has pose
    (144,) in 6D, shape (10,), cam (3,), taken as they are.  Raises FileNotFoundError, ValueError.
    """
    expected = ("HMR's neutral_smpl_mean_params.h5 (if h5py is installed) or SPIN's "
                "smpl_mean_params.npz: finite numbers, pose (72,) or (144,), shape (10,)")
    found = {"pose": [], "shape": [], "cam": [0.9, 0, 0]}             # the official code's camera
    if path.suffix == ".h5":
        with reading(path, "not readable", expected):
            import h5py
            with h5py.File(path, "r") as file:
                found |= {key: file[key][:] for key in ("pose", "shape") if file[key].size <= 72}
    else:
        found |= load_arrays(path, found, expected)[0]
    pose, shape, cam = (torch.from_numpy(np.float32(x).ravel()) for x in found.values())
    sizes, numbers = (len(pose), len(shape), len(cam)), torch.cat([pose, shape, cam])
    if sizes not in ((72, 10, 3), (144, 10, 3)) or not numbers.isfinite().all():
        raise ValueError(f"--mean-params {path}: expected {expected}")
    if len(pose) == 72:
        theta = mean_theta(pose, rotation)                            # (1, 85 or 157)
        theta[:, BETAS] = shape
        return theta
    rotmats = rot6d_to_rotmat(pose.view(24, 6))                       # (24, 3, 3)
    pose = rotmats[..., :2] if rotation == "6d" else torch.from_numpy(
        Rotation.from_matrix(rotmats.double()).as_rotvec()).float()   # (24, 2 x 3 or 3)
    return torch.cat([cam, pose.flatten(), shape])[None]              # (1, 85 or 157)


# --------------------------------------------------------------------------------------------
# 5. Pictures, and the world that training asks for batches

MOST_PIXELS = 10 ** 8
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")        # Pillow's others run programs


def read_picture(path: str | os.PathLike, size: tuple[int, int] | None = None,
                 turn: bool = False) -> Tensor:
    """A picture file -> (3, H, W) bytes, RGB.  Raises FileNotFoundError, ValueError (path: why).

    Grey becomes RGB, transparency is dropped, 16 bits become 8.  size: width and height of the
    picture that the labels were made on.  A picture that has it as it is stored, or when turned as
    its EXIF tag says, is taken so, any other is refused; `turn` decides where both or none do.
    """
    path = plain_file(path, "a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # Pillow's own; the bound is below
            with Image.open(path, formats=FORMATS) as image:
                return vision.pil_to_tensor(decoded(image, size, turn))           # (3, H, W)
    except ValueError as error:
        why = str(error)
    except Exception as error:                          # Pillow's many
        why = (f"no whole JPEG, PNG, BMP, TIFF or WebP of at most {MOST_PIXELS:,} pixels "
               f"({type(error).__name__}); it may be truncated")
    raise ValueError(f"{path}: {why}")


def decoded(image: Image.Image, size: tuple[int, int] | None, turn: bool) -> Image.Image:
    """An opened picture, turned, in RGB.  Raises ValueError, Pillow's."""
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} are more than {MOST_PIXELS:,} pixels")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError(f"an animation of {image.n_frames} pictures; name a JPEG or PNG of one")
    if turn or size and image.size != size:
        turned = ImageOps.exif_transpose(image)
        image = turned if not size or turned.size == size else image
    if size and image.size != size:
        raise ValueError(f"{image.width} x {image.height} pixels, but its labels were made on "
                         f"{size[0]} x {size[1]}; put the labelled picture in its place")
    if image.mode.startswith("I"):                      # 16 bits, which `convert` would cut off
        image = Image.fromarray((np.clip(image, 0, 65535) // 257).astype(np.uint8))     # (H, W)
    return image.convert("RGB")


class Draw(NamedTuple):
    """One person of a batch, and how the crop is jittered."""
    k: int                                # number of the data set
    row: int
    shift: tuple[float, float] = (0, 0)   # pixels of a 224 crop
    zoom: float = 1.0
    flip: bool = False


def training_draws(sizes: list[int], share: np.ndarray, B: int, crop: str, seed: int, rank: int,
                   step: int) -> Iterator[list[Draw]]:
    """The DataLoader's sampler: the draws of each batch from `step` on, functions of (seed, step,
    rank).  sizes: people of each data set; share: its part of a batch."""
    _, move, least, most = CROPS[crop]                                # official: 20, 0.8, 1.23
    while True:
        rng = np.random.default_rng([seed, step, rank])
        # evenly spaced, so that every batch has its share of each data set, to within one picture
        place = (np.arange(B) + rng.random()) / B                     # (B,)
        chosen = np.searchsorted(share.cumsum()[:-1], rng.permutation(place), "right")
        yield [Draw(int(k), int(u_row * sizes[k]), (move * (2 * u_x - 1), move * (2 * u_y - 1)),
                    least + (most - least) * u_zoom, bool(u_flip < 0.5))
               for k, (u_row, u_x, u_y, u_zoom, u_flip) in zip(chosen, rng.random((B, 5)))]
        step += 1


class Pictures(Dataset):
    """pictures[draw] -> one person's crop and labels, or the next one's whose picture can be used.
    It is what the loading processes hold: people as arrays, no body, nothing on a GPU."""

    def __init__(self, sets: list[People], size: int, crop: str, replace: bool = True):
        self.sets, self.size, self.crop, self.replace = sets, size, crop, replace
        self.windows = [windows(found, crop) for found in sets]       # (N, 2), (N,) each

    def __getitem__(self, draw: Draw) -> tuple[Batch | None, int, list]:
        """-> `person`, its row, [(data set, row, why), ..] of unusable pictures.  After 1 % of a
        data set in a row, or without `replace` at once, nobody takes the place."""
        N, broken = len(self.sets[draw.k].image), []
        for n in range(1 + N // 100 if self.replace else 1):
            row = (draw.row + n) % N
            try:
                return self.person(draw._replace(row=row)), row, broken
            except (ValueError, OSError) as error:
                broken.append((draw.k, row, str(error)))
        return None, row, broken

    def person(self, draw: Draw) -> Batch:
        """One person, a Batch of 1, its image of bytes.  What is not labelled is 0 and masked."""
        found, (centers, sides), row = self.sets[draw.k], self.windows[draw.k], draw.row
        path, size = found.folder / os.fsdecode(found.image[row]), tuple(found.size[row].tolist())
        image = read_picture(path, size if all(size) else None)       # (3, H, W)
        if found.box[row, 2] > 10 * max(image.shape):
            raise ValueError(f"{path}: {image.shape[2]} x {image.shape[1]} pixels, and a box of "
                             f"{found.box[row, 2]:,.0f} pixels in it; is scale in pixels? SPIN's "
                             f"is the box's side / 200")
        part, S = (x[row, J24_TO_19] for x in (found.part, found.S))  # (19, 3), (19, 4)
        image, points = crop_person(image, part[:, :2], part[:, 2], self.size, draw.shift,
                                    draw.zoom, self.crop, (centers[row], float(sides[row])))
        has_smpl = found.has_smpl[row].float()                        # ()
        rotmats = batch_rodrigues(found.pose[row].view(24, 3)) * has_smpl         # (24, 3, 3)
        batch = Batch(image=image, keypoints2d=points, visible=part[:, 2], keypoints3d=S[:, :3],
                      rotmats=rotmats, betas=found.betas[row], has_3d=S[:, 3], has_smpl=has_smpl,
                      cam=torch.zeros(3))
        batch = Batch(*(x[None] for x in batch))
        return flip_batch(batch) if draw.flip else batch


def collate(items: list) -> tuple[Batch | None, list[int], list]:
    """Items of Pictures -> one Batch, its rows, and what cannot be used."""
    people, rows = [item[0] for item in items if item[0]], [item[1] for item in items if item[0]]
    batch = Batch(*map(torch.cat, zip(*people))) if people else None
    return batch, rows, [why for _, _, broken in items for why in broken]


def batches(pictures: Pictures, draws: Iterable[list[Draw]], workers: int,
            device: torch.device) -> Iterator[tuple[Batch, list[int]]]:
    """Each list of draws as a Batch on the device, image in [0, 1], and its rows.  What cannot be
    used is named once, and more than 1 % of a data set is an error.  Raises ValueError."""
    # a generator of its own: the loader's draw must not touch that of dropout
    loader = DataLoader(pictures, batch_sampler=draws, collate_fn=collate, num_workers=workers,
                        generator=torch.Generator(), pin_memory=device.type == "cuda")
    left_out = {}                               # (data set, row): why
    try:
        for batch, rows, broken in loader:
            new = {(k, row): why for k, row, why in broken if (k, row) not in left_out}
            left_out |= new
            for n, found in enumerate(pictures.sets):
                whys = [why for (k, _), why in left_out.items() if k == n]
                if len(whys) > 0.01 * len(found.image):
                    raise ValueError(f"{found.name}: the pictures of {len(whys)} of its "
                                     f"{len(found.image):,} people cannot be used, more than 1 %, "
                                     f"the first {whys[0]} (the folder after the @ is the one "
                                     f"that the annotations' paths start from)")
            for (k, _), why in new.items():
                say(printable(f"{pictures.sets[k].name}: left out, {why}"))
            if batch:                           # pinned memory is copied beside the GPU's work
                batch = Batch(*(part.to(device, non_blocking=True) for part in batch))
                yield batch._replace(image=batch.image.float() / 255), rows
    except RuntimeError as error:               # a process was killed, or has no shared memory
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"--workers {workers}: a loading process ended ({error!s:.100}); is "
                         f"/dev/shm full? try --workers 0") from None


class RealPeople(SyntheticPeople):
    """Photographs with labels; the discriminators' motion is SyntheticPeople's, or AMASS'.

    options: data, mix, mocap and workers of the command line.  batch(step) and motion(n, step) are
    functions of (seed, step, rank) alone, whatever --workers says.  `--no-paired` hides all 3D.
    Raises ValueError, FileNotFoundError.
    """

    def __init__(self, config: Config, smpl: SMPL, options: argparse.Namespace):
        (rank, ranks), mocap = train.rank_and_ranks(), options.mocap
        sets = [read_people(text) for text in options.data]
        if not config.paired:
            sets = [usable(x._replace(S=0 * x.S, has_smpl=x.has_smpl & False)) for x in sets]
        share = shares(sets, options.mix)
        print_people(sets, share)
        if len(smpl.v_template) != 6890 and (mocap or any(x.has_smpl.any() for x in sets)):
            say(f"{smpl.name} is not SMPL's mesh: the betas of --data and --mocap mean something "
                f"else on it; name SMPL's file by --smpl")
        if mocap:
            frames, recorded = read_amass(Path(mocap))                # (M, 24, 3), (M, 10)
            self.recorded = recorded.to(smpl.v_template.device)
        else:
            frames, self.recorded = load_mocap(config.upright, False, config.validate), None
            say("no --mocap: the adversary knows the open clips' motion, and betas ~ N(0, 1)")
        super().__init__(smpl, frames, config.batch // ranks, config.size, seed=config.seed,
                         rank=rank, mix=not mocap)
        # The pictures' names, but no folder: one that has moved does not make other data.
        names = hashlib.sha256(b"\n".join(b"".join([*found.image]) for found in sets)).hexdigest()
        kinds = ", ".join(f"{found.name.partition(':')[0]} {len(found.image):,} people {part:.1%}"
                          for found, part in zip(sets, share))
        self.name = (f"photographs ({kinds}; names {names[:12]}; {len(frames):,} frames of "
                     f"{'AMASS' if mocap else 'the open clips'}; `python -m appendix.datasets "
                     f"train`)")
        # Nothing in these refers to this object: a cycle would end the loading processes too late.
        self.photographs, self.workers = Pictures(sets, config.size, config.crop), options.workers
        self.draws = functools.partial(training_draws, [len(found.image) for found in sets], share,
                                       self.batch_size, config.crop, config.seed, rank)
        self.last = None, None                                        # number, Batch
        self.batch(0)                           # a wrong folder is found before a run begins

    def batch(self, step: int) -> Batch:
        """The step-th batch; asked for again at once, it is not read again (--overfit)."""
        if self.last[0] != step:
            if self.last[0] != step - 1:
                self.stream = batches(self.photographs, self.draws(step), self.workers, self.device)
            self.last = step, next(self.stream)[0]
        return self.last[1]

    def betas(self, n: int, rng: torch.Generator) -> Tensor:
        """Shapes for D, (n, 10), drawn apart from its poses: no discriminator sees both."""
        if self.recorded is None:
            return super().betas(n, rng)
        rows = torch.randint(len(self.recorded), (n,), generator=rng, device=self.device)     # (n,)
        return self.recorded.index_select(0, rows)                    # (n, 10)


def shares(sets: list[People], mix: tuple[float, ...]) -> np.ndarray:
    """Each data set's part of a batch: by --mix; or half from those with 3D and half from those
    without, where both exist (Sec. 3.4), in each half by size, as the official shards."""
    if mix:
        if len(mix) != len(sets) or not all(0 <= w < math.inf for w in mix) or not sum(mix):
            raise ValueError(f"--mix {' '.join(map(str, mix))}: expected one weight of 0 or more "
                             f"for each of the {len(sets)} --data, not all 0")
        return np.array(mix, float) / sum(mix)
    share = np.array([len(found.image) for found in sets], float)
    of_3d = np.array([bool(which_labels(found)[1:].any()) for found in sets])
    for half in (of_3d, ~of_3d):
        share[half] /= max(share[half].sum(), 1)
    return share / share.sum()


def print_people(sets: list[People], share: np.ndarray) -> None:
    say(f"{'data set':42s}{'people':>9s}{'with 2D':>9s}{'with 3D':>9s}{'with SMPL':>10s}"
        f"{'of a batch':>11s}  left out")
    for found, part in zip(sets, share):
        of_2d, of_3d, of_smpl = which_labels(found).sum(1).tolist()
        say(printable(f"{found.name:42s}{len(found.image):9,}{of_2d:9,}{of_3d:9,}{of_smpl:10,}"
                      f"{part:11.0%}  {reasons(found.skipped)}"))


# --------------------------------------------------------------------------------------------
# 6. Measures on real data (Sec. 4.1, Tables 1 to 3), the protocol beside every number

def load_joint_regressor(path: str, V: int) -> Tensor:
    """J_regressor_h36m.npy, which makes H3.6M's 17 joints of SMPL's vertices -> (17, V)."""
    expected = (f"J_regressor_h36m.npy, finite numbers (17, {V}), as many columns as the body "
                f"(--smpl) has vertices; without it 13 joints are measured")
    with reading(path, "no --joint-regressor", expected) as path:
        regressor = np.load(path, mmap_mode="r", allow_pickle=False)
        if regressor.shape != (17, V) or not np.isfinite(regressor).all():
            raise ValueError(f"{regressor.dtype} {regressor.shape}")
        return torch.from_numpy(regressor.astype(np.float32))


class Protocol:
    """How one data set is measured: joints, root, and the bodies that are the truth.  True joints
    are those measured, S, or where nobody has S a body's own."""

    def __init__(self, found: People, smpl: SMPL, options: argparse.Namespace):
        if not which_labels(found)[1:].any():
            raise ValueError(f"--data {found.name}: has neither S nor pose; nothing to measure by")
        device, path = smpl.v_template.device, options.joint_regressor
        self.found, self.from_S, self.regressor = found, bool(found.S.any()), None
        # Which points are compared, and whose middle is the root: a body's, and those of S.
        self.of_body = self.of_S = [*range(13 if self.from_S else 14)], [RIGHT_HIP, LEFT_HIP]
        self.joints = (f"13 of LSP's joints, no head, by {smpl.name}" if self.from_S else
                       "LSP's 14 joints, both bodies' own") + ", root the hips' middle"
        if path:
            self.regressor = load_joint_regressor(path, len(smpl.v_template)).to(device)  # (17, V)
            self.of_body, self.of_S = (H36M_TO_14, [0]), (J24_TO_14, [J24_PELVIS])
            self.joints = f"14 joints by {Path(path).name}, root its pelvis"
        self.bodies, self.body = [smpl], f"{smpl.name} for all"
        if options.smpl_genders:
            self.bodies += [SMPL(file).to(device) for file in options.smpl_genders]
            if len({len(body.v_template) for body in self.bodies}) > 1:
                raise ValueError(f"--smpl-genders {' '.join(options.smpl_genders)}: not the mesh "
                                 f"of --smpl; name SMPL's")
            neither, male, female = torch.bincount(found.gender, minlength=3).tolist()
            self.body = (f"male bodies of {male:,}, female of {female:,}, {smpl.name} of "
                         f"{neither:,} who are neither")
            if not male + female:
                raise ValueError(f"--smpl-genders: {found.name} says nobody's gender; leave it out")

    def rooted(self, keypoints: Tensor, vertices: Tensor) -> tuple[Tensor, Tensor]:
        """A body's joints (B, P, 3) and vertices (B, V, 3), metres, from the root: the regressor's
        pelvis, or without one the middle of the hips, as in the paper's code."""
        points, (used, roots) = keypoints, self.of_body
        if self.regressor is not None:
            points = self.regressor @ vertices                        # (B, 17, 3)
        root = points[:, roots].mean(1, keepdim=True)                 # (B, 1, 3)
        return points[:, used] - root, vertices - root

    def truth(self, batch: Batch, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """-> joints (B, P, 3), whether they are known (B,), vertices (B, V, 3), NaN: not known."""
        bodies = [smpl(batch.betas, batch.rotmats) for smpl in self.bodies]
        sex = self.found.gender[rows] * (len(bodies) > 1)             # (B,) 0: the first body
        whose = sex.to(batch.image.device), torch.arange(len(rows), device=batch.image.device)
        points, skin = self.rooted(torch.stack([body.keypoints for body in bodies])[whose],
                                   torch.stack([body.vertices for body in bodies])[whose])
        known = batch.has_smpl > 0                                    # (B,)
        skin = torch.where(known[:, None, None], skin, math.nan)      # (B, V, 3)
        if self.from_S:
            S, (used, roots) = self.found.S[rows].to(skin.device), self.of_S      # (B, 24, 4)
            points = S[:, used, :3] - S[:, roots, :3].mean(1, keepdim=True)       # (B, P, 3)
            known = (S[:, used + roots, 3] > 0).all(1)                # (B,)
        return points, known, skin


@torch.no_grad()
def measure(network: Network, found: People, options: argparse.Namespace) -> tuple[dict, dict]:
    """One data set -> its part of metrics.json, and arrays of every person's last prediction."""
    model, N = network.model, len(found.image)
    protocol, device = Protocol(found, model.smpl, options), model.smpl.v_template.device
    pictures = Pictures([found], network.config.size, network.crop, replace=False)
    draws, parts = ([Draw(0, row) for row in range(n, min(n + 64, N))] for n in range(0, N, 64)), []
    for batch, rows in batches(pictures, draws, options.workers, device):
        true, known, skin = protocol.truth(batch, rows)
        bodies = [model.decode(theta, vertices=True) for theta in model(batch.image)[0]]  # T
        rooted = [protocol.rooted(body.keypoints3d, body.vertices) for body in bodies]
        joints = torch.stack([points for points, _ in rooted], 1)     # (B, T, P, 3)
        pve = torch.stack([1000 * (x - skin).norm(dim=-1).mean(1) for _, x in rooted], 1)   # (B, T)
        parts.append([x.cpu() for x in (known, true, joints, pve, torch.tensor(rows), *(
            getattr(bodies[-1], key) for key in ("rotmats", "betas", "cam")))])
        if len(parts) % 200 == 0:
            say(f"{64 * len(parts):,} of {N:,} people")
    known, true, joints, pve, row, rotmats, betas, cam = map(torch.cat, zip(*parts))      # (n, ..)
    if not known.any():
        raise ValueError(f"--data {found.name}: nobody has all of {protocol.joints}")
    every = [(joints[known, t], true[known], pve[known, t]) for t in range(pve.shape[1])]
    # H3.6M's actions, if all pictures have names such as S9_Directions_1.54138969_000001.jpg
    image, kept = found.image[row.numpy()], known.numpy()             # (n,) each
    named = [re.search(r"(?:^|/)S\d+_([A-Za-z]+)[^/]*$", os.fsdecode(x)) for x in image[kept]]
    action = np.array([name[1] for name in named] if all(named) else [])
    per_action = {one: summary(*(x[action == one] for x in every[-1])) for one in sorted({*action})}
    mean = {key: float(np.mean([row[key] for row in per_action.values()]))
            for key in ("mpjpe", "pa_mpjpe", "frames")} if per_action else None
    result = {"data": found.name, "joints": protocol.joints, "frames": int(known.sum()),
              "truth": "measured joints S" if protocol.from_S else protocol.body,
              "skin": f"{len(model.smpl.v_template):,} vertices, the same root; truth: "
                      f"{protocol.body}", "frames_of_skin": int(pve[known, 0].isfinite().sum()),
              "per_iteration": [summary(*one) for one in every], "per_action": per_action,
              "mean_of_actions": mean}
    pose = Rotation.from_matrix(rotmats.flatten(0, 1).double()).as_rotvec()
    return result, {"data": np.full(len(image), found.name), "imgname": image, "row": row.numpy(),
                    "pose": pose.reshape(-1, 24, 3), "betas": betas.numpy(), "camera": cam.numpy(),
                    "joints_mm": 1000 * joints[:, -1].numpy()}


def summary(points: Tensor, true: Tensor, pve: Tensor) -> dict[str, float | None]:
    """Root-centred joints (n, P, 3) twice, metres, and pve (n,), mm, NaN where not known -> the
    seven measures (None: nobody has SMPL labels), each frame aligned by itself."""
    aligned = compute_similarity_transform(points, true)              # (n, P, 3)
    raw, pa = (summarize([{"mpjpe": 1000 * (x - true).norm(dim=-1)}]) for x in (points, aligned))
    skin = pve.nanmean().item()
    return {"frames": len(true), **raw, "pve": skin if math.isfinite(skin) else None,
            **{f"pa_{key}": x for key, x in pa.items()}}


def evaluate(network: Network, options: argparse.Namespace) -> list[dict]:
    """Measure on each data set in float32, print a line a measure, write metrics.json.  options:
    those of the command line.  Raises ValueError, FileNotFoundError."""
    network.model.eval().amp = None
    metrics = {"checkpoint": str(options.checkpoint), "of": list(options.data),
               "joint_regressor": options.joint_regressor, "genders": list(options.smpl_genders)}
    target, file, results, predictions = options.out / "metrics.json", options.result_file, [], []
    if target.exists() and not metrics.items() <= dict(read_json(target, "metrics.json")).items():
        raise ValueError(f"--out {options.out}: holds the metrics.json of other measurements; name "
                         f"another folder")
    if file and (file.exists() or file.suffix != ".npz"):
        raise ValueError(f"--result-file {file}: expected the name of a new file, .npz")
    for text in options.data:
        found = read_people(text)
        say(printable(f"{found.name}: {len(found.image):,} people, {reasons(found.skipped)}"))
        for part, into in zip(measure(network, found, options), (results, predictions)):
            into.append(part)
        print_measures(results[-1])
    write_atomically(target, json.dumps(metrics | {"results": results}, indent=1,
                                        allow_nan=False).encode())
    if file:
        content = io.BytesIO()
        np.savez_compressed(content, **{key: np.concatenate([p[key] for p in predictions])
                                        for key in predictions[0]})
        write_atomically(file, content.getvalue())
    say(printable(f"wrote {target}" + f" and {file}" * bool(file)))
    return results


def print_measures(result: dict) -> None:
    columns, bins = result["per_iteration"], "thresholds 0, 5 .. 150 mm, strictly below"
    skin = f"{result['skin']}; mean over {result['frames_of_skin']:,} frames"
    say(" " * 16 + "".join(f"  iteration {t + 1}" for t in range(len(columns))) + "  protocol")
    for key, title, protocol in (
            ("mpjpe", "MPJPE mm", f"{result['joints']}; truth: {result['truth']}; mean over "
                                  f"{result['frames']:,} frames"),
            ("pa_mpjpe", "PA-MPJPE mm", "each frame moved, turned, scaled onto the truth"),
            ("pve", "PVE mm", skin if result["frames_of_skin"] else "no SMPL labels"),
            ("pck", "PCK@150 %", "joints as of MPJPE, below 150 mm"), ("auc", "AUC %", bins),
            ("pa_pck", "PA-PCK@150 %", "joints as of PA-MPJPE"), ("pa_auc", "PA-AUC %", bins)):
        say(f"{title:16s}" + "".join(f"{'-':>13s}" if row[key] is None else f"{row[key]:13.1f}"
                                     for row in columns) + f"  {protocol}")
    if "3dhp" in result["data"].lower():
        say("SPIN's published numbers for 3DHP are over 17 joints, with pelvis, spine and jaw: "
            "another protocol")
    if result["per_action"]:
        say(f"{'last iteration':16s}{'MPJPE mm':>13s}{'PA-MPJPE mm':>13s}{'frames':>13s}")
        for title, row in (*result["per_action"].items(), ("mean of actions",
                                                           result["mean_of_actions"])):
            say(f"{title:16s}{row['mpjpe']:13.1f}{row['pa_mpjpe']:13.1f}{row['frames']:13,.0f}")


# ============================================================================================
# Not needed to understand HMR: the command line.

def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m appendix.datasets", allow_abbrev=False,
                                     description="Train HMR on photographs, or measure it there.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("orders", help="table of the data sets' joint orders")
    one = commands.add_parser("train", help="training on photographs", allow_abbrev=False,
                              epilog="All other flags are train.py's: python train.py --help")
    two = commands.add_parser("measure", help="measures of a network on data sets with 3D labels",
                              allow_abbrev=False)
    for add in (one.add_argument, two.add_argument):
        add("--data", nargs="+", required=True, metavar="KIND:FILE@IMAGES",
            help="data sets, one or several: coco:FILE@IMAGES, spin:FILE@IMAGES or lsp:DIR")
        add("--workers", type=int, default=2, help="processes that load pictures, 0 to 64 [2]")
    add = one.add_argument
    add("--mix", nargs="+", type=float, default=(), metavar="WEIGHT",
        help="weights of --data, one each (default: half 2D, half 3D, each by size)")
    add("--mocap", default="", metavar="DIR", help="AMASS folder for D (default: the open clips)")
    add("--mean-params", type=Path, metavar="FILE", help="start of the regressor: HMR's "
        "neutral_smpl_mean_params.h5 or SPIN's smpl_mean_params.npz (default: the body's own pose)")
    add = two.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a run's checkpoint.pt, or SPIN's weights")
    add("--smpl", default="", metavar="FILE", help="body file (default: the run's)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device [auto]")
    add("--joint-regressor", default="", metavar="FILE", help="J_regressor_h36m.npy: 14 joints")
    add("--smpl-genders", nargs=2, default=(), metavar=("MALE", "FEMALE"),
        help="body files of the two sexes, where the data tell them apart")
    add("--out", type=Path, default=Path("out/measure"), metavar="DIR", help="folder [out/measure]")
    add("--result-file", type=Path, metavar="FILE.npz", help="file of every person's prediction")
    return parser


def run(argv: list[str] | None) -> None:
    parser = command_line()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "orders":
        say("   " + "".join(f"{name:18s}" for name in ORDERS))
        for n, names in enumerate(itertools.zip_longest(*ORDERS.values(), fillvalue="")):
            say(f"{n:2d} " + "".join(f"{name:18s}" for name in names))
    elif not 0 <= options.workers <= 64:
        raise ValueError(f"--workers {options.workers}: expected 0 to 64")
    elif options.command == "measure":
        evaluate(load_network(options.checkpoint, options.smpl, options.device), options)
    elif "--eval" in rest:
        raise ValueError("--eval: measure on photographs by `python -m appendix.datasets measure "
                         "CHECKPOINT --data ..`")
    elif options.mean_params and "--resume" in rest:
        raise ValueError("--mean-params: --resume keeps the run's own start; leave it out")
    else:
        train.run(rest, functools.partial(RealPeople, options=options), theta_bar=(
            options.mean_params and functools.partial(read_mean_params, options.mean_params)))


def main(argv: list[str] | None = None) -> int:
    return exit_status("appendix.datasets", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
