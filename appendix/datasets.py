"""Real data for HMR: joint orders, crops, readers of the published formats, batches, measures.

The loop of train.py asks its world for `batch(step)` and `motion(n, step)`; with --data the world
is RealPeople, below, and with --eval .. --data the measures are `evaluate`'s.  Without --data no
chapter needs this file.  Sec. 3.4 and 4.1; official data_loader and converters; SPIN's files.

Axes:  N people of a data set   B pictures of a batch   H, W pixels of a picture   V vertices
       size = 224 pixels of a crop   19 keypoints   24 joints: SMPL's in pose and rotmats, SPIN's
       "J24" in S and part   M recorded frames   P joints that are compared
2D as everywhere: crop coordinates in [-1, 1]; a picture's pixel i covers [i, i + 1).  Annotations
that count whole pixels get + 0.5 where they are read, MATLAB's, which count from 1, - 0.5.

    python -m appendix.datasets      # the table of joint orders
    python train.py --data coco:ANNOTATIONS.json@IMAGES spin:FILE.npz@IMAGES lsp:DIR --mocap AMASS
    python train.py --eval CHECKPOINT --data spin:h36m_valid_protocol1.npz@IMAGES
"""

import argparse
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

from data import CROPS, Batch, SyntheticPeople, load_mocap
from hmr import LEFT_HIP, LSP, RIGHT_HIP, HMR, HMROutput
from smpl import (FLIP_JOINTS, FLIP_KEYPOINTS, JOINT_NAMES, KEYPOINT_NAMES, SMPL, batch_rodrigues,
                  exit_status, say)
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
J24_PELVIS = J24_NAMES.index("pelvis_mpii")         # where SPIN's files keep H3.6M's and 3DHP's root

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
