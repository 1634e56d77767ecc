"""A photograph on the command line: the people in it as bodies; by a network, or by fitting alone.

    python -m appendix.photo PHOTO.jpg --checkpoint runs/small/checkpoint.pt
    python -m appendix.photo PHOTO.jpg --checkpoint FILE --bbox x,y,w,h        # one person's box
    python -m appendix.photo PHOTO.jpg --checkpoint FILE --keypoints FILE.json --person 2
    python -m appendix.photo PHOTO.jpg --keypoints FILE.json --fit             # no network

A network that was trained on drawn people is not expected to work on photographs.  FILE.json is a
COCO annotation file (the photo is found by its name) or a list of 17 (COCO's order) or 19 rows
x, y, visible.  In the folder --out: STEM.png, STEM.obj, STEM.json; _N before the ending for
person N of several.

Axes:  H, W pixels of the photo   19 keypoints   24 joints   B headings that a fit starts from
       N recorded bodies   L pixels of a square canvas
Photo: pixel i covers [i, i + 1), as everywhere here.  COCO's keypoints count whole pixels, so
0.5 is added to all that --keypoints reads; its boxes (and --bbox) are x, y, w, h of edges already.
"""

import argparse
import json
import math
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional as vision

import data
import train
from appendix.ablate import draw_points
from appendix.datasets import COCO_TO_19, cut_window, person_scale
from appendix.spin import load_network
from hmr import (CAM, HMR, POSE, Discriminator, HMROutput, discriminator_loss, mean_theta,
                 project)
from smpl import SMPL, batch_rodrigues, exit_status, printable, save_obj, write_atomically

# --------------------------------------------------------------------------------------------
# 1. From the photo to the crop and back


class Window(NamedTuple):
    """The square of the photo that the network sees, in the photo's pixels."""
    center: Tensor            # (2,) x, y
    side: float
    outside: str = "border"   # beyond the photo its edge is repeated (HMR), or "zeros" (SPIN)


def cut(image: Tensor, window: Window, size: int) -> Tensor:
    """image (3, H, W) -> crop (3, size, size), sampled as crop_person does."""
    return cut_window(image, window.center, window.side, size, window.outside).clamp(0, 1)


def to_photo(points: Tensor, window: Window) -> Tensor:
    """2D points (.., 2) in [-1, 1] of the crop -> the photo's pixels."""
    return window.center + window.side / 2 * points                   # (.., 2)


def to_crop(points: Tensor, window: Window) -> Tensor:
    """Undo `to_photo`."""
    return (points - window.center) * 2 / window.side                 # (.., 2)


def camera_of_photo(cam: Tensor, window: Window) -> Tensor:
    """cam (B, 3) of the crop -> (B, 3) = s, tx, ty of the photo: pixel = s (X + t).

    center + side / 2 * s (X + t) = S (X + t + center / S) with S = side / 2 * s, pixels a metre.
    """
    S = cam[:, :1] * window.side / 2                                  # (B, 1)
    return torch.cat([S, cam[:, 1:] + window.center / S], 1)          # (B, 3)


def camera_of_crop(cam: Tensor, window: Window) -> Tensor:
    """Undo `camera_of_photo`."""
    return torch.cat([cam[:, :1] * 2 / window.side, cam[:, 1:] - window.center / cam[:, :1]], 1)


def perspective(cam: Tensor, size: float) -> tuple[float, Tensor]:
    """The pinhole camera nearest to a weak-perspective one -> f in pixels, translation (3,).

    cam (3,) of a square of `size` pixels, whose middle is the principal point.  A pinhole sees a
    point at f (X + tx) / (Z + tz) pixels from it, the camera of the loss at s (X + tx) size / 2.
    A body is thin against its distance, |Z| << tz, so that f / tz = s size / 2, or
    tz = 2 f / (size s).  f is the official renderer's, 500 pixels for a crop of 224.
    """
    f = 500 * size / 224
    return f, torch.cat([cam[1:], 2 * f / (size * cam[:1])])          # (3,)


# A person's box (of the skin) against the box of the 19 keypoints, from which training's crops are
# made: its diagonal is longer by a factor of 1.13 (mean of 512 drawn people, upright clips) to 1.16
# (all clips).  Clothes, skis and what else a photo's box holds make it larger still.
BOX = 1.15


def keypoint_window(keypoints: Tensor, visible: Tensor, crop: str = "official") -> Window:
    """Where crop_person cuts: keypoints (19, 2) in the photo, visible (19,)."""
    seen = keypoints[visible > 0]                                     # (n, 2)
    return Window((seen.amin(0) + seen.amax(0)) / 2, 224 / person_scale(keypoints, visible, crop))


def box_window(box: Tensor, crop: str = "official") -> Window:
    """The window of a box (4,) = x, y, w, h in which its person is as large as in training."""
    diagonal = float(box[2:].norm())
    return Window(box[:2] + box[2:] / 2, 224 / data.CROPS[crop][0] * diagonal / BOX)


# --------------------------------------------------------------------------------------------
# 2. A body for 2D keypoints without an encoder: the paper's objective, Theta by gradient descent

# The official code's weights are 60 and 1.  0.1 is ours, chosen with `train_discriminators` on 12
# drawn people of the held-out clips: at 1 Theta is pulled away from what the points say, below 0.1
# more and more joints leave the recorded range (appendix/README.md has the numbers).
WEIGHT_ADV = 0.1


class Fit(NamedTuple):
    """The B bodies found, best first."""
    theta: Tensor             # (B, 157), 6D rotations
    loss: Tensor              # (B,) 60 L_reproj + weight_adv L_adv
    L_kp: Tensor              # (B,) Eq. (3) of each
    L_adv: Tensor             # (B,) Eq. (7) of each
    heading: Tensor           # (B,) degrees that the person was turned by at the start


def fit(model: HMR, D: Discriminator, target: Tensor, visible: Tensor,
        weight_adv: float = WEIGHT_ADV, headings: int = 8, steps: int = 300) -> Fit:
    """min over Theta of 60 L_reproj + weight_adv L_adv, from several headings, all at once.

    target (19, 2) in [-1, 1] of the crop, visible (19,).  Eq. (1) without 3D and without an
    encoder, D held fixed.  From Theta-bar, turned about the vertical and moved onto the keypoints'
    box; in 6D, since an axis-angle has seams.
    """
    visible, weight_kp = (visible > 0).float(), train.Config.weight_kp
    angle = torch.arange(headings) * 2 * math.pi / headings           # (B,)
    turn = batch_rodrigues(angle[:, None] * torch.tensor([0.0, 1, 0]))            # (B, 3, 3)
    theta = mean_theta(model.smpl.mean_pose, "6d").repeat(headings, 1)            # (B, 157)
    root = batch_rodrigues(torch.tensor([math.pi, 0, 0])) @ turn      # (B, 3, 3) heading, upright
    theta[:, POSE][:, :6] = root[..., :2].flatten(1)                  # interleaved 6D
    points = model.decode(theta).keypoints3d[..., :2]                 # (B, 19, 2)
    (low, high), (there_low, there_high) = (
        (x.amin(-2), x.amax(-2)) for x in (points[:, visible > 0], target[visible > 0]))
    scale = (there_high - there_low).norm() / (high - low).norm(dim=-1)           # (B,)
    shift = (there_low + there_high) / 2 / scale[:, None] - (low + high) / 2      # (B, 2)
    theta[:, CAM] = torch.cat([scale[:, None], shift], 1)
    theta.requires_grad_()

    def losses() -> tuple[Tensor, Tensor, Tensor]:                    # (B,) each
        out = model.decode(theta)
        error = (out.keypoints2d - target).abs().sum(-1) * visible    # (B, 19)
        L_kp = error.sum(1) / (2 * visible.sum())                     # Eq. (3) of one picture
        L_adv = (D(out.rotmats[:, 1:], out.betas) - 1).square().sum(1)            # Eq. (7)
        return weight_kp * L_kp + weight_adv * L_adv, L_kp, L_adv

    cycle = train.Config(schedule="onecycle", steps=steps)
    optimizer = torch.optim.Adam([theta], lr=0.03)                    # ours
    D.requires_grad_(False)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * train.lr_factor(step, cycle)
        optimizer.zero_grad()
        losses()[0].sum().backward()                                  # the B bodies are independent
        optimizer.step()
    D.requires_grad_(True)
    with torch.no_grad():
        loss, L_kp, L_adv = losses()
        best = loss.argsort()                                         # (B,)
    return Fit(*(x[best] for x in (theta.detach(), loss, L_kp, L_adv, angle.rad2deg())))


def spoil(rotmats: Tensor, betas: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn recorded bodies into ones that nobody recorded: (N, 23, 3, 3), (N, 10) -> same.

    Every body by its own measure, between none and a radian (three standard deviations of betas),
    and only a share of its joints: what lies near the recorded poses must count as well.
    """
    N = len(betas)
    share, measure = torch.rand(2, N, 1, 1, generator=rng)            # (N, 1, 1) each
    turned = torch.rand(N, 23, 1, generator=rng) < share              # (N, 23, 1)
    turn = measure * turned * torch.randn(N, 23, 3, generator=rng)    # (N, 23, 3) axis-angle
    beta_noise = 3 * torch.rand(N, 1, generator=rng) * torch.randn(N, 10, generator=rng)
    return rotmats @ batch_rodrigues(turn), betas + beta_noise


def train_discriminators(smpl: SMPL, steps: int = 1000, N: int = 96) -> Discriminator:
    """The paper's 25 discriminators, trained anew for `fit`, on all training clips.

    Ours: the fakes are not an encoder's but `spoil`'s.  Those of a checkpoint know one encoder's
    mistakes on seven clips; under them Theta finds poses that the encoder never made, where D is
    wrong.  Here what is near recorded motion is real, and the farther from it, the less so.
    """
    world = data.SyntheticPeople(smpl, data.load_mocap(False, False), 2, 2, seed=18)
    cycle = train.Config(schedule="onecycle", steps=steps)
    with torch.random.fork_rng():                                     # the same every time
        torch.manual_seed(18)
        D = Discriminator()
    optimizer = torch.optim.Adam(D.parameters(), lr=1e-3, fused=True)
    for step in range(steps):
        rotmats, betas = world.motion(2 * N, step)                    # (2N, 23, 3, 3), (2N, 10)
        fake = spoil(rotmats[N:], betas[N:], world.generator(step, stream=2))
        loss = discriminator_loss(D(rotmats[:N], betas[:N]), D(*fake))            # Eq. (8)
        optimizer.param_groups[0]["lr"] = 1e-3 * train.lr_factor(step, cycle)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"  {step + 1:5d} of {steps}: loss_D {loss.item():.2f} (25 if D says 0)",
                  flush=True)
    return D


# ============================================================================================
# Not needed to understand HMR: reading photos and keypoints, pictures and files, the command line.

FEWEST = 6                    # labelled points of a person (Sec. 4: others are left out)


class Person(NamedTuple):
    number: int               # from 1, in the file's order
    keypoints: Tensor         # (19, 2) pixels of the photo
    visible: Tensor           # (19,) 1 = labelled, occluded or not
    box: Tensor               # (4,) x, y, w, h: the file's, else the labelled points'


def read_photo(path: Path) -> Tensor:
    """A JPEG or PNG, grey, 16-bit or with alpha (dropped), turned as its EXIF says -> (3, H, W)
    RGB in [0, 1].  Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such photo; name a JPEG or PNG file")
    try:
        content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        image = decode_image(content, mode="RGB", apply_exif_orientation=True)
    except (RuntimeError, ValueError):      # ValueError: an empty file
        raise ValueError(f"{path}: not a readable JPEG or PNG; it may be truncated") from None
    return vision.to_dtype(image, torch.float32, scale=True)          # (3, H, W)


def read_rows(rows, box=None, number: int = 1) -> Person:
    """17 rows x, y, v in COCO's order, or 19 in this project's, in whole pixels -> Person."""
    try:
        table = torch.tensor(rows, dtype=torch.float32)               # (17 or 19, 3)
        box = None if box is None else torch.tensor(box, dtype=torch.float32)     # (4,)
    except (TypeError, ValueError, RuntimeError):
        table, box = torch.zeros(0), None
    if table.shape not in ((17, 3), (19, 3)) or not table.isfinite().all() or not (
            box is None or box.shape == (4,) and box.isfinite().all() and (box[2:] > 0).all()):
        raise ValueError("expected 17 (COCO's order) or 19 rows of three numbers x, y, visible, "
                         "and a bbox of x, y, w, h if any")
    if len(table) == 17:                    # COCO has no neck and no top of the head: not labelled
        table = torch.cat([table, torch.zeros(1, 3)])[COCO_TO_19]     # (19, 3)
    visible = (table[:, 2] > 0).float()     # COCO's 1, labelled but hidden, counts as 2 does
    keypoints = (table[:, :2] + 0.5) * visible[:, None]               # (19, 2)
    if box is None and visible.any():
        seen = keypoints[visible > 0]                                 # (n, 2)
        box = torch.cat([seen.amin(0), seen.amax(0) - seen.amin(0)])  # (4,)
    return Person(number, keypoints, visible, box)


def read_keypoints(path: Path, photo: Path, extent: tuple[int, int],
                   only: int | None = None) -> list[Person]:
    """The people of one photo (extent = W, H) in a COCO annotation file, or of a plain list.

    Crowds do not count; people of fewer than 6 labelled points, or of under 5
    pixels, are named and left out.  only: the
    number of one person.  Raises FileNotFoundError or ValueError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--keypoints {path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"--keypoints {path}: not JSON; it may be truncated") from None
    try:
        if isinstance(content, list):
            people = [read_rows(content)]
        else:
            people = coco_people(content, photo.name, extent)
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"--keypoints {path}: neither COCO's person keypoints nor a list of 17 or "
                         f"19 rows x, y, visible") from None
    except ValueError as error:
        raise ValueError(f"--keypoints {path}: {error}") from None
    if only is not None and not 1 <= only <= len(people):
        raise ValueError(f"--person {only}: {path} has {len(people)} of this photo")
    kept = []
    for person in people if only is None else [people[only - 1]]:
        try:
            if person.visible.sum() < FEWEST:
                raise ValueError(f"{int(person.visible.sum())} labelled points, {FEWEST} needed")
            person_scale(person.keypoints, person.visible)            # raises for a few pixels
            kept.append(person)
        except ValueError as error:
            print(f"person {person.number} is left out: {error}")
    if not kept:
        raise ValueError(f"--keypoints {path}: nobody with {FEWEST} labelled points who is 5 "
                         f"pixels large; give --bbox")
    return kept


def coco_people(content: dict, name: str, extent: tuple[int, int]) -> list[Person]:
    """A COCO annotation file's people of the picture called `name`, in the file's order."""
    images = [i for i in content["images"] if PurePosixPath(i["file_name"]).name == name]
    if len(images) != 1:
        raise ValueError(f"{len(images)} of its images are called {name}; expected one")
    size = tuple(images[0].get(key, ours) for key, ours in zip(("width", "height"), extent))
    if size != extent:
        raise ValueError(f"it was made on {name} of {size[0]} x {size[1]} pixels, the photo has "
                         f"{extent[0]} x {extent[1]}; name the same picture")
    found = [a for a in content["annotations"]
             if a["image_id"] == images[0]["id"] and not a.get("iscrowd")]
    people = []
    for number, one in enumerate(found, 1):
        flat = one["keypoints"]
        people.append(read_rows([flat[i:i + 3] for i in range(0, len(flat), 3)], one.get("bbox"),
                                number))
    return people


def parse_box(text: str, extent: tuple[int, int]) -> Tensor:
    """x,y,w,h -> (4,).  Raises ValueError."""
    try:
        box = torch.tensor([float(number) for number in text.split(",")])         # (4,)
        x, y, w, h = box.tolist()
    except ValueError:
        raise ValueError(f"--bbox {text}: expected four numbers x,y,w,h") from None
    if not (box.isfinite().all() and min(w, h) > 0 and math.hypot(w, h) >= 5):
        raise ValueError(f"--bbox {text}: expected a box of at least 5 pixels")
    if x >= extent[0] or y >= extent[1] or x + w <= 0 or y + h <= 0:
        raise ValueError(f"--bbox {text}: outside the photo of {extent[0]} x {extent[1]} pixels")
    return box


def panels(image: Tensor, body: HMROutput, faces: Tensor, window: Window,
           person: Person | None) -> Tensor:
    """input | overlay in the full photo | turned by 90 | by 180 degrees -> (3, h, w).

    body: of one person.  The loss's own camera draws it.  Circles: the given keypoints, on the
    input white; on the overlay red discs are the body's.  A photo of over 1,024 pixels is shrunk.
    """
    factor = min(1, 1024 / max(image.shape[1:]))
    h, w = (max(1, round(factor * length)) for length in image.shape[1:])
    L = max(h, w)
    canvas = torch.ones(3, L, L)
    canvas[:, :h, :w] = vision.resize(image, [h, w], antialias=True)

    def on_canvas(points):                                            # photo's pixels -> [-1, 1]
        return 2 * factor * points / L - 1
    S, t = camera_of_photo(body.cam, window).split([1, 2], 1)         # (1, 1), (1, 2)
    s = 2 * factor * S / L                                            # (1, 1)
    overlay = data.draw_mesh(body.vertices, faces, torch.cat([s, t - 1 / s], 1), L, canvas[None])[0]
    radius = max(2.0, h / 150)
    if person is not None:
        seen = person.visible > 0                                     # (19,)
        given = on_canvas(person.keypoints[seen]), (1.0, 1, 1), 1.6 * radius, False
        canvas, overlay = (draw_points(x, *given) for x in (canvas, overlay))
        overlay = draw_points(overlay, on_canvas(to_photo(body.keypoints2d[0, seen], window)),
                                   radius=radius)
    turned = [data.side_view(body.vertices)]                          # (1, V, 3)
    turned.append(data.side_view(turned[0]))
    low, high = (torch.stack([f(x, 1)[:, :2] for x in turned]) for f in (torch.amin, torch.amax))
    s = 1.8 / (high - low).max().view(1, 1)                           # both fill most of h x h
    views = [data.draw_mesh(x, faces, torch.cat([s, -(a + b) / 2], 1), h)[0]
             for x, a, b in zip(turned, low, high)]
    return torch.cat([canvas[:, :h, :w], overlay[:, :h, :w], *views], 2)


def sheet(crop: Tensor, model: HMR, fits: list[Fit], target: Tensor, visible: Tensor) -> Tensor:
    """All that a fit found, best first, a row a heading: overlay | turned 90 | 180 degrees; the
    fits side by side -> (3, B * 224, ..)."""
    columns, seen = [], visible > 0
    for found in fits:
        body = model.decode(found.theta, vertices=True)
        turned = data.side_view(body.vertices)
        background = torch.nn.functional.interpolate(crop[None], (224, 224), mode="bilinear")
        overlay = data.draw_mesh(body.vertices, model.smpl.faces, body.cam, 224,
                                 background.expand(len(turned), -1, -1, -1))
        overlay = [draw_points(draw_points(o, target[seen], (1, 1, 1), 3, False), k[seen])
                   for o, k in zip(overlay, body.keypoints2d)]
        views = [list(data.draw_mesh(v, model.smpl.faces, body.cam, 224))
                 for v in (turned, data.side_view(turned))]
        columns += [torch.cat(part, 1) for part in (overlay, *views)]
    return torch.cat(columns, 2)


def describe(body: HMROutput, smpl: str, window: Window, size: int, photo: str,
             image: Tensor) -> dict:
    """STEM.json: one body in numbers.  Camera frame (x right, y down, z away), metres; pixel i of
    the photo covers [i, i + 1), the crop is [-1, 1] in both directions."""
    f, translation = perspective(body.cam[0], size)
    points = {"joints": body.joints, "keypoints": body.keypoints3d}   # (1, 24, 3), (1, 19, 3)
    crop = {name: project(x, body.cam)[0] for name, x in points.items()}          # (24 or 19, 2)
    rotmats = body.rotmats[0].double().numpy()                        # (24, 3, 3)
    return {
        "photo": printable(photo), "body": smpl, "photo_pixels": [image.shape[2], image.shape[1]],
        "crop_pixels": size, "window": {"center": window.center.tolist(), "side": window.side},
        # s, tx, ty: s (X + t) is in [-1, 1] of the crop; in the photo's pixels
        "camera": {"crop": body.cam[0].tolist(),
                   "photo": camera_of_photo(body.cam, window)[0].tolist()},
        "perspective": {"f_crop": f, "f_photo": f * window.side / size,
                        "principal_point_photo": window.center.tolist(),
                        "translation": translation.tolist()},
        "pose": Rotation.from_matrix(rotmats).as_rotvec().tolist(),   # axis-angle (24, 3)
        "betas": body.betas[0].tolist(),
        **{f"{name}3d": x[0].tolist() for name, x in points.items()},
        **{f"{name}2d_crop": x.tolist() for name, x in crop.items()},
        **{f"{name}2d_photo": to_photo(x, window).tolist() for name, x in crop.items()}}


def network(args: argparse.Namespace) -> tuple[HMR, Discriminator | None, int, str]:
    """-> what decodes (and unless --fit sees), discriminators, its crop's size and kind."""
    if args.checkpoint:
        model, D, config = load_network(args.checkpoint, args.smpl, "cpu")
        if args.fit and (D is None or not config.adv):
            raise ValueError(f"--checkpoint {args.checkpoint}: holds no trained discriminators; "
                             f"leave it out, and --fit trains some")
        if not args.fit and not hasattr(model, "crop"):
            print("a network trained on drawn people is not expected to work on photographs")
        return model, D, config.size, config.crop
    if not args.fit:
        raise ValueError("--checkpoint: none named; `python train.py --small` makes "
                         "runs/small/checkpoint.pt in some 10 minutes, --fit needs none")
    model = HMR(SMPL(args.smpl), depth=18, rotation="6d").eval()      # only its `decode` is used
    print("25 discriminators, trained on recorded motion against the same with noise (ours):")
    return model, train_discriminators(model.smpl), 224, "official"


def find(model: HMR, crop: Tensor, window: Window, person: Person | None,
         D: Discriminator | None) -> tuple[Tensor, list[Fit]]:
    """One person's Theta (1, 85 or 157), and beside it what a fit found with and without L_adv.

    Printed: README's columns; of the bodies' plausibility, the last two of train.py's table."""
    if D is None:
        with torch.inference_mode():
            return model(crop[None])[0][-1], []
    target = to_crop(person.keypoints, window)                        # (19, 2)
    recorded, fits = train.recorded_rotations(train.Config(), "cpu"), []          # (2M, 23, 9)
    for title, weight in ((f"+ {WEIGHT_ADV} L_adv", WEIGHT_ADV), ("without it", 0.0)):
        found = fit(model, D, target, person.visible, weight)
        print(f"{title:12s}{'60 L_reproj':>12s}{'L_adv':>8s}{'px an axis':>12s}{'outside %':>11s}"
              f"{'mocap deg':>11s}   heading at the start")
        odd = train.monstrosity(model.decode(found.theta), recorded)
        for row in zip(found.L_kp, found.L_adv, odd["outside"].mean(1), odd["mocap"],
                       found.heading):
            kp, adv, outside, mocap, heading = (x.item() for x in row)
            print(f"{'':12s}{60 * kp:12.3f}{adv:8.2f}{112 * kp:12.2f}{outside:11.0f}{mocap:11.0f}"
                  f"{heading:9.0f}")
        fits.append(found)
    return fits[0].theta[:1], fits


def run(args: argparse.Namespace) -> None:
    image = read_photo(args.photo)                                    # (3, H, W)
    H, W = image.shape[1:]
    if args.fit and not args.keypoints:
        raise ValueError("--fit: fits a body to 2D keypoints; name them by --keypoints FILE.json")
    if args.person is not None and not args.keypoints:
        raise ValueError(f"--person {args.person}: one of --keypoints' people; name that file")
    people = read_keypoints(args.keypoints, args.photo, (W, H), args.person) if args.keypoints \
        else [None]
    box = parse_box(args.bbox or f"0,0,{W},{H}", (W, H))              # (4,) default: all of it
    stems = [args.photo.stem + (f"_{p.number}" if len(people) > 1 else "") for p in people]
    outputs = [args.out / (stem + end) for stem in stems
               for end in (".png", ".obj", ".json", "_fits.png")]
    if any(path.exists() and path.samefile(given) for path in outputs
           for given in (args.photo, args.keypoints) if given):
        raise ValueError(f"--out {args.out}: a result would take the place of the photo or its "
                         f"keypoints; name another folder")
    model, D, size, kind = network(args)
    for person, stem in zip(people, stems):
        if hasattr(model, "crop"):                                    # SPIN's
            window = Window(*model.crop(box if person is None else person.box))
        elif person is not None:
            window = keypoint_window(person.keypoints, person.visible, kind)
        else:
            window = box_window(box, kind)
        crop = cut(image, window, size)                               # (3, size, size)
        theta, fits = find(model, crop, window, person, D if args.fit else None)
        save(args, model, image, window, person, theta, fits, crop, stem)


@torch.inference_mode()
def save(args: argparse.Namespace, model: HMR, image: Tensor, window: Window,
         person: Person | None, theta: Tensor, fits: list[Fit], crop: Tensor, stem: str) -> None:
    """Decode Theta (1, 85 or 157) and write what came out."""
    body = model.decode(theta, vertices=True)
    if not theta.isfinite().all() or body.cam[0, 0] <= 1e-3:
        raise ValueError(f"{args.photo}: no body found (camera scale {body.cam[0, 0]:.3g}); "
                         f"train longer, or name the person by --bbox or --keypoints")
    numbers = describe(body, model.smpl.name, window, crop.shape[-1], args.photo.name, image)
    picture = panels(image, body, model.smpl.faces, window, person)
    if fits:
        numbers["fit"] = {key: getattr(fits[0], key)[0].item() for key in Fit._fields[1:]}
        monster = model.decode(fits[1].theta[:1], vertices=True)
        below = panels(image, monster, model.smpl.faces, window, person)
        picture = torch.cat([picture, below], 1)                      # with L_adv | without, below
        target = to_crop(person.keypoints, window)                    # (19, 2)
        data.save_png(args.out / f"{stem}_fits.png",
                      sheet(crop, model, fits, target, person.visible))
    data.save_png(args.out / f"{stem}.png", picture)
    # y up, as modelling programs expect: half a turn about x
    save_obj(args.out / f"{stem}.obj", body.vertices[0] * torch.tensor([1.0, -1, -1]),
             model.smpl.faces)
    write_atomically(args.out / f"{stem}.json", json.dumps(numbers, indent=1).encode())
    print(f"wrote {printable(args.out / stem)}.png, .obj, .json" + ", _fits.png" * bool(fits))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put bodies over the people in a photo.",
                                     allow_abbrev=False)
    parser.add_argument("photo", type=Path, metavar="PHOTO", help="a JPEG or PNG")
    parser.add_argument("--checkpoint", metavar="FILE", help="a run's checkpoint.pt, or SPIN's "
                        "published weights; with --fit: whose discriminators judge")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--bbox", metavar="x,y,w,h", help="the person (default: the whole photo)")
    where.add_argument("--keypoints", type=Path, metavar="FILE.json", help="a COCO annotation file "
                       "or a list of 17 (COCO's order) or 19 rows x, y, visible")
    parser.add_argument("--person", type=int, metavar="N", help="only the N-th of --keypoints")
    parser.add_argument("--fit", action="store_true", help="fit Theta to the keypoints; no network")
    parser.add_argument("--smpl", metavar="FILE", help="body file (default: the checkpoint's)")
    parser.add_argument("--out", type=Path, default=Path("out/photo"), help="folder of the results")
    args = parser.parse_args(argv)
    return exit_status("photo.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
