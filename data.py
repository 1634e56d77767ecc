"""Pictures of people with labels: mocap poses, a z-buffer renderer, an endless synthetic world.

Chapter 3 of 4 (smpl.py <- hmr.py <- data.py <- train.py).  HMR trains on photographs with 2D
keypoints, some with 3D, and on motion capture that belongs to no picture (Sec. 3.2, 4).  All of
those are licensed; here people are drawn instead: recorded motion poses an open body, a camera is
drawn, a small renderer makes the picture and every label is known exactly.  Half of the pictures
then "forget" their 3D, as in the paper.

Axes:  B pictures   V vertices   F triangles   H = W = size in pixels   19 keypoints   24 joints
       in the renderer: M triangles facing us   Q pairs of a triangle and a pixel   P pixels hit
Camera frame: x right, y DOWN, z away from the camera, metres.  2D in [-1, 1] of the square crop,
pixel = (x + 1) * size / 2; pixel i covers [i, i + 1) and is sampled at i + 0.5, so that
mirroring a picture is exactly x -> -x.

    python data.py           # a contact sheet of samples with keypoints drawn: out/data.png
"""

import argparse
import functools
import io
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.utils
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from hmr import project
from smpl import (FLIP_JOINTS, FLIP_KEYPOINTS, SMPL, batch_rodrigues, exit_status,
                  write_atomically)

# --------------------------------------------------------------------------------------------
# 1. Poses: recorded motion (Sec. 3.3: the adversarial prior's real samples)

MOCAP = Path(__file__).resolve().parent / "assets" / "mocap.npz"
# --small's; mostly upright: spin is level in the air for 40 frames, held-out kick leans over
UPRIGHT = ("walk", "run", "dance_a", "punch", "spin", "spinkick", "jump")
HELD_OUT = ("dance_b", "kick", "roll")                                         # never trained on
# Joints that are swapped between frames as one piece: arms (collar to hand), legs, spine, head.
LIMBS = ((13, 16, 18, 20, 22), (14, 17, 19, 21, 23), (1, 4, 7, 10), (2, 5, 8, 11), (3, 6, 9),
         (12, 15))


# Random numbers are drawn on the generator's device and then moved, so that the evaluation
# pictures, drawn with a CPU generator, show the same people on every machine.

def _rand(shape, rng: torch.Generator, device) -> Tensor:
    return torch.rand(shape, generator=rng, device=rng.device).to(device)


def _randn(shape, rng: torch.Generator, device) -> Tensor:
    return torch.randn(shape, generator=rng, device=rng.device).to(device)


def _randint(high: int, n: int, rng: torch.Generator, device) -> Tensor:
    return torch.randint(high, (n,), generator=rng, device=rng.device).to(device)


@functools.cache
def constant(values: tuple, device: torch.device | str) -> Tensor:
    """Numbers that never change, copied to the device ONCE.

    A list as an index, or `new_tensor`, is copied on every call, and the program then waits until
    a GPU has finished all that was asked of it before.
    """
    return torch.tensor(values, device=device)


def load_mocap(upright: bool, held_out: bool, path: str | Path = MOCAP) -> Tensor:
    """Frames of the training or the held-out clips -> (N, 24, 3) axis-angle, SMPL's y-up frame."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; restore assets/ or remake it with "
                                f"assets/make_assets.py")
    with np.load(path, allow_pickle=False) as file:
        clips = {name: file[name] for name in file.files}
    if held_out:
        names = [n for n in HELD_OUT if not (upright and n == "roll")]
    else:
        names = UPRIGHT if upright else [n for n in sorted(clips) if n not in HELD_OUT]
    missing = [n for n in names if n not in clips]
    if missing:
        raise ValueError(f"{path}: lacks the clips {', '.join(missing)}; remake it with "
                         f"assets/make_assets.py")
    frames = np.concatenate([clips[n] for n in names]).astype(np.float32)         # (N, 72)
    return torch.from_numpy(frames).view(-1, 24, 3)


def mirror_pose(pose: Tensor) -> Tensor:
    """The pose seen in a mirror: (..., 24, 3) -> same.  Swap sides; M R(r) M = R(r * (1, -1, -1)).

    The root's rotation is mirrored too (the official docstring says it is left alone; its sign
    table flips it).
    """
    swapped = pose.index_select(-2, constant(FLIP_JOINTS, pose.device))           # (..., 24, 3)
    return swapped * constant((1, -1, -1), pose.device)


def draw_poses(frames: Tensor, n: int, rng: torch.Generator, mix: bool = True) -> Tensor:
    """Draw n poses (n, 24, 3) from recorded frames (N, 24, 3), recorded root included.

    A frame, mirrored half the time; with `mix`, each limb comes from another frame with
    probability 0.3 and every joint gets a little noise.  The pictures AND the discriminators' real
    samples come from this one function: were the two distributions different, D would learn to
    reject the very labels that L_smpl pulls the encoder to.
    """
    def frame() -> Tensor:
        pose = frames[_randint(len(frames), n, rng, frames.device)]               # (n, 24, 3)
        mirrored = _rand((n, 1, 1), rng, frames.device) < 0.5
        return torch.where(mirrored, mirror_pose(pose), pose)

    pose = frame()
    if not mix:
        return pose
    for limb in LIMBS:
        other = _rand((n, 1, 1), rng, frames.device) < 0.3
        joints = constant(limb, frames.device)                        # (2 to 5,)
        pose[:, joints] = torch.where(other, frame()[:, joints], pose[:, joints])
    noise = 0.05 * _randn((n, 24, 3), rng, frames.device)              # radians, about 3 degrees
    return pose + noise


# --------------------------------------------------------------------------------------------
# 2. The renderer: orthographic z-buffer in plain torch
#
# Every triangle looks only at the pixels of its own bounding box.  All (triangle, pixel) pairs of
# all bodies are listed in one go; each pair whose pixel centre is inside its triangle bids for the
# pixel with an integer whose high bits are the depth and whose low bits are the triangle's number,
# and one scatter-min finds every pixel's winner.
#
# Lists whose length depends on the data make the program wait for a GPU, here in four places a
# batch (nonzero, repeat_interleave).  Nothing else in a training step does, until a log line.

DEPTH_RANGE = 8.0           # metres in front of and behind the body's origin


def rasterize(points: Tensor, faces: Tensor, size: int) -> Tensor:
    """Which triangle does each pixel see?  -> (B, size, size) int64, -1 where none.

    points (B, V, 3): x, y in [-1, 1] of the picture, z = depth in metres; faces (F, 3), counter-
    clockwise from outside.  Back faces are dropped: bodies are closed.
    """
    B, n_faces = len(points), len(faces)
    # The batch goes innermost: gathering a face's corners then copies whole rows of B numbers.
    xyz = torch.cat([(points[..., :2] + 1) * (size / 2), points[..., 2:]], -1)    # pixels, metres
    xyz = xyz.permute(1, 2, 0).contiguous()                           # (V, 3, B)
    corners = xyz[:, :2].index_select(0, faces.flatten()).view(n_faces, 3, 2, B)
    # First and last pixel whose centre lies in the bounding box, within the picture.
    first = (corners.amin(1) - 0.5).ceil().clamp(min=0)               # (F, 2, B)
    last = (corners.amax(1) - 0.5).floor().clamp(max=size - 1)        # (F, 2, B)
    # Twice the signed area; negative = counter-clockwise seen along +z with y down = facing us.
    (ux, uy), (vx, vy) = [(corners[:, k] - corners[:, 0]).unbind(1) for k in (1, 2)]
    area = ux * vy - vx * uy                                          # (F, B)
    box = last - first + 1                                            # (F, 2, B) pixels
    f, b = ((area < -1e-9) & (box[:, 0] > 0) & (box[:, 1] > 0)).nonzero(as_tuple=True)    # (M,)

    # What a triangle needs to judge a pixel at (dx, dy) from its box's first one (counting from
    # there keeps float32 exact enough): two barycentric coordinates as gx dx + gy dy + start.
    def pick(value):                                                  # (F, B) -> (M,)
        return value.flatten().index_select(0, f * B + b)
    area, x0, y0, w, h = map(pick, (area, *first.unbind(1), *box.unbind(1)))      # (M,) each
    corner = (faces[f] * (3 * B) + b[:, None]).T.flatten()            # (3M,) where its x is in xyz
    x, y, z = (xyz.flatten().index_select(0, corner + k * B).view(3, -1) for k in range(3))
    planes = []                                                       # 6 x (M,)
    for n, p in ((1, 2), (2, 0)):
        gx, gy = (y[n] - y[p]) / area, (x[p] - x[n]) / area           # (M,)
        planes += [gx, gy, gx * (x0 + 0.5 - x[n]) + gy * (y0 + 0.5 - y[n])]

    # All pairs: triangle t meets each of the w * h pixels of its box.
    count = (w * h).long()                                            # (M,)
    t = torch.repeat_interleave(count)                                # (Q,) 0 0 0 0 1 1 2 ..
    place = torch.arange(len(t), device=t.device) - (count.cumsum(0) - count)[t]      # (Q,)
    width = w.long()[t]                                               # (Q,)
    dy = place // width                                               # (Q,)
    dx = place - dy * width                                           # (Q,)
    gx0, gy0, start0, gx1, gy1, start1 = (plane.index_select(0, t) for plane in planes)
    w0 = gx0 * dx + gy0 * dy + start0                                 # (Q,) barycentric
    w1 = gx1 * dx + gy1 * dy + start1                                 # (Q,)
    # A hair's tolerance: neighbours may both claim a pixel on their edge, but no crack opens.
    inside = (torch.minimum(torch.minimum(w0, w1), 1 - w0 - w1) > -1e-5).nonzero()[:, 0]
    t, dx, dy, w0, w1 = (v.index_select(0, inside) for v in (t, dx, dy, w0, w1))

    depth = w0 * z[0][t] + w1 * z[1][t] + (1 - w0 - w1) * z[2][t]     # exact: orthographic
    face_bits = max(n_faces - 1, 1).bit_length()
    levels = 2 ** (40 - face_bits)                  # of depth: 0.06 micrometres for 2,454 triangles
    depth = ((depth.double() / DEPTH_RANGE + 1) / 2).clamp(0, 1) * (levels - 1)
    bid = (depth.long() << face_bits) | f[t]
    pixel = (b[t] * size + y0[t].long() + dy) * size + x0[t].long() + dx
    empty = 2 ** 62                                                   # above every bid
    buffer = torch.full((B * size * size,), empty, dtype=torch.int64, device=points.device)
    buffer.scatter_reduce_(0, pixel, bid, "amin")
    face = torch.where(buffer < empty, buffer & (2 ** face_bits - 1), -1)
    return face.view(B, size, size)


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Area-weighted unit normals at the vertices: (B, V, 3), (F, 3) -> (B, V, 3)."""
    xyz = vertices.permute(1, 2, 0).contiguous()                      # (V, 3, B) rows copy fast
    a, b, c = (xyz.index_select(0, faces[:, k]) for k in range(3))    # (F, 3, B)
    (ux, uy, uz), (vx, vy, vz) = (b - a).unbind(1), (c - a).unbind(1)             # (F, B) each
    normal = torch.cat([uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx], 1)      # (F, 3B)
    total = torch.zeros_like(xyz).flatten(1)                          # (V, 3B)
    for k in range(3):
        total.index_add_(0, faces[:, k], normal)
    total = total.view_as(xyz)                                        # (V, 3, B)
    length = total.square().sum(1, keepdim=True).clamp(min=1e-24).sqrt()          # (V, 1, B)
    return (total / length).permute(2, 0, 1)                          # (B, V, 3)


def render(vertices: Tensor, faces: Tensor, cam: Tensor, size: int, color: Tensor,
           background: Tensor, light: Tensor | None = None,
           pattern: Tensor | None = None) -> Tensor:
    """Draw bodies over backgrounds -> pictures (B, 3, size, size) in [0, 1].

    vertices (B, V, 3) camera frame, metres; cam (B, 3) exactly `project`'s; color (B, F, 3) or
    (F, 3); background (B, 3, size, size); light (B, 3) from the body to the light; pattern
    (B, V) optional brightness factor at the vertices.  Smooth shading: Lambert on interpolated
    normals.  Not differentiable.
    """
    B, V = vertices.shape[:2]
    points = torch.cat([project(vertices, cam), vertices[..., 2:]], -1)           # (B, V, 3)
    face = rasterize(points, faces, size)                             # (B, H, W)
    b, row, col = (face >= 0).nonzero(as_tuple=True)                  # (P,) each
    f = face[b, row, col]                                             # (P,)
    corner = (faces[f] + b[:, None] * V).flatten()                    # (3P,)

    def at_corners(values):                                           # (B, V, C) -> (P, 3, C)
        return values.flatten(0, 1).index_select(0, corner).view(len(f), 3, values.shape[2])
    # Barycentric coordinates of the pixel's centre: areas of the sub-triangles.
    center = torch.stack([col + 0.5, row + 0.5], -1)                  # (P, 2)
    x, y = (at_corners((points[..., :2] + 1) * (size / 2)) - center[:, None]).unbind(-1)  # (P, 3)
    # of corner k: its next and previous ones are k + 1 and k - 1, so roll by -1 and by 1
    w = x.roll(-1, 1) * y.roll(1, 1) - x.roll(1, 1) * y.roll(-1, 1)   # (P, 3)
    w = (w / w.sum(1, keepdim=True))[:, None]                         # (P, 1, 3)
    normal = F.normalize((w @ at_corners(vertex_normals(vertices, faces)))[:, 0], dim=-1)  # (P, 3)
    if light is None:                       # over the viewer's left shoulder; y is down
        light = vertices.new_tensor([[-0.4, -0.5, -0.77]]).expand(B, 3)
    shade = 0.35 + 0.65 * (normal * light[b]).sum(-1, keepdim=True).clamp(min=0)      # (P, 1)
    if pattern is not None:
        shade = shade * (w @ at_corners(pattern[..., None]))[:, 0]
    surface = color[f] if color.ndim == 2 else color[b, f]            # (P, 3)
    image = background.permute(0, 2, 3, 1).contiguous()               # (B, H, W, 3) channels last
    image = image.index_put((b, row, col), (surface * shade).clamp(0, 1))
    return image.permute(0, 3, 1, 2)                                  # (B, 3, H, W)


# --------------------------------------------------------------------------------------------
# 3. The world

class Batch(NamedTuple):
    """B labelled pictures.  Fields of what is not labelled hold zeros and their mask is 0."""
    image: Tensor             # (B, 3, size, size) RGB in [0, 1]
    keypoints2d: Tensor       # (B, 19, 2) in [-1, 1] of the crop
    visible: Tensor           # (B, 19) 1 = labelled (occluded and out-of-crop points keep 1)
    keypoints3d: Tensor       # (B, 19, 3) camera frame, metres
    rotmats: Tensor           # (B, 24, 3, 3) root in the camera frame
    betas: Tensor             # (B, 10)
    has_3d: Tensor            # (B,) 1 = keypoints3d is a label  (the paper's indicator "1")
    has_smpl: Tensor          # (B,) 1 = rotmats and betas are labels (H3.6M yes, 3DHP no)
    cam: Tensor               # (B, 3) the true camera; never a label, for the baseline and tests


# What the body wears: colours of the 24 joints' parts, then the torso's and the head's back.
# Sides differ, so that a picture of few pixels says which arm is which and which way it faces.
TORSO_BACK, HAIR, PARTS = 24, 25, 26
SUIT = {
    (0,): (0.25, 0.25, 0.30),                                                        # pelvis
    (3, 6, 9, 13, 14): (0.93, 0.93, 0.88), (TORSO_BACK,): (0.45, 0.3, 0.6),          # torso
    (1,): (0.85, 0.15, 0.15), (4,): (1.0, 0.55, 0.55), (7, 10): (0.5, 0.05, 0.2),    # left leg
    (2,): (0.10, 0.45, 0.15), (5,): (0.50, 0.90, 0.40), (8, 11): (0.05, 0.25, 0.2),  # right leg
    (16,): (1.0, 0.55, 0.0), (18,): (1.0, 0.9, 0.1),                                 # left arm
    (17,): (0.1, 0.2, 0.85), (19,): (0.2, 0.8, 0.95),                                # right arm
    (20, 22): (0.95, 0.4, 0.75), (21, 23): (0.45, 0.45, 1.0),                        # hands
    (12, 15): (0.90, 0.68, 0.55), (HAIR,): (0.22, 0.14, 0.08)}

# What covers each part in look "hard": 0 skin, 1 hair, 2 shirt, 3 trousers, 4 shoes, 5 the shirt's
# sleeves or skin, 6 the trousers' legs or skin.
CLOTHES = (3, 3, 3, 2, 6, 6, 2, 4, 4, 2, 4, 4, 0, 2, 2, 0, 2, 2, 5, 5, 0, 0, 0, 0, 2, 1)


def face_parts(smpl: SMPL) -> Tensor:
    """Which part (0..25) each triangle belongs to -> (F,) int64."""
    part = smpl.weights[smpl.faces].sum(1).argmax(1)                  # (F,) strongest joint
    corners = smpl.v_template[smpl.faces]                             # (F, 3, 3)
    normal = F.normalize(torch.linalg.cross(corners[:, 1] - corners[:, 0],
                                            corners[:, 2] - corners[:, 0], dim=-1), dim=-1)
    torso = (part[:, None] == part.new_tensor([3, 6, 9, 13, 14])).any(1)
    part = torch.where(torso & (normal[:, 2] < 0), TORSO_BACK, part)
    hair = (part == 15) & ((normal[:, 2] < 0) | (normal[:, 1] > 0.75))
    return torch.where(hair, HAIR, part)


class SyntheticPeople:
    """Endless pictures of people: `world.batch(step)` is a function of (seed, step, rank) alone.

    (And of the device: CPU and CUDA generators differ, and a GPU's atomic sums round differently
    from run to run.)  A fresh generator each step: resuming at step n, or drawing ahead, changes
    nothing.  rank: which of several training processes this is.

    labels "half": every other picture has 3D (Sec. 3.4: each batch is half 2D, half 3D) and a tenth
    of the 2D points is unlabelled; "2d": no picture has 3D; "all": nothing is left out.
    look "plain": a parti-coloured suit on a smooth background, quick to learn at few pixels;
    look "hard": random clothes and patterns, cluttered backgrounds, occluders, noise.
    """

    def __init__(self, smpl: SMPL, frames: Tensor, batch: int, size: int, look: str = "plain",
                 seed: int = 0, rank: int = 0, labels: str = "half", mix: bool = True,
                 device="cpu", rng_device=None):
        for value, known in ((look, ("plain", "hard")), (labels, ("half", "2d", "all"))):
            if value not in known:
                raise ValueError(f"expected one of {known}, got {value!r}")
        self.smpl, self.size, self.look, self.batch_size = smpl, size, look, batch
        self.frames, self.device, self.rng_device = frames.to(device), device, rng_device or device
        self.seed, self.rank, self.mix, self.labels = seed, rank, mix, labels
        self.parts = face_parts(smpl)                                 # (F,)
        suit = torch.zeros(PARTS, 3)
        for joints, color in SUIT.items():
            suit[list(joints)] = torch.tensor(color)
        self.suit = suit.to(device)

    def generator(self, step: int, stream: int = 0) -> torch.Generator:
        """Streams are independent: 0 = pictures, 1 = the discriminators' pool."""
        state = np.random.SeedSequence([self.seed, step, self.rank, stream]).generate_state(2)
        rng = torch.Generator(self.rng_device)
        return rng.manual_seed(int(state[0]) << 31 ^ int(state[1]))       # 63 bits

    def motion(self, n: int, step: int) -> tuple[Tensor, Tensor]:
        """Real samples for D: rotmats (n, 23, 3, 3) without root, betas (n, 10); no picture."""
        rng = self.generator(step, stream=1)
        pose = draw_poses(self.frames, n, rng, self.mix)              # (n, 24, 3)
        return batch_rodrigues(pose[:, 1:]), self._betas(n, rng)

    def _betas(self, n: int, rng: torch.Generator) -> Tensor:
        return _randn((n, 10), rng, self.device)          # the PCA's coefficients have variance 1

    @torch.no_grad()
    def batch(self, step: int) -> Batch:
        B, rng = self.batch_size, self.generator(step)
        rotmats = batch_rodrigues(draw_poses(self.frames, B, rng, self.mix))      # (B, 24, 3, 3)
        rotmats[:, 0] = self._headings(B, rng) @ rotmats[:, 0]
        betas = self._betas(B, rng)                                   # (B, 10)
        body = self.smpl(betas, rotmats)
        cam = self._cameras(body.keypoints, rng)                      # (B, 3)
        image = self._draw(body.vertices, cam, rng)                   # (B, 3, H, W)
        # occluded and out-of-crop points stay labelled, as in the official data
        visible = (_rand((B, 19), rng, self.device) < 0.9).float()
        has_3d = (torch.arange(B, device=self.device) % 2 == 0).float()
        if self.labels == "all":
            visible, has_3d = torch.ones_like(visible), torch.ones_like(has_3d)
        elif self.labels == "2d":
            has_3d = torch.zeros_like(has_3d)
        return Batch(image=image, visible=visible, cam=cam,
                     keypoints2d=project(body.keypoints, cam) * visible[..., None],
                     keypoints3d=body.keypoints * has_3d[:, None, None],
                     rotmats=rotmats * has_3d[:, None, None, None], betas=betas * has_3d[:, None],
                     has_3d=has_3d, has_smpl=has_3d)

    def _headings(self, B: int, rng: torch.Generator) -> Tensor:
        """World to camera (B, 3, 3): turn to any heading, tilt the camera a bit, y up -> down."""
        turn = torch.zeros(B, 3, device=self.device)
        turn[:, 1] = 2 * math.pi * _rand((B,), rng, self.device)
        # about x and z only: the heading is uniform already
        tilt = math.radians(5) * _randn((B, 3), rng, self.device) * constant((1, 0, 1), self.device)
        flip = batch_rodrigues(constant((math.pi, 0, 0), self.device))            # Rx(pi)
        return flip @ batch_rodrigues(tilt) @ batch_rodrigues(turn)

    def _cameras(self, keypoints: Tensor, rng: torch.Generator) -> Tensor:
        """The official crop and its jitter as a camera: keypoints (B, 19, 3) -> cam (B, 3).

        The diagonal of the keypoints' box is 150 of 224 pixels, its midpoint the crop's centre;
        then the centre moves by up to 20 pixels an axis and the scale by 0.8 to 1.23.
        """
        low, high = keypoints[..., :2].amin(1), keypoints[..., :2].amax(1)        # (B, 2)
        jitter = _rand((len(low), 3), rng, self.device)
        scale = 2 * 150 / 224 / (high - low).norm(dim=-1)             # (B,) crop units a metre
        shift = 2 * 20 / 224 * (2 * jitter[:, :2] - 1) / scale[:, None]           # (B, 2) metres
        scale = scale * (0.8 + 0.43 * jitter[:, 2])       # after the shift, as the official code
        return torch.cat([scale[:, None], shift - (low + high) / 2], 1)

    def _draw(self, vertices: Tensor, cam: Tensor, rng: torch.Generator) -> Tensor:
        B, size = len(vertices), self.size

        def rand(*shape):
            return _rand(shape, rng, self.device)
        # light from the camera's side, mostly from above (y is down)
        light = 0.6 * _randn((B, 3), rng, self.device) + constant((0, -0.5, -1), self.device)
        light = F.normalize(light, dim=-1)                            # (B, 3)
        pattern = None
        if self.look == "plain":
            table = (self.suit + 0.12 * (rand(B, PARTS, 3) - 0.5)).clamp(0, 1)    # (B, 26, 3)
            background = smooth_noise(0.25 + 0.5 * rand(B, 3, 3, 3), size)
        else:
            table = self._clothes(rand)
            background = smooth_noise(rand(B, 3, 3, 3), size)
            background = background + 0.5 * (smooth_noise(rand(B, 3, 12, 12), size) - 0.5)
            background = paste_rectangles(background, rand(B, 6, 8))
            wave = (6 + 40 * rand(B, 1)) * (self.smpl.v_template @ F.normalize(
                _randn((B, 3, 1), rng, self.device), dim=1))[..., 0]  # (B, V)
            pattern = 1 + 0.35 * rand(B, 1) * wave.sin()
        image = render(vertices, self.smpl.faces, cam, size, table[:, self.parts],
                       background.clamp(0, 1), light, pattern)
        if self.look == "hard":
            image = paste_rectangles(image, rand(B, 2, 8), biggest=0.35, chance=0.35)
            image = image * (0.6 + 0.8 * rand(B, 3, 1, 1))            # exposure and white balance
            image = image + 0.03 * _randn(tuple(image.shape), rng, self.device)
        return image.clamp(0, 1)

    def _clothes(self, rand) -> Tensor:
        """Colours of the 26 parts (B, 26, 3): skin, hair, shirt, trousers, shoes; sleeves vary."""
        B = self.batch_size
        skin = (0.25 + 0.75 * rand(B, 1)) * constant((1.0, 0.78, 0.66), self.device)      # (B, 3)
        hair, shirt, trousers, shoes = (rand(B, 3) ** p for p in (3.0, 1.0, 1.0, 2.0))
        long_sleeves, long_trousers = rand(2, B, 1) < 0.5             # (B, 1) each
        forearms = torch.where(long_sleeves, shirt, skin)             # (B, 3)
        calves = torch.where(long_trousers, trousers, skin)           # (B, 3)
        worn = torch.stack([skin, hair, shirt, trousers, shoes, forearms, calves], 1)   # (B, 7, 3)
        return worn.index_select(1, constant(CLOTHES, self.device))            # (B, 26, 3)


def smooth_noise(grid: Tensor, size: int) -> Tensor:
    """A coarse random grid (B, 3, g, g) blown up to (B, 3, size, size)."""
    return F.interpolate(grid, (size, size), mode="bilinear", align_corners=True)


def paste_rectangles(image: Tensor, draws: Tensor, biggest: float = 0.6,
                     chance: float = 0.7) -> Tensor:
    """Flat rectangles over a picture: image (B, 3, H, W), uniform draws (B, n, 8) -> image."""
    size = image.shape[-1]
    p = (torch.arange(size, device=image.device) + 0.5) / size        # (W,)
    for cx, cy, w, h, r, g, b, there in draws.permute(1, 2, 0):       # (B,) each
        present = there < chance
        in_x = (p - cx[:, None]).abs() < biggest * w[:, None] / 2     # (B, W)
        in_y = (p - cy[:, None]).abs() < biggest * h[:, None] / 2     # (B, H)
        mask = (in_y[:, :, None] & in_x[:, None] & present[:, None, None])[:, None]
        image = torch.where(mask, torch.stack([r, g, b], 1)[..., None, None], image)
    return image


# --------------------------------------------------------------------------------------------
# 4. Real pictures: the crop, its jitter, and the flip (Sec. 3.4; official data_loader).  For your
#    own photographs: rendered people are born cropped, and mirrored in `draw_poses`.

def person_scale(keypoints: Tensor, visible: Tensor) -> float:
    """How many pixels of a 224 crop a picture's pixel becomes, by the official converters' rule.

    Where an ankle is visible, the diagonal of the visible points' box becomes 150 pixels; where
    none is (the person is cut off), the mean shoulder-to-hip distance 75; without that the box 50.
    (COCO's converter; MPII's also measures from the head's top, and leaves the last case out.)
    """
    ankles, torsos = (0, 5), ((8, 2), (9, 3))                         # (shoulder, hip), both sides
    torso = [float((keypoints[s] - keypoints[h]).norm()) for s, h in torsos
             if visible[s] > 0 and visible[h] > 0]
    cut_off = not any(visible[a] > 0 for a in ankles)
    if torso and cut_off:
        length, wanted = sum(torso) / len(torso), 75
    else:
        seen = keypoints[visible > 0]
        length, wanted = float((seen.amax(0) - seen.amin(0)).norm()), 50 if cut_off else 150
    if length < 5:
        raise ValueError(f"cropping needs a person of at least 5 pixels, got {length:.1f}")
    return wanted / length


def crop_person(image: Tensor, keypoints: Tensor, visible: Tensor, size: int = 224,
                shift: tuple[float, float] = (0, 0), zoom: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cut a person out as HMR does -> crop (3, size, size), keypoints2d (19, 2) in [-1, 1].

    image (3, H, W) in [0, 1]; keypoints (19, 2) pixels where pixel i covers [i, i + 1): add 0.5 to
    annotations that count whole pixels; visible (19,).  The visible points' box is centred and
    scaled by `person_scale`; `shift` (pixels of a 224 crop; official training: within 20) moves
    the window before `zoom` (0.8 to 1.23) scales it.  Beyond the picture its edge is repeated, as
    in the official code (SPIN pads with zeros).  Unlabelled points are set to 0.
    """
    seen = keypoints[visible > 0]                                     # (n, 2)
    if len(seen) < 2:
        raise ValueError(f"cropping needs at least 2 visible keypoints, got {len(seen)}")
    scale = person_scale(keypoints, visible)
    center = (seen.amin(0) + seen.amax(0)) / 2 + keypoints.new_tensor(shift) / scale      # (2,)
    side = 224 / (scale * zoom)                        # of the window, in the picture's pixels
    H, W = image.shape[1:]
    if side > size:                                    # shrinking: low-pass first, or it aliases
        shrunk = [max(1, round(length * size / side)) for length in (H, W)]
        image = vision.resize(image, shrunk, antialias=True)          # (3, h, w)
    # Crop coordinates in [-1, 1] -> the picture's, in [-1, 1] as well, so the shrinking drops out.
    extent = keypoints.new_tensor([W, H])                             # (2,)
    window = torch.cat([torch.diag(side / extent), (2 * center / extent - 1)[:, None]], 1)  # (2, 3)
    grid = F.affine_grid(window[None], [1, 3, size, size], align_corners=False)
    crop = F.grid_sample(image[None], grid, "bilinear", padding_mode="border",
                         align_corners=False)[0]                      # (3, size, size)
    return crop, 2 * (keypoints - center) / side * (visible > 0)[:, None]


def flip_batch(batch: Batch) -> Batch:
    """Mirror pictures and ALL their labels.  x -> -x, and left things become right things."""
    M = batch.image.new_tensor([-1, 1, 1])
    return batch._replace(
        image=batch.image.flip(-1),
        keypoints2d=batch.keypoints2d[:, FLIP_KEYPOINTS] * M[:2],
        visible=batch.visible[:, FLIP_KEYPOINTS],
        keypoints3d=batch.keypoints3d[:, FLIP_KEYPOINTS] * M,
        rotmats=batch.rotmats[:, FLIP_JOINTS] * M[:, None] * M,       # M R M, root included
        cam=batch.cam * batch.cam.new_tensor([1, -1, 1]))


# ============================================================================================
# Not needed to understand HMR: pictures for people to look at.

SKIN = (0.62, 0.71, 0.87)


def save_png(path: str | Path, image: Tensor) -> None:
    """image (3, H, W) in [0, 1] -> PNG file, written atomically."""
    file = io.BytesIO()
    torchvision.utils.save_image(image, file, format="png")
    write_atomically(path, file.getvalue())


def draw_points(image: Tensor, keypoints2d: Tensor, color=(1.0, 0.2, 0.2), radius: float = 2,
                visible: Tensor | None = None, filled: bool = True) -> Tensor:
    """Discs, or circles if not filled, at keypoints2d (K, 2) in [-1, 1] on image (3, H, W)."""
    size = image.shape[-1]
    p = torch.arange(size, device=image.device) + 0.5
    for i, (x, y) in enumerate(((keypoints2d + 1) * size / 2).tolist()):
        if visible is None or visible[i] > 0:
            distance = ((p[None] - x) ** 2 + (p[:, None] - y) ** 2).sqrt()        # (H, W)
            mask = distance <= radius if filled else (distance - radius).abs() <= 0.8
            image = torch.where(mask, image.new_tensor(color)[:, None, None], image)
    return image


def draw_mesh(vertices: Tensor, faces: Tensor, cam: Tensor, size: int,
              background: Tensor | None = None) -> Tensor:
    """A body in one colour, anti-aliased by 2 x 2 samples a pixel -> (B, 3, size, size)."""
    B = len(vertices)
    if background is None:
        background = torch.ones(B, 3, size, size, device=vertices.device)
    big = F.interpolate(background, (2 * size, 2 * size), mode="bilinear", align_corners=False)
    color = vertices.new_tensor(SKIN).expand(len(faces), 3)
    return F.avg_pool2d(render(vertices, faces, cam, 2 * size, color, big), 2)


def side_view(vertices: Tensor) -> Tensor:
    """Turn bodies (B, V, 3) by 90 degrees about the vertical through their middle."""
    middle = (vertices.amin(1, keepdim=True) + vertices.amax(1, keepdim=True)) / 2
    x, y, z = (vertices - middle).unbind(-1)
    return torch.stack([-z, y, x], -1) + middle


def look_at(image: Tensor, vertices: Tensor, faces: Tensor, cam: Tensor,
            size: int = 224) -> Tensor:
    """input | overlay | turned 90 degrees, one row a body -> (3, B * size, 3 * size)."""
    image = F.interpolate(image.float(), (size, size), mode="bilinear", align_corners=False)
    overlay = draw_mesh(vertices, faces, cam, size, image)
    turned = draw_mesh(side_view(vertices), faces, cam, size)
    return torch.cat([torch.cat(list(part), 1) for part in (image, overlay, turned)], 2)


def compare(path: str | Path, image: Tensor, sharp: Tensor, keypoints2d: Tensor, columns: dict,
            faces: Tensor) -> None:
    """PNG: the input | each column's bodies as overlay and turned 90 degrees; one row a picture.

    image (B, 3, h, h) what the network saw; sharp (B, 3, size, size) the same people, to draw
    over; keypoints2d (B, P, 2) the truth: unfilled circles, predictions filled (as in Fig. 5);
    columns: title -> (vertices (B, V, 3), cam (B, 3), keypoints2d (B, P, 2)).
    """
    size, black, white = sharp.shape[-1], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    parts = [F.interpolate(image, (size, size), mode="nearest")]      # (B, 3, size, size)
    for vertices, cam, predicted in columns.values():
        overlay = draw_mesh(vertices, faces, cam, size, sharp)
        for i, (true, pred) in enumerate(zip(keypoints2d, predicted)):
            picture = draw_points(overlay[i], true, black, 5.5, filled=False)
            picture = draw_points(picture, true, white, 4.5, filled=False)
            overlay[i] = draw_points(draw_points(picture, pred, black, 3), pred, radius=2.2)
        parts += [overlay, draw_mesh(side_view(vertices), faces, cam, size)]
    head = Image.new("RGB", (len(parts) * size, 32), "white")
    for i, title in enumerate(["input", *columns]):                   # a column is two parts wide
        ImageDraw.Draw(head).text((max(2 * i, 0.5) * size, 16), title, "black",
                                  ImageFont.load_default(20), anchor="mm")
    rows = [vision.pil_to_tensor(head) / 255, *torch.cat(parts, 3).cpu()]
    save_png(path, torch.cat(rows, 1))


def draw_chart(title: str, x_label: str, lines: list, size: tuple[int, int] = (640, 420)) -> Tensor:
    """lines: (label, colour, thickness, xs, ys) -> chart (3, H, W), axes from the data's extent."""
    W, H = (2 * side for side in size)                                # halved at the end
    left, right, top, bottom = 120, W - 30, 70, H - 100
    extent = []                                                       # of x, of y: low, high, step
    for values in ([x for line in lines for x in line[3]], [y for line in lines for y in line[4]]):
        span = max(max(values) - min(values), 1e-9)
        ten = 10 ** math.floor(math.log10(span / 4))
        step = ten * next(k for k in (1, 2, 5, 10) if ten * k * 6 >= span)
        extent.append((min(values), min(values) + span, step))

    def at(x, y):
        (x0, x1, _), (y0, y1, _) = extent
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))
    sheet = Image.new("RGB", (W, H), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(26)
    for axis, (low, high, step) in enumerate(extent):
        for k in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1):
            x, y = at(k * step, extent[1][0]) if axis == 0 else at(extent[0][0], k * step)
            draw.line((x, top, x, bottom) if axis == 0 else (left, y, right, y), "#dddddd", 2)
            draw.text((x, y + 26) if axis == 0 else (x - 12, y), f"{k * step:.4g}", "black", font,
                      anchor="mm" if axis == 0 else "rm")
    draw.rectangle((left, top, right, bottom), outline="black", width=2)
    draw.text((W / 2, 34), title, "black", ImageFont.load_default(30), anchor="mm")
    draw.text((W / 2, H - 28), x_label, "black", font, anchor="mm")
    for i, (label, colour, thickness, xs, ys) in enumerate(lines):
        draw.line([at(x, y) for x, y in zip(xs, ys)], colour, 2 * thickness, joint="curve")
        y = top + 30 + 36 * i
        draw.line((right - 250, y, right - 190, y), colour, 2 * thickness)
        draw.text((right - 175, y), label, "black", font, anchor="lm")
    return F.avg_pool2d(vision.pil_to_tensor(sheet)[None] / 255, 2)[0]


def render_row(vertices: Tensor, faces: Tensor, size: int = 320, joints: Tensor | None = None,
               center: Tensor | None = None, height: float | None = None) -> Tensor:
    """Bodies (B, V, 3) in SMPL's y-up frame, side by side on white -> (3, size, B * size).

    joints (B, 24, 3): drawn in, as if the skin were glass.  It shows `height` metres (if None,
    what the largest body needs) around `center` (B, 3) (if None, the body's middle).
    """
    low, high = vertices.amin(1), vertices.amax(1)                    # (B, 3)
    center = (low + high) / 2 if center is None else center
    scale = 2 / (height or float((high - low)[:, :2].amax()) / 0.9)
    to_camera = vertices.new_tensor([1, -1, -1])                      # Rx(pi)
    shift = -center[:, :2] * to_camera[:2]                            # (B, 2)
    cam = torch.cat([torch.full_like(shift[:, :1], scale), shift], 1)             # (B, 3)
    drawn = draw_mesh(vertices * to_camera, faces, cam, size)         # (B, 3, size, size)
    if joints is not None:
        points = project(joints * to_camera, cam)                     # (B, 24, 2)
        drawn = [draw_points(image, p, radius=size / 90) for image, p in zip(drawn, points)]
    return torch.cat(list(drawn), 2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a contact sheet of labelled samples.")
    parser.add_argument("--out", default="out", help="folder for data.png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: expected 0 or more")
    return exit_status("data.py", lambda: _contact_sheet(Path(args.out) / "data.png", args.seed))


def _contact_sheet(path: Path, seed: int) -> None:
    smpl, rows = SMPL(), []
    for look, upright, size in (("plain", True, 64), ("hard", False, 224)):
        frames = load_mocap(upright, held_out=False)
        batch = SyntheticPeople(smpl, frames, 16, size, look, seed).batch(0)
        print(f"look {look!r:8s} {size} px: image {tuple(batch.image.shape)}, "
              f"{batch.visible.mean():.0%} of keypoints labelled, "
              f"{batch.has_3d.mean():.0%} of pictures with 3D, {len(frames)} mocap frames")
        image = F.interpolate(batch.image, (224, 224), mode="nearest")
        drawn = [draw_points(i, k, visible=v) if n % 2 else i for n, (i, k, v) in
                 enumerate(zip(image, batch.keypoints2d, batch.visible))]
        rows += [torch.cat(drawn[:8], 2), torch.cat(drawn[8:], 2)]
    save_png(path, torch.cat(rows, 1))
    print(f"wrote {path}: --small's world above, the full world below")


if __name__ == "__main__":
    sys.exit(main())
