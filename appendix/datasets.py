"""Real data for HMR: joint orders, crops, readers of the published formats, batches, measures.

    python -m appendix.datasets orders      # the table of joint orders
    python -m appendix.datasets train --data coco:ANNOTATIONS.json@IMAGES spin:FILE.npz@IMAGES \
        lsp:DIR --mocap AMASS [flags of train.py]
    python -m appendix.datasets measure CHECKPOINT --data spin:h36m_valid_protocol1.npz@IMAGES

`train` is train.py's command with another world: the loop there asks its world for `batch(step)`
and `motion(n, step)`, and here the world is RealPeople, below.  No chapter needs this file.
Sec. 3.4 and 4.1; official data_loader and converters; SPIN's files.

Axes:  N people of a data set   B pictures of a batch   H, W pixels of a picture   V vertices
       size = 224 pixels of a crop   19 keypoints   24 joints: SMPL's in pose and rotmats, SPIN's
       "J24" in S and part   M recorded frames   P joints that are compared
2D as everywhere: crop coordinates in [-1, 1]; a picture's pixel i covers [i, i + 1).  Annotations
that count whole pixels get + 0.5 where they are read, MATLAB's, which count from 1, - 0.5.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as vision

import train
from appendix.spin import load_network
from data import CROPS, Batch, SyntheticPeople, load_mocap, seed_of
from hmr import LEFT_HIP, LSP, RIGHT_HIP, HMR
from smpl import (FLIP_JOINTS, FLIP_KEYPOINTS, JOINT_NAMES, KEYPOINT_NAMES, SMPL, batch_rodrigues,
                  exit_status, printable, say)
from train import Config, compute_similarity_transform, summarize

# --------------------------------------------------------------------------------------------
# 1. Joint orders.  Every map below is made by name; the published number tables are in the tests.

FACE = KEYPOINT_NAMES[LSP:]                                           # nose, eyes, ears
# SPIN's 24 slots: LSP's 14, then points that other data sets have, then the face.
J24_NAMES = (*KEYPOINT_NAMES[:LSP], "pelvis_mpii", "thorax_mpii", "spine_h36m", "jaw_h36m",
             "head_h36m", *FACE)
COCO_NAMES = ("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder",
              "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
              "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle")
# Rows of J_regressor_h36m.npy, left leg first; the neck is the same point as LSP's.
H36M_NAMES = ("pelvis_h36m", "left_hip", "left_knee", "left_ankle", "right_hip", "right_knee",
              "right_ankle", "spine_h36m", "neck", "jaw_h36m", "head_h36m", "left_shoulder",
              "left_elbow", "left_wrist", "right_shoulder", "right_elbow", "right_wrist")
# The field's 14 joints for H3.6M, 3DHP and 3DPW: LSP's, but the head's centre for its top.
FIELD14 = (*KEYPOINT_NAMES[:13], "head_h36m")

J24_TO_19 = [J24_NAMES.index(name) for name in KEYPOINT_NAMES]
J24_TO_14 = [J24_NAMES.index(name) for name in FIELD14]
H36M_TO_14 = [H36M_NAMES.index(name) for name in FIELD14]
COCO_TO_19 = [COCO_NAMES.index(name) if name in COCO_NAMES else -1 for name in KEYPOINT_NAMES]
J24_PELVIS = J24_NAMES.index("pelvis_mpii")         # the root of H3.6M's and 3DHP's S

ORDERS = {"keypoints (HMR)": KEYPOINT_NAMES, "LSP, LSPET": KEYPOINT_NAMES[:LSP],
          "part, S (SPIN)": J24_NAMES, "COCO": COCO_NAMES, "J_regressor_h36m": H36M_NAMES,
          "joints (SMPL)": JOINT_NAMES}


# --------------------------------------------------------------------------------------------
# 2. The crop (official data_loader) and the flip

def person_scales(keypoints: Tensor, visible: Tensor, crop: str = "official") -> Tensor:
    """`person_scale` of many: keypoints (N, 19, 2) pixels, visible (N, 19) -> (N,), infinite or
    not a number for less than 5 pixels or 2 visible points."""
    seen = (visible > 0)[..., None]                                   # (N, 19, 1)
    low = torch.where(seen, keypoints, math.inf).amin(1)              # (N, 2)
    high = torch.where(seen, keypoints, -math.inf).amax(1)            # (N, 2)
    box = torch.where(seen.sum(1) > 1, high - low, 0).norm(dim=-1)    # (N,)
    ankles, shoulders, hips = (0, 5), (8, 9), (2, 3)                  # right and left
    torsos = (keypoints[:, shoulders] - keypoints[:, hips]).norm(dim=-1)          # (N, 2)
    whole = seen[:, shoulders, 0] & seen[:, hips, 0]                  # (N, 2) both ends visible
    torso = torch.where(whole, torsos, 0).sum(1) / whole.sum(1)       # (N,) 0 / 0 = NaN: none
    cut_off = ~seen[:, ankles, 0].any(1)                              # (N,)
    by_torso = cut_off & whole.any(1)                                 # (N,)
    length = torch.where(by_torso, torso, box)                        # (N,)
    wanted = torch.where(by_torso, 75, torch.where(cut_off, 50, 150))             # (N,)
    scale = wanted * CROPS[crop][0] / 150 / length                    # (N,)
    return torch.where(length < 5, math.nan, scale)


def person_scale(keypoints: Tensor, visible: Tensor, crop: str = "official") -> float:
    """How many pixels of a 224 crop a picture's pixel becomes, by the official converters' rule.

    Where an ankle is visible, the diagonal of the visible points' box becomes 150 pixels; where
    none is (the person is cut off), the mean shoulder-to-hip distance 75; without that the box 50.
    (COCO's converter.  MPII's takes head top to hip, 75, else shoulder to hip, 56, else leaves the
    person out.)  crop: of data.CROPS; another than the official one scales all three alike.
    """
    scale = person_scales(keypoints[None], visible[None], crop).item()
    if not math.isfinite(scale):
        raise ValueError("cropping needs a person of at least 5 pixels")
    return scale


def cut_window(image: Tensor, center: Tensor, side: float, size: int,
               padding: str = "border") -> Tensor:
    """A square window of a picture -> (3, size, size), of the picture's dtype.

    image (3, H, W), bytes or numbers; center (2,) and side in the picture's pixels.  Only what the
    window needs is touched, still as bytes, then resized.  A picture that shrinks is low-passed
    first, or it aliases.  Beyond its border it is repeated, or 0 (padding "zeros").
    """
    H, W = image.shape[1:]
    reach = side / 2 + 2 * max(1.0, side / size)       # low-pass and interpolation look further
    (x0, y0), (x1, y1) = (center - reach).floor().tolist(), (center + reach).ceil().tolist()
    x0, y0 = int(min(max(x0, 0), W - 1)), int(min(max(y0, 0), H - 1))
    x1, y1 = int(min(max(x1, x0 + 1), W)), int(min(max(y1, y0 + 1), H))
    part = image[:, y0:y1, x0:x1]                                     # (3, h, w)
    extent = center.new_tensor([x1 - x0, y1 - y0])                    # (2,)
    if side > size:
        shrunk = [max(1, round(length * size / side)) for length in (y1 - y0, x1 - x0)]
        part = vision.resize(part, shrunk, antialias=True)            # (3, smaller h, w)
    # Crop coordinates in [-1, 1] -> the part's, in [-1, 1] as well, so the shrinking drops out.
    middle = 2 * (center - center.new_tensor([x0, y0])) / extent - 1  # (2,)
    window = torch.cat([torch.diag(side / extent), middle[:, None]], 1).float()   # (2, 3)
    grid = F.affine_grid(window[None], [1, 3, size, size], align_corners=False)
    cut = F.grid_sample(part[None].float(), grid, "bilinear", padding_mode=padding,
                        align_corners=False)[0]                       # (3, size, size)
    return cut if image.is_floating_point() else cut.round().to(image.dtype)


def crop_person(image: Tensor, keypoints: Tensor, visible: Tensor, size: int = 224,
                shift: tuple[float, float] = (0, 0), zoom: float = 1.0,
                crop: str = "official") -> tuple[Tensor, Tensor]:
    """Cut a person out as HMR does -> crop (3, size, size), keypoints2d (19, 2) in [-1, 1].

    image (3, H, W) in [0, 1]; keypoints (19, 2) pixels where pixel i covers [i, i + 1): add 0.5 to
    annotations that count whole pixels; visible (19,).  The visible points' box is centred and
    scaled by `person_scale`; `shift` (pixels of a 224 crop; official training: within 20) moves
    the window before `zoom` (0.8 to 1.23) scales it.  Beyond the picture its edge is repeated, as
    in the official code (SPIN pads with zeros); a picture that shrinks is low-passed (not there).
    Unlabelled points are set to 0, whatever they hold.
    """
    if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
        raise ValueError(f"the picture must be (3, H, W), numbers in [0, 1] (divide bytes by 255, "
                         f"colours first); got {tuple(image.shape)}, {image.dtype}")
    seen = keypoints[visible > 0]                                     # (n, 2)
    if len(seen) < 2:
        raise ValueError(f"cropping needs at least 2 visible keypoints, got {len(seen)}")
    scale = person_scale(keypoints, visible, crop)
    center = (seen.amin(0) + seen.amax(0)) / 2 + keypoints.new_tensor(shift) / scale      # (2,)
    side = 224 / (scale * zoom)                        # of the window, in the picture's pixels
    points = 2 * (keypoints - center) / side                          # (19, 2)
    points = torch.where(visible[:, None] > 0, points, torch.zeros_like(points))
    return cut_window(image, center, side, size), points


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
# 3. Readers: the published files -> People

class People(NamedTuple):
    """N labelled people of one data set, as arrays: 50,000 of them are 30 MB and not objects."""
    name: str                     # as on the command line, "coco:person_keypoints_train2014.json"
    folder: Path                  # of the pictures
    image: np.ndarray             # (N,) bytes: the picture's path in it
    keypoints2d: np.ndarray       # (N, 19, 2) pixels, pixel i covers [i, i + 1); 0 if not labelled
    visible: np.ndarray           # (N, 19) bool
    box: np.ndarray               # (N, 3) centre x, y and side, pixels: SPIN's box, 1.2 times the
    #                               person's longer side; NaN if there is none
    S: np.ndarray | None          # (N, 24, 4) J24: X, Y, Z metres in the camera's frame, labelled
    pose: np.ndarray | None       # (N, 72) axis-angle, root in the camera's frame
    betas: np.ndarray | None      # (N, 10)
    has_smpl: np.ndarray          # (N,) bool: pose and betas are labels
    gender: np.ndarray            # (N,) b"m", b"f" or b"": whose body pose and betas are of
    skipped: dict[str, int]       # why, and how many, rows of the file are left out


def people(name: str, folder: Path, image: list | np.ndarray, keypoints: np.ndarray,
           visible: np.ndarray, box: np.ndarray | None = None, S: np.ndarray | None = None,
           pose: np.ndarray | None = None, betas: np.ndarray | None = None,
           has_smpl: np.ndarray | None = None, gender: np.ndarray | None = None,
           skipped: dict[str, int] = {}) -> People:
    """The readers' arrays, brought to People's types; rows that cannot be cropped are left out.

    What is not finite is not labelled: a 2D or 3D point alone, pose and betas together.  Without
    both hips a person has no 3D (they are its origin).  Raises ValueError if nobody is left.
    """
    N = len(image)
    visible = (visible > 0) & np.isfinite(keypoints).all(-1)
    keypoints = np.where(visible[..., None], keypoints, 0).astype(np.float32)
    box = np.full((N, 3), np.nan, np.float32) if box is None else box.astype(np.float32)
    box[~(np.isfinite(box).all(1) & (box[:, 2] >= 5))] = np.nan
    if S is not None:
        labelled = (S[..., 3] > 0) & np.isfinite(S).all(-1)           # (N, 24)
        labelled &= labelled[:, [RIGHT_HIP, LEFT_HIP]].all(1, keepdims=True)
        S = np.where(labelled[..., None], S, 0).astype(np.float32)
    if pose is not None:
        finite = np.isfinite(pose).all(1) & np.isfinite(betas).all(1)
        has_smpl = finite if has_smpl is None else finite & (has_smpl > 0)
        pose, betas = (np.where(has_smpl[:, None], x, 0).astype(np.float32) for x in (pose, betas))
    has_smpl = np.zeros(N, bool) if has_smpl is None or pose is None else has_smpl
    gender = np.full(N, b"") if gender is None else gender.astype("S1")
    found = People(name, folder, np.array(image, "S"), keypoints, visible, box, S, pose, betas,
                   has_smpl, gender, dict(skipped))
    keep = torch.isfinite(windows(found)[1]).numpy()                  # (N,)
    if not keep.all():
        found.skipped["no 2 keypoints nor box of 5 pixels"] = int((~keep).sum())
        found = People(*(x[keep] if isinstance(x, np.ndarray) else x for x in found))
    if not len(found.image):
        raise ValueError(f"{name}: nobody in it can be trained on ({reasons(found)}); is it the "
                         f"right file?")
    return found


def reasons(found: People) -> str:
    return ", ".join(f"{n:,} {why}" for why, n in found.skipped.items() if n) or "nobody left out"


# A person's keypoints have a diagonal of 1.12 times their longer side, and a box of 1.2 times it
# (measured: median over data.py's training poses under any heading, 1.11 to 1.13).
DIAGONAL_OF_BOX = 1.12 / 1.2


def windows(found: People, crop: str = "official") -> tuple[Tensor, Tensor]:
    """Where each person is cut out: centres (N, 2) and sides (N,), pixels, before jitter.

    By the keypoints; by the box, so that a whole person comes out as large, where there are less
    than two.  crop "spin": SPIN's box itself, or 1.2 times the keypoints' longer side.
    """
    keypoints, visible = torch.from_numpy(found.keypoints2d), torch.from_numpy(found.visible)
    low = torch.where(visible[..., None], keypoints, math.inf).amin(1)            # (N, 2)
    high = torch.where(visible[..., None], keypoints, -math.inf).amax(1)          # (N, 2)
    box = torch.from_numpy(found.box)                                 # (N, 3)
    if crop == "spin":
        side = torch.where(visible.sum(1) > 1, 1.2 * (high - low).amax(1), math.nan)
        has_box = torch.isfinite(box[:, 2])                           # (N,)
        return (torch.where(has_box[:, None], box[:, :2], (low + high) / 2),
                torch.where(has_box, box[:, 2], side))
    side = 224 / person_scales(keypoints, visible, crop)              # (N,)
    by_points = torch.isfinite(side)
    by_box = box[:, 2] * DIAGONAL_OF_BOX * 224 / CROPS[crop][0]       # (N,)
    return (torch.where(by_points[:, None], (low + high) / 2, box[:, :2]),
            torch.where(by_points, side, by_box))


def read_people(text: str) -> People:
    """KIND:ANNOTATIONS@IMAGES -> People.  KIND stands before the first ":", IMAGES after the last
    "@"; of lsp the annotations are a folder, whose own images/ is the default."""
    kind, _, rest = text.partition(":")
    file, at, images = rest.rpartition("@") if "@" in rest else (rest, "", "")
    readers = {"coco": read_coco, "spin": read_spin, "lsp": read_lsp}
    if kind not in readers or not file or (kind != "lsp" and not images):
        raise ValueError(f"--data {text}: expected coco:ANNOTATIONS.json@IMAGES, "
                         f"spin:FILE.npz@IMAGES or lsp:DIR, IMAGES being the pictures' folder")
    found = readers[kind](Path(file), Path(images) if images else Path(file) / "images")
    # a wrong folder is found now: a hundred rows, not a look at every picture
    few = found.image[np.linspace(0, len(found.image) - 1, 100).astype(int)]
    if not any((found.folder / os.fsdecode(name)).is_file() for name in few):
        raise FileNotFoundError(f"--data {text}: {found.folder / os.fsdecode(few[0])} is not there,"
                                f" nor is any other picture tried; name the folder that the "
                                f"annotations' paths start from after the @")
    return found


def load_arrays(path: Path, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the wanted arrays that an .npz has.  No object is unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an .npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in wanted if key in file.files}
    except Exception as error:                  # zipfile's, zlib's, numpy's own
        raise ValueError(f"{path}: not a whole .npz of plain arrays ({type(error).__name__}: "
                         f"{error!s:.100}); get the file again") from None


def read_spin(path: Path, images: Path) -> People:
    """SPIN's .npz: imgname and any of center, scale, part, S, pose, shape, has_smpl, gender.

    Its boxes are scale * 200 pixels; its joints are J24; openpose (detections, no labels: SPIN
    itself gives them no weight) is not used.  SPIN's files keep their sources' pixel origin; read
    here as whole pixels, as OpenCV's projections and COCO's are: + 0.5.
    """
    shapes = {"imgname": (), "center": (2,), "scale": (), "part": (24, 3), "S": (24, 4),
              "pose": (72,), "shape": (10,), "has_smpl": (), "gender": ()}
    rows = load_arrays(path, tuple(shapes))
    if "imgname" not in rows or rows["imgname"].ndim != 1:
        raise ValueError(f"{path}: lacks imgname (N,), the pictures' paths; expected SPIN's .npz")
    N = len(rows["imgname"])
    for key, array in rows.items():
        kinds = "SU" if key in ("imgname", "gender") else "fiub"
        if array.shape != (N, *shapes[key]) or array.dtype.kind not in kinds:
            raise ValueError(f"{path}: {key} is {array.dtype} {array.shape}, expected "
                             f"{'text' if kinds == 'SU' else 'numbers'} {(N, *shapes[key])}; "
                             f"get the file again")
    if ("pose" in rows) != ("shape" in rows) or ("center" in rows) != ("scale" in rows):
        raise ValueError(f"{path}: has one of pose and shape, or of center and scale, without the "
                         f"other; expected both")
    part = rows.get("part", np.zeros((N, 24, 3)))[:, J24_TO_19].astype(np.float32)
    box = None
    if "center" in rows:
        box = np.concatenate([rows["center"] + 0.5, 200 * rows["scale"][:, None]], 1)
    return people(f"spin:{path.name}", images, np.char.encode(rows["imgname"].astype("U"), "utf-8"),
                  part[..., :2] + 0.5, part[..., 2], box, rows.get("S"), rows.get("pose"),
                  rows.get("shape"), rows.get("has_smpl"), rows.get("gender"))


def read_coco(path: Path, images: Path) -> People:
    """COCO's person_keypoints_*.json, filtered as the official converter does.

    Kept are people who are no crowd, with 6 points or more of visibility 2, a mask longer than 60
    pixels, and any labelled point that is neither face nor shoulder.  Visibility 1 (occluded) is a
    label like 2; neck and head's top are not labelled.  COCO counts whole pixels: + 0.5.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected COCO's person_keypoints_*.json")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        annotations = list(content["annotations"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not COCO's person_keypoints_*.json ({type(error).__name__}: "
                         f"{error!s:.80}); get the file again") from None
    image, points, boxes, skipped = [], [], [], {}
    for row in annotations:
        try:
            k, box = coco_row(row)
            name = names[row["image_id"]].encode()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = str(error) if type(error) is ValueError else "broken row"
            skipped[why] = skipped.get(why, 0) + 1
            continue
        image.append(name), points.append(k), boxes.append(box)
    k = np.array(points, np.float32).reshape(-1, 17, 3)               # (N, 17, 3)
    k = np.concatenate([k, np.zeros((len(k), 1, 3), np.float32)], 1)[:, COCO_TO_19]   # (N, 19, 3)
    return people(f"coco:{path.name}", images, image, k[..., :2] + 0.5, k[..., 2],
                  np.array(boxes, np.float32).reshape(-1, 3), skipped=skipped)


def coco_row(row: dict) -> tuple[np.ndarray, list[float]]:
    """One annotation -> keypoints (17, 3), box (3,); ValueError(why) if it is left out."""
    if row.get("iscrowd") or row.get("category_id", 1) != 1:
        raise ValueError("crowds or no persons")
    try:
        k = np.array(row["keypoints"], np.float32).reshape(17, 3)
        x, y, w, h = (float(v) for v in row["bbox"])
        mask = w, h
        if isinstance(row.get("segmentation"), list):                 # only crowds' are no polygons
            corners = np.concatenate([np.array(p, float) for p in row["segmentation"]])
            mask = np.ptp(corners.reshape(-1, 2), axis=0)             # (2,) the mask's extent
    except (ValueError, TypeError):
        raise ValueError("broken row") from None
    if (k[:, 2] == 2).sum() < 6:
        raise ValueError("fewer than 6 visible keypoints")
    if not max(mask) > 60:
        raise ValueError("60 pixels or smaller")
    if not (k[7:, 2] > 0).any():                                      # after face and shoulders
        raise ValueError("face and shoulders only")
    return k, [x + w / 2, y + h / 2, 1.2 * max(w, h)]                 # bbox is of edges: no 0.5


def read_lsp(folder: Path, images: Path) -> People:
    """Leeds Sports Pose: DIR/joints.mat, DIR/images/im0001.jpg; or its extended set, im00001.jpg.

    Told apart by the array's shape.  LSP, joints (3, 14, 2000): flag 0 is visible, 1 occluded (and
    not used, as in the official code); its second half is the test set and never read.  LSPET,
    joints (14, 3, 10000): flag 1 is visible.  MATLAB's pixels count from 1: - 0.5.
    """
    path = folder / "joints.mat"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected LSP's folder")
    try:
        joints = scipy.io.loadmat(path, variable_names=["joints"])["joints"]
    except NotImplementedError:
        raise ValueError(f"{path}: of MATLAB 7.3 (HDF5), not LSP's own file; get that") from None
    except Exception as error:                  # scipy's many
        raise ValueError(f"{path}: not a readable .mat with joints in it ({type(error).__name__}); "
                         f"get the file again") from None
    if joints.ndim != 3 or joints.dtype.kind not in "fiu" or sorted(joints.shape[:2]) != [3, 14]:
        raise ValueError(f"{path}: joints is {joints.dtype} {joints.shape}, expected LSP's numbers "
                         f"(3, 14, 2000) or LSPET's (14, 3, 10000)")
    if extended := joints.shape[0] == 14:
        joints = joints.transpose(2, 0, 1)                            # (N, 14, 3)
    else:
        joints = joints.transpose(2, 1, 0)[:joints.shape[2] // 2]     # (N, 14, 3) the training half
    visible = joints[..., 2] == (1 if extended else 0)                # (N, 14)
    names = [f"im{i + 1:0{5 if extended else 4}d}.jpg" for i in range(len(joints))]
    points = np.pad(joints[..., :2].astype(np.float32) - 0.5, ((0, 0), (0, 5), (0, 0)))
    return people(f"lsp:{folder.name}", images, names, points,
                  np.pad(visible, ((0, 0), (0, 5))),
                  skipped={} if extended else {"in the test half": len(joints)})


# AMASS' SMPL-H has 52 joints: 22 of the body, then 15 of each hand.  SMPL's hands are its first
# knuckles, 22 and 37 (left and right index finger).
SMPLH_HANDS = (22, 37)


def read_amass(folder: Path) -> tuple[Tensor, Tensor]:
    """AMASS' SMPL+H folders of *.npz -> frames (M, 24, 3) at 10 a second, betas (M, 10).

    For the adversary, which sees neither the root (AMASS is z-up) nor a picture.  The hands are
    drawn, as assets/README.md says for the open clips, where a clip leaves them still: else D would
    learn to look for the constant.  betas are the first 10 of a MALE or FEMALE body's 16: not quite
    the neutral space in which the official code's own clips are.
    """
    files = sorted(path for path in folder.rglob("*.npz") if path.name != "shape.npz")
    if not files:
        raise FileNotFoundError(f"--mocap {folder}: holds no .npz; expected AMASS' SMPL+H folders")
    clips, broken = [], []
    for n, path in enumerate(files):
        try:
            clips.append(read_clip(path, n))
        except ValueError as error:
            broken.append(str(error))
            if len(broken) > 0.01 * len(files):
                raise ValueError(f"--mocap {folder}: {len(broken)} of {len(files)} files are "
                                 f"unusable, the first: {broken[0]}") from None
    for why in broken:
        say(printable(f"left out: {why}"))
    say(f"--mocap {folder}: {len(clips):,} clips, {sum(len(pose) for pose, _ in clips):,} frames "
        f"at 10 a second; betas of gendered bodies")
    return tuple(torch.from_numpy(np.concatenate(parts)) for parts in zip(*clips))


def read_clip(path: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One AMASS file -> pose (M, 24, 3), betas (M, 10)."""
    clip = load_arrays(path, ("poses", "betas", "mocap_framerate"))
    poses, betas = (clip.get(key, np.zeros(0)) for key in ("poses", "betas"))
    rate = clip.get("mocap_framerate", np.zeros(0))
    if poses.ndim != 2 or poses.shape[1] != 156 or poses.dtype.kind != "f" or betas.ndim != 1 \
            or len(betas) < 10 or rate.size != 1 or not 1 <= rate.item() <= 1000:
        raise ValueError(f"{path}: expected SMPL+H's poses (M, 156), betas (16,), mocap_framerate; "
                         f"got {poses.shape}, {betas.shape}, {rate.shape} (SMPL-X's has 165)")
    if not (len(poses) and np.isfinite(poses).all() and np.isfinite(betas[:10]).all()):
        raise ValueError(f"{path}: no frames, or numbers that are not finite")
    step = max(1.0, rate.item() / 10)
    poses = poses[np.arange(0, len(poses), step).astype(int)].reshape(-1, 52, 3)  # (M, 52, 3)
    pose = np.concatenate([poses[:, :22], poses[:, SMPLH_HANDS]], 1).astype(np.float32)
    for hand, sign in ((22, 1), (23, -1)):
        if np.ptp(pose[:, hand], axis=0).max() < 1e-3:                # radians: still
            pose[:, hand] = wandering_hand(len(pose), [seed, hand]) * (1, sign, sign)
    return pose, np.repeat(betas[None, :10].astype(np.float32), len(pose), 0)


def wandering_hand(frames: int, seed: list[int]) -> np.ndarray:
    """A left hand (frames, 3) in radians, 10 a second: closed by 10 degrees about -z, wandering by
    3, 3 and 10 degrees, smooth over 0.15 s: what make_assets.py gives the open clips."""
    width = 1.5                                                       # frames
    white = np.random.default_rng(seed).standard_normal((frames, 3))
    smooth = gaussian_filter1d(white, width, axis=0, mode="wrap")
    smooth *= math.sqrt(2 * width * math.sqrt(math.pi))               # back to variance 1
    return np.radians(smooth * (3, 3, 10) - (0, 0, 10)).astype(np.float32)


# --------------------------------------------------------------------------------------------
# 4. Pictures, and the world that training asks for batches

def read_picture(path: str) -> Tensor:
    """A JPEG or PNG file -> (3, H, W) bytes, RGB.  Raises ValueError that says what is wrong.

    Grey becomes RGB, transparency is dropped, 16 bits become 8.  As it is stored, as TensorFlow's
    decoder does: an EXIF tag does not turn it, for the labels count stored pixels.
    """
    try:
        content = torch.from_numpy(np.fromfile(path, np.uint8))
        image = decode_image(content, ImageReadMode.RGB)              # (3, H, W)
    except (RuntimeError, OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no whole JPEG or PNG"
        raise ValueError(why) from None
    return image if image.dtype == torch.uint8 else (image.int() // 257).to(torch.uint8)


class Pictures(Dataset):
    """What the loading processes hold: people as arrays, no body, nothing on a GPU.

    pictures[step] -> (Batch with the image as bytes, its rows, [(data set, row, what could not be
    read), ..]), a function of (seed, step, rank) alone.  share: each data set's part of a batch.
    """

    def __init__(self, sets: list[People], size: int, crop: str, batch: int = 64,
                 share: np.ndarray | None = None, seed: int = 0, rank: int = 0):
        self.sets, self.size, self.crop, self.batch = sets, size, crop, batch
        self.share, self.seed, self.rank = share, seed, rank
        self.windows = [windows(found, crop) for found in sets]       # (N, 2), (N,) each

    def __getitem__(self, step: int) -> tuple[Batch | None, list, list]:
        rng, B = np.random.default_rng([self.seed, step, self.rank]), self.batch
        _, move, least, most = CROPS[self.crop]
        # evenly spaced, so that every batch has its share of each data set, to within one picture
        place = (np.arange(B) + rng.random()) / B                     # (B,)
        chosen = np.searchsorted(self.share.cumsum()[:-1], rng.permutation(place), "right")
        draws, rows, broken = rng.random((B, 5)), [], []
        for k, (u_row, u_x, u_y, u_zoom, _) in zip(chosen, draws):
            row = int(u_row * len(self.sets[k].image))
            shift = move * (2 * u_x - 1), move * (2 * u_y - 1)        # official: 20 pixels of 224
            cut = self.readable(k, row, shift, least + (most - least) * u_zoom, broken)
            if cut is None:
                return None, [], broken
            rows.append((k, *cut))
        batch, flip = self.collate(rows), torch.from_numpy(draws[:, 4] < 0.5)
        mirrored = flip_batch(batch)
        return Batch(*(torch.where(flip.view(-1, *[1] * (x.ndim - 1)), m, x)
                       for m, x in zip(mirrored, batch))), [row for _, row, *_ in rows], broken

    def readable(self, k: int, row: int, shift: tuple[float, float], zoom: float, broken: list):
        """The row's person, or the next one's whose picture can be read -> (row, crop, points);
        None after 1 % of the data set in a row."""
        N = len(self.sets[k].image)
        for tries in range(1 + N // 100):
            try:
                return ((row + tries) % N, *self.cut(k, (row + tries) % N, shift, zoom))
            except ValueError as error:
                broken.append((int(k), (row + tries) % N, str(error)))
        return None

    def cut(self, k: int, row: int, shift: tuple[float, float] = (0, 0),
            zoom: float = 1.0) -> tuple[Tensor, Tensor]:
        """One person -> crop (3, size, size) bytes, keypoints2d (19, 2); as `crop_person`."""
        found, (centers, sides) = self.sets[k], self.windows[k]
        path = found.folder / os.fsdecode(found.image[row])
        try:
            image = read_picture(path)                                # (3, H, W)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        side = float(sides[row])
        center = centers[row] + torch.tensor(shift) * side / 224      # (2,)
        side = side / zoom                                            # after the shift
        points = 2 * (torch.from_numpy(found.keypoints2d[row]) - center) / side   # (19, 2)
        padding = "zeros" if self.crop == "spin" else "border"
        return cut_window(image, center, side, self.size, padding), points

    def collate(self, rows: list[tuple]) -> Batch:
        """[(data set, row, crop, points), ..] -> Batch; what a data set lacks is 0 and masked."""
        def stack(key, shape):
            parts = [getattr(self.sets[k], key) for k, *_ in rows]
            return torch.from_numpy(np.stack([
                np.zeros(shape, np.float32) if part is None else part[row].astype(np.float32)
                for part, (_, row, *_) in zip(parts, rows)]))
        visible, has_smpl = stack("visible", 19), stack("has_smpl", ())           # (B, 19), (B,)
        S = stack("S", (24, 4))[:, J24_TO_19]                         # (B, 19, 4)
        rotmats = batch_rodrigues(stack("pose", 72).view(-1, 24, 3))  # (B, 24, 3, 3)
        points = torch.stack([points for *_, points in rows])         # (B, 19, 2)
        return Batch(image=torch.stack([crop for _, _, crop, _ in rows]), visible=visible,
                     keypoints2d=points * visible[..., None], keypoints3d=S[..., :3],
                     rotmats=rotmats * has_smpl[:, None, None, None], betas=stack("betas", 10),
                     has_3d=S[..., 3], has_smpl=has_smpl, cam=torch.zeros(len(rows), 3))


class Stream:
    """pictures[n], pictures[n + 1], .. ahead of need, by processes; whatever they cannot read is
    counted and named, and is an error above 1 % of a data set."""

    def __init__(self, pictures: Pictures, workers: int, device: torch.device):
        self.pictures, self.workers, self.device = pictures, workers, device
        self.ahead, self.next = None, -1
        self.broken = [set() for _ in pictures.sets]

    def __call__(self, n: int) -> tuple[Batch | None, list[int]]:
        """pictures[n] on the device, image in [0, 1], and its rows; what was broken is said."""
        batch, rows, broken = self.fetch(n)
        for k, row, what in broken:
            seen, found = self.broken[k], self.pictures.sets[k]
            if row not in seen:
                seen.add(row)
                say(printable(f"{found.name}: left out, {what}"))
            if len(seen) > 0.01 * len(found.image):
                raise ValueError(f"{found.name}: the pictures of {len(seen)} of its "
                                 f"{len(found.image):,} people cannot be read, more than 1 %, the "
                                 f"last {what}; get them again")
        if batch is not None:
            batch = Batch(*(part.to(self.device, non_blocking=True) for part in batch))
            batch = batch._replace(image=batch.image.float() / 255)   # (B, 3, size, size)
        return batch, rows

    def fetch(self, n: int) -> tuple:
        if self.workers == 0:
            return self.pictures[n]
        if self.ahead is None or n != self.next:
            # a generator of its own: the loader's draw must not touch that of dropout
            self.ahead = iter(DataLoader(
                self.pictures, batch_size=None, sampler=range(n, 2 ** 62),
                generator=torch.Generator(), num_workers=self.workers,
                worker_init_fn=leave_ctrl_c_to_main, pin_memory=self.device.type == "cuda"))
            self.next = n
        self.next += 1
        try:
            return next(self.ahead)
        except RuntimeError as error:           # killed, or no shared memory
            raise ValueError(f"--workers {self.workers}: a loading process ended ({error!s:.100}); "
                             f"is /dev/shm full? try --workers 0") from None


def leave_ctrl_c_to_main(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class RealPeople:
    """Photographs with labels in SyntheticPeople's place, for train.py's loop.

    options: data, mix, mocap and workers of the command line.

    batch(step) and motion(n, step) are functions of (seed, step, rank) alone, whatever --workers
    says.  Half a batch comes from data sets with 3D labels and half from those without, where both
    exist (Sec. 3.4), in each half by size, as the official shards; or by --mix.  `--no-paired`
    hides all 3D.  Raises ValueError, FileNotFoundError.
    """

    def __init__(self, config: Config, smpl: SMPL, options: argparse.Namespace):
        rank, ranks = train.rank_and_ranks()
        sets = [read_people(text) for text in options.data]
        if not config.paired:
            sets = [found._replace(S=None, has_smpl=0 * found.has_smpl) for found in sets]
        self.batch_size, share = config.batch // ranks, shares(sets, options.mix)
        print_people(sets, share)
        limbs = [JOINT_NAMES.index(name) for name in KEYPOINT_NAMES[:13]]
        if torch.equal(smpl.cocoplus_regressor[:13], smpl.J_regressor[limbs]):
            say(f"{smpl.name}: its 19 keypoints are SMPL's joints and six vertices, not what HMR's "
                f"regressor makes of the skin; hips, neck and ankles are not where people click")
        if len(smpl.v_template) != 6890 and (options.mocap or any(x.has_smpl.any() for x in sets)):
            say(f"{smpl.name} is not SMPL's mesh: the betas of --data and --mocap mean something "
                f"else on it; name SMPL's file by --smpl")
        if options.mocap:
            frames, self.betas = read_amass(Path(options.mocap))
        else:
            frames, self.betas = load_mocap(config.upright, False, config.validate), None
            say("no --mocap: the adversary knows the open clips' motion, and betas ~ N(0, 1)")
        self.pool = SyntheticPeople(smpl, frames, self.batch_size, config.size, seed=config.seed,
                                    rank=rank, mix=not options.mocap)
        pictures = Pictures(sets, config.size, config.crop, self.batch_size, share, config.seed,
                            rank)
        self.stream, self.last = Stream(pictures, options.workers, self.pool.device), (-1, None)
        self.name = name_of(sets, share, f"{len(frames):,} frames of "
                            f"{'AMASS' if options.mocap else 'the open clips'}")

    def batch(self, step: int) -> Batch:
        """The step-th batch; asked for again at once, it is not read again (--overfit)."""
        if self.last[0] != step:
            self.last = step, self.stream(step)[0]
        return self.last[1]

    def motion(self, n: int, step: int) -> tuple[Tensor, Tensor]:
        """Real samples for D: rotmats (n, 23, 3, 3), mirrored half the time; betas (n, 10).

        Poses and betas are drawn apart: none of the 25 discriminators sees both.
        """
        rotmats, betas = self.pool.motion(n, step)
        if self.betas is not None:
            rng = torch.Generator().manual_seed(seed_of(self.pool.seed, step, self.pool.rank, 2))
            rows = torch.randint(len(self.betas), (n,), generator=rng)            # (n,)
            betas = self.betas[rows].to(betas.device)                 # (n, 10)
        return rotmats, betas


def name_of(sets: list[People], share: np.ndarray, motion: str) -> str:
    """What a world of photographs is made of: kinds, counts and the pictures' names, but no folders,
    since a folder that has moved does not make other data.  A checkpoint keeps it."""
    names = hashlib.sha256(b"\n".join(b"".join([*found.image]) for found in sets)).hexdigest()
    kinds = ", ".join(f"{found.name.partition(':')[0]} {len(found.image):,} people {part:.1%}"
                      for found, part in zip(sets, share))
    return (f"photographs ({kinds}; names {names[:12]}; {motion}; `python -m appendix.datasets "
            f"train`)")


def has_3d_labels(found: People) -> bool:
    return bool(found.has_smpl.any() or (found.S is not None and found.S[..., 3].any()))


def shares(sets: list[People], mix: tuple[float, ...]) -> np.ndarray:
    """Each data set's part of a batch: by --mix, or half 2D and half 3D, in each half by size."""
    if mix:
        if len(mix) != len(sets) or not all(0 <= w < math.inf for w in mix) or not sum(mix):
            raise ValueError(f"--mix {' '.join(map(str, mix))}: expected one weight of 0 or more "
                             f"for each of the {len(sets)} --data, not all 0")
        return np.array(mix, float) / sum(mix)
    share = np.array([len(found.image) for found in sets], float)
    of_3d = np.array([has_3d_labels(found) for found in sets])
    for half in (of_3d, ~of_3d):
        if half.any():
            share[half] /= share[half].sum()
    return share / share.sum()


def print_people(sets: list[People], share: np.ndarray) -> None:
    say(f"{'data set':42s}{'people':>9s}{'with 3D':>9s}{'with SMPL':>10s}{'of a batch':>11s}"
        f"  left out")
    for found, part in zip(sets, share):
        with_3d = 0 if found.S is None else int((found.S[..., 3] > 0).any(1).sum())
        say(printable(f"{found.name:42s}{len(found.image):9,}{with_3d:9,}"
                      f"{int(found.has_smpl.sum()):10,}{part:11.0%}  {reasons(found)}"))


# --------------------------------------------------------------------------------------------
# 5. Measures on real data (Sec. 4.1, Tables 1 to 3), the protocol beside every number

class InOrder(Pictures):
    """Every person of one data set once, 64 at a time, without jitter or flip."""

    def __getitem__(self, n: int) -> tuple[Batch | None, list, list]:
        rows, broken = [], []
        for row in range(n * self.batch, min((n + 1) * self.batch, len(self.sets[0].image))):
            try:
                rows.append((0, row, *self.cut(0, row)))
            except ValueError as error:
                broken.append((0, row, str(error)))
        return self.collate(rows) if rows else None, [row for _, row, *_ in rows], broken


def load_joint_regressor(path: str, V: int) -> Tensor | None:
    """J_regressor_h36m.npy, which makes H3.6M's 17 joints of SMPL's vertices -> (17, V)."""
    if not path:
        return None
    try:
        regressor = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"--joint-regressor {path}: no such file; leave it out for 13 "
                                f"joints by the body's own keypoints") from None
    except Exception as error:
        raise ValueError(f"--joint-regressor {path}: not a readable .npy of numbers "
                         f"({type(error).__name__}); get J_regressor_h36m.npy again") from None
    if not isinstance(regressor, np.ndarray) or regressor.dtype.kind != "f" or \
            regressor.shape != (17, V) or not np.isfinite(regressor).all():
        raise ValueError(f"--joint-regressor {path}: expected finite numbers (17, {V}), as many "
                         f"columns as the body (--smpl) has vertices")
    return torch.from_numpy(regressor).float()


def compared(keypoints: Tensor, vertices: Tensor, regressor: Tensor | None,
             P: int) -> tuple[Tensor, Tensor]:
    """A body's P joints (B, P, 3) and vertices (B, V, 3), metres, from the root they are measured
    from: the regressor's pelvis, or without one the middle of the hips, as in the paper's code."""
    if regressor is None:
        points, root = keypoints[:, :P], keypoints[:, RIGHT_HIP:LEFT_HIP + 1].mean(1, keepdim=True)
    else:
        joints = regressor @ vertices                                 # (B, 17, 3)
        points, root = joints[:, H36M_TO_14], joints[:, :1]           # (B, 14, 3), (B, 1, 3)
    return points - root, vertices - root


def true_points(S: Tensor, with_regressor: bool) -> tuple[Tensor, Tensor]:
    """Measured joints, S (B, 24, 4) in J24's order -> (B, P, 3) from the root as in `compared`, and
    who has them all (B,)."""
    used = J24_TO_14 if with_regressor else list(range(13))
    roots = [J24_PELVIS] if with_regressor else [RIGHT_HIP, LEFT_HIP]
    points = S[:, used, :3] - S[:, roots, :3].mean(1, keepdim=True)   # (B, P, 3)
    return points, (S[:, used + roots, 3] > 0).all(1)


def errors_of(points: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Root-centred joints (B, P, 3) twice -> errors (B, P), mm, before and after Procrustes."""
    aligned = compute_similarity_transform(points, true)              # (B, P, 3) frame by frame
    return {"mpjpe": 1000 * (points - true).norm(dim=-1),
            "pa_mpjpe": 1000 * (aligned - true).norm(dim=-1)}


class Truth:
    """Whom a data set's people are compared with: bodies of their gender, and measured joints."""

    def __init__(self, found: People, options: argparse.Namespace, smpl: SMPL,
                 regressor: Tensor | None):
        if not has_3d_labels(found):
            raise ValueError(f"--data {found.name}: has neither S nor pose; nothing to measure by")
        self.found, self.regressor, self.bodies = found, regressor, {b"": smpl}
        for gender, path in zip((b"m", b"f"), options.smpl_genders):
            self.bodies[gender] = SMPL(path).to(smpl.v_template.device)
            if self.bodies[gender].v_template.shape != smpl.v_template.shape:
                raise ValueError(f"--smpl-genders {path}: not the mesh of --smpl; name SMPL's")
        self.from_S = found.S is not None and bool(found.S[..., 3].any())
        self.P = 13 if self.from_S and regressor is None else 14
        hips = "root the hips' middle"
        self.joints = (
            f"14 joints by {Path(options.joint_regressor).name}, root its pelvis" if regressor is not
            None else f"13 of LSP's joints, no head, by {smpl.name}, {hips}" if self.from_S else
            f"LSP's 14 joints, both bodies' own, {hips}")
        self.body = "male and female bodies" if options.smpl_genders else f"{smpl.name} for all"

    def __call__(self, batch: Batch, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> joints (B, P, 3), whether known (B,), vertices (B, V, 3), whether known (B,)."""
        body, device = self.bodies[b""](batch.betas, batch.rotmats), batch.image.device
        keypoints, skin = body.keypoints, body.vertices
        for gender, smpl in self.bodies.items():
            theirs = torch.from_numpy(self.found.gender[rows] == gender).to(device)
            if gender and theirs.any():
                body = smpl(batch.betas[theirs], batch.rotmats[theirs])
                keypoints[theirs], skin[theirs] = body.keypoints, body.vertices
        known = batch.has_smpl > 0                                    # (B,)
        points, skin = compared(keypoints, skin, self.regressor, self.P)
        if not self.from_S:
            return points, known, skin, known
        S = torch.from_numpy(self.found.S[rows]).to(device)           # (B, 24, 4)
        return *true_points(S, self.regressor is not None), skin, known


@torch.no_grad()
def measure(model: HMR, config: Config, options: argparse.Namespace, found: People,
            regressor: Tensor | None) -> dict:
    """One data set: each iteration's measures, averaged over frames -> what `evaluate` prints."""
    truth = Truth(found, options, model.smpl, regressor)
    # SPIN's network comes with a crop of its own
    pictures = InOrder([found], config.size, "spin" if hasattr(model, "crop") else config.crop)
    stream = Stream(pictures, options.workers, model.smpl.v_template.device)
    errors, skins = [], []                                            # per batch, T of each
    for n in range(math.ceil(len(found.image) / pictures.batch)):
        batch, rows = stream(n)
        if n % 200 == 199:
            say(f"{(n + 1) * pictures.batch:,} of {len(found.image):,} people")
        if batch is None:
            continue
        points, known, skin, with_skin = truth(batch, rows)
        theta_errors, theta_skins = [], []
        for theta in model(batch.image)[0]:
            pred = model.decode(theta, vertices=True)
            p, v = compared(pred.keypoints3d, pred.vertices, regressor, truth.P)
            theta_errors.append(errors_of(p[known], points[known]))
            theta_skins.append(1000 * (v - skin)[with_skin].norm(dim=-1).mean(1))     # (n,)
        errors.append(theta_errors), skins.append(theta_skins)
    result = {"name": found.name, "truth": truth, "per_iteration": [],
              "frames": sum(len(e[0]["mpjpe"]) for e in errors),
              "skins": sum(len(s[0]) for s in skins)}
    if not result["frames"]:
        raise ValueError(f"--data {found.name}: nobody has all of {truth.joints}")
    for of_theta, of_skin in zip(zip(*errors), zip(*skins)):
        row = summarize(list(of_theta))
        aligned = summarize([{"mpjpe": e["pa_mpjpe"]} for e in of_theta])
        result["per_iteration"].append(row | {
            "pve": torch.cat(of_skin).mean().item(), "pa_pck": aligned["pck"],
            "pa_auc": aligned["auc"]})
    return result


def evaluate(model: HMR, config: Config, options: argparse.Namespace) -> list[dict]:
    """Measure on each data set and print, a line a measure, with its protocol.

    model: HMR, or what has its forward, decode and smpl (with a `crop`: SPIN, whose boxes are cut
    out as they are in its files).  options: data, joint_regressor, smpl_genders and workers of the
    command line.  In float32.  Raises ValueError, FileNotFoundError.
    """
    model.eval().amp = None
    smpl, results = model.smpl, []
    regressor = load_joint_regressor(options.joint_regressor, len(smpl.v_template))
    regressor = None if regressor is None else regressor.to(smpl.v_template.device)
    for text in options.data:
        found = read_people(text)
        say(printable(f"{found.name}: {len(found.image):,} people, {reasons(found)}"))
        results.append(measure(model, config, options, found, regressor))
        print_measures(results[-1])
    return results


def print_measures(result: dict) -> None:
    truth, V = result["truth"], len(result["truth"].bodies[b""].v_template)
    frames = f"mean over {result['frames']:,} frames"
    root = f"{truth.joints}; truth: {'measured joints S' if truth.from_S else truth.body}; {frames}"
    aligned = "the same, each frame moved, turned and scaled onto the truth"
    skin = (f"{V:,} vertices, the same root; truth: {truth.body}; mean over {result['skins']:,} "
            f"frames" if result["skins"] else "no SMPL labels")
    bins = "thresholds 0, 5 .. 150 mm, strictly below"
    say(f"{'':16s}" + "".join(f"{f'iteration {t}':>13s}" for t in range(
        1, 1 + len(result["per_iteration"]))) + "  protocol")
    for key, title, protocol in (
            ("mpjpe", "MPJPE mm", root), ("pa_mpjpe", "PA-MPJPE mm", aligned),
            ("pve", "PVE mm", skin), ("pck", "PCK@150 %", "joints as of MPJPE, below 150 mm"),
            ("auc", "AUC %", bins),
            ("pa_pck", "PA-PCK@150 %", "joints as of PA-MPJPE"), ("pa_auc", "PA-AUC %", bins)):
        values = [row[key] for row in result["per_iteration"]]
        say(f"{title:16s}" + "".join(f"{v:13.1f}" if math.isfinite(v) else f"{'-':>13s}"
                                     for v in values) + f"  {protocol}")


# ============================================================================================
# Not needed to understand HMR: the table of joint orders, the command line.

def print_orders() -> None:
    say("   " + "".join(f"{name:18s}" for name in ORDERS))
    for i in range(max(map(len, ORDERS.values()))):
        say(f"{i:2d} " + "".join(f"{order[i] if i < len(order) else '':18s}"
                                 for order in ORDERS.values()))


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", required=True, metavar="KIND:FILE@IMAGES",
                        help="data sets: coco:FILE@IMAGES, spin:FILE@IMAGES or lsp:DIR, several")
    parser.add_argument("--workers", type=int, default=2, help="processes that load pictures [2]")


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m appendix.datasets", allow_abbrev=False,
                                     description="Train HMR on photographs, or measure it there.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("orders", help="table of the data sets' joint orders")
    one = commands.add_parser("train", help="training on photographs", allow_abbrev=False,
                              epilog="All other flags are train.py's: python train.py --help")
    add_source(one)
    one.add_argument("--mix", nargs="+", type=float, default=(), metavar="WEIGHT",
                     help="weights of --data, one each (default: half 2D, half 3D, each by size)")
    one.add_argument("--mocap", default="", metavar="DIR",
                     help="AMASS folder for the adversary (default: the open clips)")
    two = commands.add_parser("measure", help="measures of a network on data sets with 3D labels",
                              allow_abbrev=False)
    two.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's, or SPIN's published weights")
    add_source(two)
    two.add_argument("--smpl", default="", metavar="FILE", help="body file (default: the run's)")
    two.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                     help="device [auto]")
    two.add_argument("--joint-regressor", default="", metavar="FILE",
                     help="J_regressor_h36m.npy, for the field's 14 joints")
    two.add_argument("--smpl-genders", nargs=2, default=(), metavar=("MALE", "FEMALE"),
                     help="body files of the two sexes, where the data tell them apart")
    options, rest = parser.parse_known_args(argv)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "orders":
        return print_orders()
    if options.workers < 0:
        raise ValueError(f"--workers {options.workers}: expected 0 or more")
    if options.command == "train":
        if "--eval" in rest:
            raise ValueError("--eval: measure on photographs by `python -m appendix.datasets "
                             "measure CHECKPOINT --data ..`")
        return train.run(rest, make_world=functools.partial(RealPeople, options=options))
    model, _, config = load_network(options.checkpoint, options.smpl, options.device)
    evaluate(model, config, options)


def main(argv: list[str] | None = None) -> int:
    return exit_status("appendix.datasets", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
