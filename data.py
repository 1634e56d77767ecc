"""Pictures of people with labels: recorded poses, an endless synthetic world, a small renderer.

Chapter 3 of 4 (smpl.py <- hmr.py <- data.py <- train.py).  HMR trains on photographs with 2D
keypoints, on some photographs with 3D labels, and on motion capture that belongs to no picture
(Sec. 3.2 and 4).  All of those data are licensed.  Here people are drawn instead: recorded motion
poses an open body, a small renderer makes the picture, and every label is known exactly.  Half of
the pictures then lose their 3D labels, as in the paper.

Axes:  B pictures   M recorded frames   V vertices   F triangles   H = W = size in pixels
       19 keypoints   24 joints   26 parts of the clothes
Axes of the renderer alone:  S triangles that face the camera   Q pairs of a triangle and a pixel
       I pairs whose pixel lies inside the triangle   P pixels that see a body
Camera frame: x right, y DOWN, z away from the camera, in metres.  2D in [-1, 1] of the square crop,
pixel = (x + 1) * size / 2.  Pixel i covers [i, i + 1) and is sampled at i + 0.5, so that mirroring
a picture is exactly x -> -x.

On a GPU, two things make the program wait until the GPU has finished all earlier work: a Python
list as an index, and a result whose length depends on the data.  So the world copies its constants
to the device once, in __init__, and only the renderer waits, in four places (nonzero and
repeat_interleave).  It waits less often if the pictures of several steps are drawn in one go.

    python data.py           # out/data.png: pictures of --small and of the full recipe's world
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
import torchvision.utils
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize

from hmr import project
from smpl import FLIP_JOINTS, SMPL, batch_rodrigues, exit_status, write_atomically

# --------------------------------------------------------------------------------------------
# 1. Poses: recorded motion (Sec. 3.3: the adversarial prior's real samples)

MOCAP = Path(__file__).resolve().parent / "assets" / "mocap.npz"
# The nine clips of --small.  Nobody in them leans over 45 degrees, except in 15 frames of kick.
UPRIGHT = ("walk", "run", "dance_a", "punch", "spin", "spinkick", "jump", "dance_b", "kick")
HELD_OUT = ("dance_b", "kick", "roll")              # never trained on
SPIN_AIRBORNE = slice(29, 69)       # frames of the clip spin that lean 45 to 95 degrees
# Joints that are exchanged between frames together: arms (collar to hand), legs, spine, head.
LIMBS = ((13, 16, 18, 20, 22), (14, 17, 19, 21, 23), (1, 4, 7, 10), (2, 5, 8, 11), (3, 6, 9),
         (12, 15))


def load_clips(upright: bool, held_out: bool, validate: str = "") -> dict[str, Tensor]:
    """The clips to train on, or the clips to measure on: name -> (M, 24, 3) axis-angle, y-up frame.

    upright: only the nine mostly upright clips.  held_out: the clips to measure on.  validate: a
    training clip that is left out, so that settings can be chosen on it.  Then this clip alone is
    returned to measure on, not the held-out clips, which are for the final measurement.
    Raises ValueError if validate is no training clip.
    """
    with np.load(MOCAP, allow_pickle=False) as file:
        names = UPRIGHT if upright else sorted(file.files)
        clips = {name: file[name].astype(np.float32) for name in names}           # (M, 72)
    if upright:
        clips["spin"] = np.delete(clips["spin"], SPIN_AIRBORNE, axis=0)           # (n, 72)
    training = [name for name in names if name not in HELD_OUT]
    if validate and validate not in training:
        raise ValueError(f"--validate {validate}: expected one of {', '.join(training)}")
    measured = [validate] if validate else [name for name in names if name in HELD_OUT]
    chosen = measured if held_out else [name for name in training if name != validate]
    return {name: torch.from_numpy(clips[name]).view(-1, 24, 3) for name in chosen}


def load_mocap(upright: bool, held_out: bool, validate: str = "") -> Tensor:
    """All frames of `load_clips` -> (M, 24, 3)."""
    return torch.cat(list(load_clips(upright, held_out, validate).values()))      # (M, 24, 3)


def mirror_pose(pose: Tensor) -> Tensor:
    """The pose seen in a mirror: (..., 24, 3) -> same.

    Left and right joints swap places, and X R(r) X = R(r * (1, -1, -1)) with X = diag(-1, 1, 1).
    The root's rotation is mirrored, too.  (The official docstring says that it is unchanged, but
    the official signs flip it.)
    """
    return pose[..., FLIP_JOINTS, :] * pose.new_tensor([1, -1, -1])   # (..., 24, 3)


# --------------------------------------------------------------------------------------------
# 2. The world

class Batch(NamedTuple):
    """B labelled pictures.  A missing label is 0 here (the losses accept NaN, too), its mask is 0.

    A picture without 3D labels still has keypoints2d.  It takes part in L_reproj and L_adv, and its
    masks keep it out of L_joints and L_smpl.  has_3d is the paper's indicator "1".  It is kept for
    each keypoint, since SPIN's files of H3.6M and 3DHP leave LSP's head top empty.  has_smpl is a
    mask of its own.  Drawn people have all 3D labels or none, but 3DHP has joints without SMPL
    parameters: such a picture takes part in L_joints and not in L_smpl.
    """
    image: Tensor             # (B, 3, size, size) RGB in [0, 1]
    keypoints2d: Tensor       # (B, 19, 2) in [-1, 1] of the crop
    visible: Tensor           # (B, 19) 1 = labelled (occluded and out-of-crop points keep 1)
    keypoints3d: Tensor       # (B, 19, 3) camera frame, metres
    rotmats: Tensor           # (B, 24, 3, 3) root in the camera frame
    betas: Tensor             # (B, 10)
    has_3d: Tensor            # (B, 19) 1 = keypoints3d is a label
    has_smpl: Tensor          # (B,) 1 = rotmats and betas are labels
    cam: Tensor               # (B, 3) the true camera, which no loss reads


# The suit that people wear in look "plain": a colour for each of the 24 joints' parts, for the
# torso's back and for the back of the head.  Left and right, front and back differ, so that a
# picture of few pixels says which arm is which and which way the person faces.
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

# What covers each of the 26 parts in look "hard":
# 0 skin, 1 hair, 2 shirt, 3 trousers, 4 shoes, 5 sleeve of the forearm, 6 trousers' lower leg.
CLOTHES = (3, 3, 3, 2, 6, 6, 2, 4, 4, 2, 4, 4, 0, 2, 2, 0, 2, 2, 5, 5, 0, 0, 0, 0, 2, 1)


def face_parts(smpl: SMPL) -> Tensor:
    """Which part (0..25) each triangle belongs to -> (F,) int64."""
    part = smpl.weights[smpl.faces].sum(1).argmax(1)                  # (F,) the strongest joint
    corners = smpl.v_template[smpl.faces]                             # (F, 3, 3)
    sides = corners[:, 1:] - corners[:, :1]                           # (F, 2, 3)
    normal = normalize(torch.linalg.cross(*sides.unbind(1), dim=-1), dim=-1)      # (F, 3)
    torso = (part[:, None] == part.new_tensor([3, 6, 9, 13, 14])).any(1)          # (F,)
    part = torch.where(torso & (normal[:, 2] < 0), TORSO_BACK, part)
    hair = (part == 15) & ((normal[:, 2] < 0) | (normal[:, 1] > 0.75))
    return torch.where(hair, HAIR, part)


# Sizes of a person in the crop.  The four numbers are the diagonal of the keypoints' box and the
# jitter of its centre, both in pixels of a 224 crop, then the least and the greatest zoom.  The
# official crop leaves wide margins.  "tight" is our choice, for pictures of few pixels.
CROPS = {"official": (150, 20, 0.8, 1.23), "tight": (212, 4, 0.95, 1.05)}


def seed_of(*numbers: int) -> int:
    """One seed made of several numbers, so that equal numbers give equal random draws.

    numpy mixes the numbers into two words of 32 bits.  The shift by 31 keeps 63 bits of them, so
    that the seed is a positive int64.  (A CPU's generator uses its lower 32 bits.)
    """
    high, low = np.random.SeedSequence(numbers).generate_state(2)
    return int(high) << 31 ^ int(low)


class SyntheticPeople:
    """Endless pictures of people.  With the same settings, `world.batch(step)` is a function of
    (seed, step, rank) alone, so that resuming at step n changes nothing.

    The pictures of `ahead` steps, a block, are drawn in one go, and each step gets its part.  Each
    block has a random generator of its own.  `ahead` is 1 on a CPU and 8 on a GPU, where 224 px and
    a batch of 64 took less than 4 GiB.  (The generators of a CPU and of a GPU differ.)

    smpl: the body, on the device to draw on.  frames (M, 24, 3): what people do.  batch: pictures
    a step.  size: pixels.  rank: number of this process.  mix: recombine frames limb by limb.
    labels "half": every other picture has 3D labels (Sec. 3.4: each batch is half 2D, half 3D) and
    a tenth of the 2D points is unlabelled; "2d": no picture has 3D labels; "all": nothing is left
    out.  look "plain": a parti-coloured suit on a smooth background, quick to learn at few pixels;
    "hard": random clothes and patterns, cluttered backgrounds, occluders, noise.  crop: of CROPS.
    Raises ValueError for another look, labels or crop.
    """
    name = "drawn people"     # what a world is made of; a checkpoint keeps it

    def __init__(self, smpl: SMPL, frames: Tensor, batch: int, size: int, look: str = "plain",
                 seed: int = 0, rank: int = 0, labels: str = "half", mix: bool = True,
                 crop: str = "official", ahead: int | None = None):
        for value, known in ((look, ("plain", "hard")), (labels, ("half", "2d", "all")),
                             (crop, tuple(CROPS))):
            if value not in known:
                raise ValueError(f"expected one of {known}, got {value!r}")
        self.smpl, self.size, self.look, self.batch_size = smpl, size, look, batch
        self.seed, self.rank, self.mix, self.labels, self.crop = seed, rank, mix, labels, crop
        self.device = smpl.v_template.device
        self.ahead = ahead or (8 if self.device.type == "cuda" else 1)
        self.pictures, self.movements = (None, None), (None, None)    # key and content, drawn last
        self.frames = torch.cat([frames, mirror_pose(frames)]).to(self.device)    # (2M, 24, 3)
        suit = torch.zeros(PARTS, 3)                                  # (26, 3)
        for joints, color in SUIT.items():
            suit[list(joints)] = torch.tensor(color)
        limbs = torch.tensor([[j in limb for j in range(24)] for limb in LIMBS])  # (6, 24)
        self.limbs = limbs[..., None].to(self.device)                 # (6, 24, 1)
        self.suit = suit.to(self.device)                              # (26, 3)
        self.parts = face_parts(smpl)                                 # (F,)
        constant = functools.partial(torch.tensor, device=self.device)
        self.clothes, self.skin = constant(CLOTHES), constant((1.0, 0.78, 0.66))  # (26,), (3,)
        self.light, self.no_turn = constant((0, -0.5, -1)), constant((1, 0, 1))   # (3,), (3,)
        self.flip = batch_rodrigues(constant((math.pi, 0, 0)))        # (3, 3) Rx(pi): y up to down

    def generator(self, block: int, stream: int = 0) -> torch.Generator:
        """A block's random numbers; stream 0 is for pictures, 1 for the discriminators' motion."""
        rng = torch.Generator(self.device)
        return rng.manual_seed(seed_of(self.seed, block, self.rank, stream))

    def poses(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw n poses (n, 24, 3) from the recorded frames, recorded root included.

        A pose is a recorded frame, mirrored half the time.  With `mix`, each limb then comes from
        another frame with probability 0.6, and every joint gets a little noise.  The pictures AND
        the discriminators' real samples come from this one function.  If their distributions
        differed, D would learn to reject the labels that L_smpl pulls the encoder to.
        """
        def frame() -> Tensor:
            M = len(self.frames) // 2
            index = torch.randint(M, (n,), generator=rng, device=self.device)     # (n,)
            mirrored = torch.rand(n, generator=rng, device=self.device) < 0.5     # (n,)
            return self.frames.index_select(0, index + M * mirrored)  # (n, 24, 3)

        pose = frame()                                                # (n, 24, 3)
        if not self.mix:
            return pose
        for limb in self.limbs:                                       # (24, 1)
            other = torch.rand(n, 1, 1, generator=rng, device=self.device) < 0.6  # (n, 1, 1)
            pose = torch.where(other & limb, frame(), pose)           # (n, 24, 3)
        noise = torch.randn(n, 24, 3, generator=rng, device=self.device)          # (n, 24, 3)
        return pose + 0.05 * noise                                    # radians: about 3 degrees

    def betas(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, 10) from N(0, 1): SMPL scales its betas so that this is the population."""
        return torch.randn(n, 10, generator=rng, device=self.device)  # (n, 10)

    def motion(self, n: int, step: int) -> tuple[Tensor, Tensor]:
        """Real samples for D, without pictures: rotmats (n, 23, 3, 3), betas (n, 10); no root."""
        block, part = divmod(step, self.ahead)
        if self.movements[0] != (n, block):
            rng = self.generator(block, stream=1)
            poses = self.poses(n * self.ahead, rng)                   # (n * ahead, 24, 3)
            rotmats = batch_rodrigues(poses[:, 1:])
            self.movements = (n, block), (rotmats, self.betas(n * self.ahead, rng))
        rotmats, betas = (x[part * n:(part + 1) * n] for x in self.movements[1])
        return rotmats, betas                                         # (n, 23, 3, 3), (n, 10)

    def batch(self, step: int) -> Batch:
        """The step-th B pictures, labelled as `labels` says."""
        (block, part), B = divmod(step, self.ahead), self.batch_size
        if self.pictures[0] != block:
            self.pictures = block, self.draw(B * self.ahead, self.generator(block))
        return Batch(*(field[part * B:(part + 1) * B] for field in self.pictures[1]))

    @torch.no_grad()
    def draw(self, B: int, rng: torch.Generator) -> Batch:
        """B pictures and their labels: pose bodies, choose cameras, render, drop some labels."""
        rotmats = batch_rodrigues(self.poses(B, rng))                 # (B, 24, 3, 3)
        # The camera's rotation multiplies from the left: it turns the whole recorded person, who
        # leans or lies as recorded.
        rotmats[:, 0] = self._headings(B, rng) @ rotmats[:, 0]
        betas = self.betas(B, rng)                                    # (B, 10)
        body = self.smpl(betas, rotmats)
        cam = self._cameras(body.keypoints, rng)                      # (B, 3)
        image = self._draw(body.vertices, cam, rng)                   # (B, 3, H, W)
        # Occluded and out-of-crop points stay labelled, as in the official data.
        visible = (torch.rand(B, 19, generator=rng, device=self.device) < 0.9).float()  # (B, 19)
        # Every other picture of each step has 3D labels.  The first % handles odd batch sizes.
        has_smpl = (torch.arange(B, device=self.device) % self.batch_size % 2 == 0).float()   # (B,)
        if self.labels == "all":
            visible, has_smpl = torch.ones_like(visible), torch.ones_like(has_smpl)
        elif self.labels == "2d":
            has_smpl = torch.zeros_like(has_smpl)
        has_3d = has_smpl[:, None].expand(B, 19)                      # (B, 19)
        return Batch(image=image, visible=visible, cam=cam,
                     keypoints2d=project(body.keypoints, cam) * visible[..., None],
                     keypoints3d=body.keypoints * has_3d[..., None],
                     rotmats=rotmats * has_smpl[:, None, None, None],
                     betas=betas * has_smpl[:, None], has_3d=has_3d, has_smpl=has_smpl)

    def _headings(self, B: int, rng: torch.Generator) -> Tensor:
        """World to camera (B, 3, 3): turn to any heading, tilt by N(0, 5 degrees), flip y."""
        turn = torch.zeros(B, 3, device=self.device)                  # (B, 3)
        turn[:, 1] = 2 * math.pi * torch.rand(B, generator=rng, device=self.device)
        tilt = torch.randn(B, 3, generator=rng, device=self.device) * self.no_turn      # (B, 3)
        return (self.flip @ batch_rodrigues(math.radians(5) * tilt)
                @ batch_rodrigues(turn))                              # (B, 3, 3)

    def _cameras(self, keypoints: Tensor, rng: torch.Generator) -> Tensor:
        """The crop and its jitter, written as a camera: keypoints (B, 19, 3) -> cam (B, 3).

        The official rule for a whole person: the diagonal of the keypoints' box becomes 150 of 224
        pixels and its middle the crop's centre.  Then the centre moves by up to 20 pixels in x and
        in y, and after that the scale changes by a factor of 0.8 to 1.23.
        """
        diagonal, move, least, most = CROPS[self.crop]
        low, high = keypoints[..., :2].amin(1), keypoints[..., :2].amax(1)        # (B, 2) each
        jitter = torch.rand(len(low), 3, generator=rng, device=self.device)       # (B, 3)
        scale = 2 * diagonal / 224 / (high - low).norm(dim=-1)        # (B,) crop units a metre
        shift = 2 * move / 224 * (2 * jitter[:, :2] - 1) / scale[:, None]         # (B, 2) metres
        scale = scale * (least + (most - least) * jitter[:, 2])       # (B,)
        return torch.cat([scale[:, None], shift - (low + high) / 2], 1)           # (B, 3)

    def _draw(self, vertices: Tensor, cam: Tensor, rng: torch.Generator) -> Tensor:
        """Bodies (B, V, 3) in the camera's frame -> pictures (B, 3, H, W) in the world's look."""
        B, size = len(vertices), self.size
        rand, randn = (functools.partial(draw, generator=rng, device=self.device)
                       for draw in (torch.rand, torch.randn))
        blow_up = functools.partial(interpolate, size=size, mode="bilinear", align_corners=True)
        # The light comes from the camera's side, mostly from above.
        light = normalize(0.6 * randn(B, 3) + self.light, dim=-1)     # (B, 3)
        pattern = None
        if self.look == "plain":
            table = (self.suit + 0.12 * (rand(B, PARTS, 3) - 0.5)).clamp(0, 1)    # (B, 26, 3)
            background = blow_up(0.25 + 0.5 * rand(B, 3, 3, 3))       # (B, 3, H, W) smooth noise
        else:
            table = self._clothes(B, rand)                            # (B, 26, 3)
            background = (blow_up(rand(B, 3, 3, 3))
                          + 0.5 * (blow_up(rand(B, 3, 12, 12)) - 0.5))            # (B, 3, H, W)
            background = paste_rectangles(background, rand(B, 6, 8))
            # Stripes across the body: 6 to 46 radians a metre, so a wave of 14 to 105 cm.
            frequency = 6 + 40 * rand(B, 1)                           # (B, 1)
            direction = normalize(randn(B, 3, 1), dim=1)              # (B, 3, 1)
            wave = frequency * (self.smpl.v_template @ direction)[..., 0]         # (B, V)
            pattern = 1 + 0.35 * rand(B, 1) * wave.sin()              # (B, V)
        image = render(vertices, self.smpl.faces, cam, size, table[:, self.parts],
                       background.clamp(0, 1), light, pattern)
        if self.look == "hard":
            image = paste_rectangles(image, rand(B, 2, 8), biggest=0.35, chance=0.35)
            image = image * (0.6 + 0.8 * rand(B, 3, 1, 1))            # exposure and white balance
            image = image + 0.03 * randn(*image.shape)
        return image.clamp(0, 1)

    def _clothes(self, B: int, rand) -> Tensor:
        """Colours of the 26 parts (B, 26, 3).  Sleeves and trousers are long or short at random."""
        skin = (0.25 + 0.75 * rand(B, 1)) * self.skin                 # (B, 3)
        hair, shirt, trousers, shoes = (rand(B, 3) ** p for p in (3.0, 1.0, 1.0, 2.0))  # (B, 3)
        long_sleeves, long_trousers = rand(2, B, 1) < 0.5             # (B, 1) each
        forearms = torch.where(long_sleeves, shirt, skin)             # (B, 3)
        calves = torch.where(long_trousers, trousers, skin)           # (B, 3)
        worn = torch.stack([skin, hair, shirt, trousers, shoes, forearms, calves], 1)   # (B, 7, 3)
        return worn.index_select(1, self.clothes)                     # (B, 26, 3)


def paste_rectangles(image: Tensor, draws: Tensor, biggest=0.6, chance=0.7) -> Tensor:
    """Flat rectangles over a picture: image (B, 3, H, W), uniform draws (B, n, 8) -> image."""
    size = image.shape[-1]
    p = (torch.arange(size, device=image.device) + 0.5) / size        # (W,)
    for cx, cy, w, h, r, g, b, there in draws.permute(1, 2, 0):       # (B,) each
        present = there < chance
        in_x = (p - cx[:, None]).abs() < biggest * w[:, None] / 2     # (B, W)
        in_y = (p - cy[:, None]).abs() < biggest * h[:, None] / 2     # (B, H)
        mask = (in_y[:, :, None] & in_x[:, None] & present[:, None, None])[:, None]  # (B, 1, H, W)
        image = torch.where(mask, torch.stack([r, g, b], 1)[..., None, None], image)
    return image


# ============================================================================================
# Not needed to understand HMR: the renderer, an orthographic z-buffer in plain torch
#
# Every triangle looks only at the pixels of its own bounding box.  The pairs of a triangle and a
# pixel are listed for all bodies at once.  One triangle, f, whose box is 3 pixels wide and 2 high:
#
#       x0          place    0 1 2 3 4 5    its pairs, numbered within the box
#    y0 .  /\  .    dx       0 1 2 0 1 2    = place mod 3, columns from the box's first one, x0
#       /______\    dy       0 0 0 1 1 1    = place // 3, rows from the box's first one, y0
#                   inside   . x . x x x    the other pairs are dropped
#
# A pair makes a bid, one integer, with the depth in the high bits and f in the low bits.  Each
# pixel keeps the smallest bid made for it, so that one scatter-min does all depth tests.

DEPTH_RANGE = 8.0           # metres in front of and behind the body's origin


def rasterize(points: Tensor, faces: Tensor, size: int) -> Tensor:
    """Which triangle does each pixel see?  -> (B, size, size) int64, -1 where none.

    points (B, V, 3): x, y in [-1, 1] of the picture, z = depth in metres; faces (F, 3), counter-
    clockwise from outside.  Bodies are closed, so triangles that face away are dropped.
    """
    B, n_faces = len(points), len(faces)
    # B is the innermost axis, so that index_select copies B contiguous numbers.
    xyz = torch.cat([(points[..., :2] + 1) * (size / 2), points[..., 2:]], -1)    # pixels, metres
    xyz = xyz.permute(1, 2, 0).contiguous()                           # (V, 3, B)
    corners = xyz[:, :2].index_select(0, faces.flatten()).view(n_faces, 3, 2, B)  # (F, 3, 2, B)
    # The first and the last pixel whose centre lies in the bounding box and in the picture.
    first = (corners.amin(1) - 0.5).ceil().clamp(min=0)               # (F, 2, B)
    last = (corners.amax(1) - 0.5).floor().clamp(max=size - 1)        # (F, 2, B)
    # Twice the signed area.  It is negative if the corners run counter-clockwise as seen along +z
    # with y down, that is, if the triangle faces us.
    (ux, uy), (vx, vy) = [(corners[:, k] - corners[:, 0]).unbind(1) for k in (1, 2)]  # (F, B)
    area = ux * vy - vx * uy                                          # (F, B)
    box = last - first + 1                                            # (F, 2, B) pixels
    f, b = ((area < -1e-9) & (box[:, 0] > 0) & (box[:, 1] > 0)).nonzero(as_tuple=True)    # (S,)

    # What a triangle needs to judge a pixel at (dx, dy): two barycentric coordinates, each as
    # gx dx + gy dy + start.  Counting dx, dy from the box's first pixel keeps float32 exact enough.
    def pick(value):                                                  # (F, B) -> (S,)
        return value.flatten().index_select(0, f * B + b)
    area, x0, y0, w, h = map(pick, (area, *first.unbind(1), *box.unbind(1)))      # (S,) each
    corner = (faces[f] * (3 * B) + b[:, None]).T.flatten()            # (3S,) of x in xyz (V, 3, B)
    x, y, z = (xyz.flatten().index_select(0, corner + k * B).view(3, -1)
               for k in range(3))                                     # (3, S) each
    planes = []                                                       # 6 x (S,)
    for n, p in ((1, 2), (2, 0)):
        gx, gy = (y[n] - y[p]) / area, (x[p] - x[n]) / area           # (S,)
        planes += [gx, gy, gx * (x0 + 0.5 - x[n]) + gy * (y0 + 0.5 - y[n])]

    # All pairs: triangle t meets each of the w * h pixels of its box.
    count = (w * h).long()                                            # (S,)
    t = torch.repeat_interleave(count)                                # (Q,) 0 0 0 0 1 1 2 ..
    place = torch.arange(len(t), device=t.device) - (count.cumsum(0) - count)[t]      # (Q,)
    width = w.long()[t]                                               # (Q,)
    dy = place // width                                               # (Q,)
    dx = place - dy * width                                           # (Q,)
    gx0, gy0, start0, gx1, gy1, start1 = (plane.index_select(0, t) for plane in planes)
    w0 = gx0 * dx + gy0 * dy + start0                                 # (Q,) barycentric
    w1 = gx1 * dx + gy1 * dy + start1                                 # (Q,)
    # The tolerance lets two neighbours claim a pixel on their common edge, so that no crack opens.
    inside = (torch.minimum(torch.minimum(w0, w1), 1 - w0 - w1) > -1e-5).nonzero()[:, 0]  # (I,)
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
    return face.view(B, size, size)                                   # (B, size, size)


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

    vertices (B, V, 3) camera frame, metres; cam (B, 3) exactly as `project` takes it; color
    (B, F, 3) or (F, 3); background (B, 3, size, size); light (B, 3) from the body to the light;
    pattern (B, V) optional brightness factor at the vertices.  Smooth shading: Lambert on
    interpolated normals.  Not differentiable.
    """
    B, V = vertices.shape[:2]
    points = torch.cat([project(vertices, cam), vertices[..., 2:]], -1)           # (B, V, 3)
    face = rasterize(points, faces, size)                             # (B, H, W)
    b, row, col = (face >= 0).nonzero(as_tuple=True)                  # (P,) each
    f = face[b, row, col]                                             # (P,)
    corner = (faces[f] + b[:, None] * V).flatten()                    # (3P,)

    def at_corners(values):                                           # (B, V, C) -> (P, 3, C)
        return values.flatten(0, 1).index_select(0, corner).view(len(f), 3, values.shape[2])
    # Barycentric coordinates of the pixel's centre are the areas of three sub-triangles.
    center = torch.stack([col + 0.5, row + 0.5], -1)                  # (P, 2)
    x, y = (at_corners((points[..., :2] + 1) * (size / 2)) - center[:, None]).unbind(-1)  # (P, 3)
    # The neighbours of corner k are k + 1 and k - 1, so roll by -1 and by 1.
    w = x.roll(-1, 1) * y.roll(1, 1) - x.roll(1, 1) * y.roll(-1, 1)   # (P, 3)
    w = (w / w.sum(1, keepdim=True))[:, None]                         # (P, 1, 3)
    normal = (w @ at_corners(vertex_normals(vertices, faces)))[:, 0]  # (P, 3)
    normal = normalize(normal, dim=-1)                                # (P, 3)
    if light is None:                       # over the viewer's left shoulder; y is down
        light = vertices.new_tensor([[-0.4, -0.5, -0.77]]).expand(B, 3)           # (B, 3)
    shade = 0.35 + 0.65 * (normal * light[b]).sum(-1, keepdim=True).clamp(min=0)      # (P, 1)
    if pattern is not None:
        shade = shade * (w @ at_corners(pattern[..., None]))[:, 0]
    surface = color[f] if color.ndim == 2 else color[b, f]            # (P, 3)
    image = background.permute(0, 2, 3, 1).contiguous()               # (B, H, W, 3) channels last
    image = image.index_put((b, row, col), (surface * shade).clamp(0, 1))
    return image.permute(0, 3, 1, 2)                                  # (B, 3, H, W)


# --------------------------------------------------------------------------------------------
# Pictures for people to look at

SKIN = (0.62, 0.71, 0.87)


def save_png(path: str | Path, image: Tensor) -> None:
    """image (3, H, W) in [0, 1] -> PNG file, written atomically."""
    file = io.BytesIO()
    torchvision.utils.save_image(image, file, format="png")
    write_atomically(path, file.getvalue())


def draw_mesh(vertices: Tensor, faces: Tensor, cam: Tensor, size: int,
              background: Tensor | None = None) -> Tensor:
    """A body in one colour, anti-aliased by 2 x 2 samples a pixel -> (B, 3, size, size)."""
    B = len(vertices)
    if background is None:
        background = torch.ones(B, 3, size, size, device=vertices.device)         # (B, 3, H, W)
    big = interpolate(background, (2 * size, 2 * size), mode="bilinear")          # (B, 3, 2H, 2W)
    color = vertices.new_tensor(SKIN).expand(len(faces), 3)           # (F, 3)
    return avg_pool2d(render(vertices, faces, cam, 2 * size, color, big), 2)      # (B, 3, H, W)


def side_view(vertices: Tensor) -> Tensor:
    """Turn bodies (B, V, 3) by 90 degrees about the vertical through their middle."""
    middle = (vertices.amin(1, keepdim=True) + vertices.amax(1, keepdim=True)) / 2  # (B, 1, 3)
    x, y, z = (vertices - middle).unbind(-1)                          # (B, V) each
    return torch.stack([-z, y, x], -1) + middle                       # (B, V, 3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw labelled samples of both worlds.")
    parser.add_argument("--out", default="out", help="folder for the picture", type=Path)
    out = parser.parse_args(argv).out
    return exit_status("data.py", lambda: demo(out))


def demo(out: Path) -> None:
    smpl, rows = SMPL(), []
    for look, crop, upright, size in (("plain", "tight", True, 64),
                                      ("hard", "official", False, 224)):
        world = SyntheticPeople(smpl, load_mocap(upright, False), 16, size, look, crop=crop)
        batch = world.batch(0)
        print(f"look {look!r}, {size} px: {batch.has_3d.mean():.0%} of pictures have 3D labels")
        image = (255 * interpolate(batch.image, (224, 224))).byte()   # (B, 3, 224, 224)
        points = 112 * (batch.keypoints2d + 1)                        # (B, 19, 2) pixels
        drawn = [torchvision.utils.draw_keypoints(i, k[None, v > 0], colors="red") / 255
                 for i, k, v in zip(image, points, batch.visible)]
        rows += [torch.cat(drawn[:8], 2), torch.cat(drawn[8:], 2)]
    save_png(out / "data.png", torch.cat(rows, 1))
    print(f"wrote {out / 'data.png'}: two rows of --small's world, two of the full recipe's")


if __name__ == "__main__":
    sys.exit(main())
