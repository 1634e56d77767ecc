"""A photograph on the command line: the people in it as bodies; by fitting alone, or by a network.

    python -m appendix.photo PHOTO.jpg --fit                          # finds the people itself
    python -m appendix.photo PHOTO.jpg --fit --keypoints FILE.json    # these people
    python -m appendix.photo PHOTO.jpg --checkpoint FILE --keypoints FILE.json --person 2
    python -m appendix.photo PHOTO.jpg --checkpoint FILE --bbox x,y,w,h

A network that was trained on drawn people is not expected to work on photographs.  FILE.json is a
COCO annotation file (the photo is found by its name), COCO results, OpenPose's output, or a list of
17 (COCO's order) or 19 rows x, y, visible.  In the folder --out: STEM.png, STEM.obj, STEM.json; _N
before the ending for person N of several; STEM_keypoints.json with the people that --fit found.

Axes:  H, W pixels of the photo   19 keypoints   24 joints   B headings that a fit starts from
       N recorded bodies   L pixels of a square canvas
Photo: pixel i covers [i, i + 1), as everywhere here.  COCO's keypoints count whole pixels, so
0.5 is added to all that --keypoints reads; its boxes (and --bbox) are x, y, w, h of edges already.
"""

import argparse
import hashlib
import io
import json
import math
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.transforms.v2 import functional as vision

import data
import train
from appendix.ablate import draw_points
from appendix.datasets import (COCO_NAMES, CONFIDENT, NOBODY, coco_person, cut_window, labelled,
                               person_points, person_scale, read_json, read_mean_params,
                               read_picture)
from appendix.spin import Network, load_network
from hmr import (CAM, HMR, POSE, Discriminator, HMROutput, discriminator_loss, mean_theta,
                 project)
from smpl import (KEYPOINT_NAMES, SMPL, batch_rodrigues, exit_status, load_tensors, plain_file,
                  printable, require_finite, save_obj, say, write_atomically)

# --------------------------------------------------------------------------------------------
# 1. From the photo to the crop and back


class Window(NamedTuple):
    """The square of the photo that the network sees, in the photo's pixels."""
    center: Tensor            # (2,) x, y
    side: float
    outside: str = "border"   # beyond the photo its edge is repeated (HMR), or "zeros" (SPIN)


class Person(NamedTuple):
    """One person of the photo: 2D keypoints, or a box alone."""
    number: int               # from 1, in the file's order
    keypoints: Tensor | None  # (19, 2) pixels of the photo
    visible: Tensor           # (19,) 1 = labelled, occluded or not
    box: Tensor | None        # (4,) x, y, w, h, if there are no keypoints


# A person's box (of the skin) against the box of the 19 keypoints, from which training's crops are
# made: its diagonal is longer by a factor of 1.13 (mean of 512 drawn people, upright clips) to 1.16
# (all clips).  Clothes, skis and what else a photo's box holds make it larger still.
BOX = 1.15


def window_of(person: Person, crop: str = "official") -> Window:
    """Where a person is cut out: as crop_person does; by a box, so that a person comes out as large.

    crop "spin": as SPIN's demo does, the box's longer side, or 1.2 times the keypoints' about their
    mean.  (SPIN also rounds the window to whole pixels.)
    """
    box = person.box
    if person.keypoints is None:
        middle = box[:2] + box[2:] / 2                                # (2,)
        if crop == "spin":
            return Window(middle, float(box[2:].max()), "zeros")
        return Window(middle, 224 / data.CROPS[crop][0] * float(box[2:].norm()) / BOX)
    seen = person.keypoints[person.visible > 0]                       # (n, 2)
    low, high = seen.amin(0), seen.amax(0)                            # (2,) each
    if crop == "spin":
        return Window(seen.mean(0), 1.2 * float((high - low).max()), "zeros")
    return Window((low + high) / 2, 224 / person_scale(person.keypoints, person.visible, crop))


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


def perspective(cam: Tensor, size: float) -> tuple[float, Tensor]:
    """The pinhole camera nearest to a weak-perspective one -> f in pixels, translation (3,).

    cam (3,) of a square of `size` pixels, whose middle is the principal point.  A pinhole sees a
    point at f (X + tx) / (Z + tz) pixels from it, the camera of the loss at s (X + tx) size / 2.
    A body is thin against its distance, |Z| << tz, so that f / tz = s size / 2, or
    tz = 2 f / (size s).  f is the official renderer's, 500 pixels for a crop of 224.
    """
    f = 500 * size / 224
    return f, torch.cat([cam[1:], 2 * f / (size * cam[:1])])          # (3,)


# --------------------------------------------------------------------------------------------
# 2. A body for 2D keypoints without an encoder: the paper's objective, Theta by gradient descent

# The official code's weights are 60 and 1.  0.1 is our choice, made with `train_discriminators` on
# 12 drawn people of the held-out clips: at 1 Theta is pulled away from what the points say, below
# 0.1 more and more joints leave the recorded range (appendix/README.md has the numbers).
WEIGHT_ADV = 0.1


class Fit(NamedTuple):
    """The B bodies found, best first."""
    theta: Tensor             # (B, 157), 6D rotations
    loss: Tensor              # (B,) 60 L_reproj + weight_adv L_adv
    L_kp: Tensor              # (B,) Eq. (3) of each
    L_adv: Tensor             # (B,) Eq. (7) of each
    heading: Tensor           # (B,) degrees that the person was turned by at the start


def fit(model: HMR, D: Discriminator, target: Tensor, visible: Tensor, start: Tensor,
        weight_adv: float = WEIGHT_ADV, headings: int = 8, steps: int = 300) -> Fit:
    """min over Theta of 60 L_reproj + weight_adv L_adv, from several headings, all at once.

    target (19, 2) in [-1, 1] of the crop, visible (19,), start (1, 157): Theta-bar in 6D, since an
    axis-angle has seams.  Eq. (1) without 3D and without an encoder, D held fixed.  Theta-bar is
    turned about the vertical and moved onto the keypoints' box.
    """
    visible, weight_kp = (visible > 0).float(), train.Config.weight_kp
    angle = torch.arange(headings, device=start.device) * 2 * math.pi / headings  # (B,)
    turn = batch_rodrigues(angle[:, None] * start.new_tensor([0, 1, 0]))          # (B, 3, 3)
    theta = start.repeat(headings, 1)                                 # (B, 157)
    root = batch_rodrigues(start.new_tensor([math.pi, 0, 0])) @ turn  # (B, 3, 3) heading, upright
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
    optimizer = torch.optim.Adam([theta], lr=0.03)                    # our choice
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
    N, at = len(betas), {"generator": rng, "device": betas.device}
    share, measure = torch.rand(2, N, 1, 1, **at)                     # (N, 1, 1) each
    turned = torch.rand(N, 23, 1, **at) < share                       # (N, 23, 1)
    turn = measure * turned * torch.randn(N, 23, 3, **at)             # (N, 23, 3) axis-angle
    beta_noise = 3 * torch.rand(N, 1, **at) * torch.randn(N, 10, **at)            # (N, 10)
    return rotmats @ batch_rodrigues(turn), betas + beta_noise


def train_discriminators(smpl: SMPL, steps: int = 1000, N: int = 96) -> Discriminator:
    """The paper's 25 discriminators, trained anew for `fit`, on all training clips.

    Our choice: the fakes are not an encoder's but `spoil`'s.  Those of a checkpoint know one
    encoder's mistakes on seven clips; under them Theta finds poses that the encoder never made,
    where D is wrong.  Here what is near recorded motion is real, and the farther from it, the less.
    """
    world = data.SyntheticPeople(smpl, data.load_mocap(False, False), 2, 2, seed=18)
    cycle = train.Config(schedule="onecycle", steps=steps)
    with torch.random.fork_rng():                                     # the same every time
        torch.manual_seed(18)
        D = Discriminator().to(world.device)
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
            say(f"  {step + 1:5d} of {steps}: loss_D {loss.item():.2f} (25 if D says 0)")
    return D


def kept_discriminators(smpl: SMPL, **settings) -> Discriminator:
    """`train_discriminators`, once: kept in torch's cache under a name made of body and clips."""
    key = hashlib.sha256(repr((smpl.sha256, settings)).encode() + data.MOCAP.read_bytes())
    path, file = Path(torch.hub.get_dir()) / f"hmr_D_{key.hexdigest()[:16]}.pt", io.BytesIO()
    try:
        D, state = Discriminator(), load_tensors(path)
        require_finite(state, str(path))
        D.load_state_dict(state)
        say(f"25 discriminators of {path}")
    except (ValueError, OSError, RuntimeError):                       # not there yet, or broken
        say("25 discriminators are trained once, on recorded motion against the same with noise "
            "(our choice):")
        D = train_discriminators(smpl, **settings)
        torch.save(D.state_dict(), file)
        try:
            write_atomically(path, file.getvalue())
        except OSError as error:                                      # a cache is no condition
            say(f"not kept: {error}")
    return D.to(smpl.v_template.device)


# --------------------------------------------------------------------------------------------
# 3. Who is in the photo: torchvision's detector, or a file of keypoints

SURE, POINT_SCORE = 0.9, 2.0      # of a person; of a point, the logit of its place (our choice)


def load_detector(device: str) -> nn.Module:
    """torchvision's Keypoint R-CNN with COCO's weights, downloaded once.  Raises ValueError."""
    weights = detection.KeypointRCNN_ResNet50_FPN_Weights.COCO_V1
    network = detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    try:
        network.load_state_dict(train.downloaded(
            weights, "--fit", "or name the people's keypoints by --keypoints FILE.json"))
    except (RuntimeError, AttributeError):
        raise ValueError(f"--fit: torchvision's cache holds other weights under the name of "
                         f"{weights.url}; delete them, or give --keypoints FILE.json") from None
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0                    # as torchvision has it with these weights
    return network.eval().to(device)


def detect(network: nn.Module, image: Tensor, name: str) -> dict:
    """The people in a photo (3, H, W) as COCO's annotation file has them, surest first."""
    with torch.inference_mode():
        found = {key: x.cpu() for key, x in network([image])[0].items()}
    annotations = []
    for box, score, points, sure in zip(*(found[key] for key in (
            "boxes", "scores", "keypoints", "keypoints_scores"))):
        if score >= SURE:
            rows = torch.cat([points[:, :2], 2 * (sure > POINT_SCORE)[:, None]], 1)     # (17, 3)
            annotations.append({
                "id": len(annotations) + 1, "image_id": 1, "category_id": 1, "iscrowd": 0,
                "score": round(score.item(), 4), "keypoints": rows.flatten().tolist(),
                "bbox": torch.cat([box[:2], box[2:] - box[:2]]).tolist()})
    return {"images": [{"id": 1, "file_name": name, "width": image.shape[2],
                        "height": image.shape[1]}], "annotations": annotations,
            "categories": [{"id": 1, "name": "person", "keypoints": COCO_NAMES}]}


# OpenPose's neck is the shoulders' middle, LSP's is higher: it has a name of its own.
OPENPOSE = ("nose", "neck_openpose", "right_shoulder", "right_elbow", "right_wrist",
            "left_shoulder", "left_elbow", "left_wrist", "mid_hip", "right_hip", "right_knee",
            "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye", "left_eye",
            "right_ear", "left_ear", *("foot",) * 6)
# The order of rows x, y, visible that have no names, by their number.
ORDERS = {17: COCO_NAMES, 19: KEYPOINT_NAMES, 25: OPENPOSE,
          18: [name for name in OPENPOSE[:19] if name != "mid_hip"]}


def annotations_of(content, photo: Path) -> tuple[list, dict, tuple[int, int] | None]:
    """What a keypoint file says of one photo -> COCO's annotations, their points' names as of
    `person_points`, and the size of the labelled picture, if it is said.

    Raises ValueError for a photo that is not in the file, any other error for an unknown layout.
    """
    if isinstance(content, list) and content and isinstance(content[0], dict):    # COCO results
        ids = {row["image_id"] for row in content}
        ids = ids if len(ids) == 1 else {n for n in ids if str(n) == photo.stem.lstrip("0")}
        content = {"images": [{"id": n, "file_name": photo.name} for n in ids],
                   "annotations": content}
    if isinstance(content, list) or "people" in content:
        people = [content] if isinstance(content, list) else [                    # OpenPose
            one.get("pose_keypoints_2d") or one["pose_keypoints"] for one in content["people"]]
        rows = [{"keypoints": [x + 0.0 for x in np.array(one, object).ravel()]} for one in people]
        if isinstance(content, dict):                   # some of its confidences exceed 1 a little
            for row in rows:
                row["keypoints"][2::3] = [min(x, 1) for x in row["keypoints"][2::3]]
        return rows, {"1": ORDERS[len(rows[0]["keypoints"]) // 3]} if rows else {}, None
    ends = [common_end(image["file_name"], photo) for image in content["images"]]
    images = [image for image, n in zip(content["images"], ends) if n == max(ends) > 0]
    if len(images) != 1:
        raise ValueError(f"{len(images)} of its images are called {photo.name}; expected one")
    (one,), size = images, (images[0].get("width"), images[0].get("height"))
    return ([row for row in content["annotations"] if row["image_id"] == one["id"]],
            person_points(content), size if all(size) else None)


def common_end(name: str, photo: Path) -> int:
    """How many last parts of two paths are the same."""
    parts = PurePosixPath(name).parts[::-1]
    same = [a == b for a, b in zip(parts, photo.absolute().parts[::-1])]
    return [*same, False].index(False)


def people_of(content, what: str, photo: Path,
              only: int | None) -> tuple[Tensor, list[Person], bool]:
    """The photo (3, H, W) in [0, 1], its people by a keypoint file's content, are there several?

    They are numbered in the file's order, without crowds and animals.  Who has fewer than 6
    labelled points (Sec. 4), is smaller than 5 pixels or outside the photo is named and left out.
    what: the file, for messages.  Raises FileNotFoundError, ValueError.
    """
    try:
        rows, names, size = annotations_of(content, photo)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError):
        raise ValueError(f"{what}: neither COCO's person keypoints or results, nor OpenPose's "
                         f"output, nor 17 (COCO's order) or 19 rows of three numbers x, y, visible"
                         ) from None
    image = read_picture(photo, size, turn=True).float() / 255        # (3, H, W)
    people, number = [], 0
    for row in rows:
        number += 1
        try:
            person = person_of(number, coco_person(row, names)[0], image)
            people += [person] if only in (None, number) else []
        except ValueError as error:
            if error.args == (NOBODY,):
                number -= 1
            elif only in (None, number):
                say(printable(f"person {number} is left out: {', '.join(error.args)}"))
    if only is not None and not 1 <= only <= number:
        raise ValueError(f"--person {only}: {what} has {number} of this photo")
    if not people:
        raise ValueError(f"{what}: nobody with 6 labelled points who is 5 pixels large and inside "
                         f"the photo; give --bbox")
    return image, people, number > 1


def person_of(number: int, rows: np.ndarray, image: Tensor) -> Person:
    """rows (19, 3) x, y, visible in whole pixels -> Person.  Raises ValueError: who is left out."""
    seen = labelled(rows[:, 2]) & (np.abs(rows) < 1e6).all(1)         # (19,) NaN is not below
    if seen.sum() < 6:
        raise ValueError(f"{seen.sum()} labelled points, 6 needed (confidences below {CONFIDENT} "
                         f"do not count)")
    points = torch.from_numpy(np.where(seen[:, None], rows[:, :2] + 0.5, 0)).float()      # (19, 2)
    visible, (H, W) = torch.from_numpy(seen).float(), image.shape[1:]
    person_scale(points, visible)                                     # raises for a few pixels
    if (points[seen].amax(0) < 0).any() or not (points[seen].amin(0) < torch.tensor([W, H])).all():
        raise ValueError(f"all points lie outside the photo of {W} x {H} pixels")
    return Person(number, points, visible, None)


def parse_box(text: str, W: int, H: int) -> Tensor:
    """x,y,w,h -> (4,).  Raises ValueError."""
    try:
        x, y, w, h = (float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"--bbox {text}: expected four numbers x,y,w,h") from None
    if not (min(w, h) > 0 and 5 <= math.hypot(x, y, w, h) < math.inf and math.hypot(w, h) >= 5):
        raise ValueError(f"--bbox {text}: expected a box of at least 5 pixels")
    if x >= W or y >= H or x + w <= 0 or y + h <= 0:
        raise ValueError(f"--bbox {text}: outside the photo of {W} x {H} pixels")
    return torch.tensor([x, y, w, h])                                 # (4,)


def find_people(args: argparse.Namespace, device: str) -> tuple[Tensor, list[Person], bool]:
    """The photo (3, H, W), the people in it, are there several?"""
    if args.keypoints:
        content = read_json(args.keypoints, "a file of keypoints, see --help")
        return people_of(content, f"--keypoints {args.keypoints}", args.photo, args.person)
    image = read_picture(args.photo, turn=True).float() / 255         # (3, H, W)
    if not args.fit:
        if not args.bbox:
            say("no --bbox and no --keypoints: the whole photo is taken for one person")
        H, W = image.shape[1:]
        box = parse_box(args.bbox or f"0,0,{W},{H}", W, H)            # (4,)
        return image, [Person(1, None, torch.zeros(19), box)], False
    found = detect(load_detector(device), image.to(device), args.photo.name)
    scores = [f"{row['score']:.3f}" for row in found["annotations"]]
    if not scores:
        raise ValueError(f"{args.photo}: the detector finds no people of a score of {SURE} or more; "
                         f"name their keypoints by --keypoints FILE.json")
    path = args.out / f"{args.photo.stem}_keypoints.json"
    say(f"found by torchvision's Keypoint R-CNN: {len(scores)}, scores {', '.join(scores)}")
    text = json.dumps(found, indent=1, allow_nan=False).encode()
    if path.exists() and plain_file(path, "a file of keypoints").read_bytes() != text:
        raise ValueError(f"{path}: holds other keypoints; give them back by --keypoints, or delete "
                         f"the file")
    write_atomically(path, text)
    return people_of(found, str(path), args.photo, args.person)


# ============================================================================================
# Not needed to understand HMR: pictures and files, the command line.

def panels(image: Tensor, body: HMROutput, faces: Tensor, window: Window,
           person: Person) -> Tensor:
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
    radius, seen = max(2.0, h / 150), person.visible > 0              # (19,)
    if person.keypoints is not None:
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


def describe(body: HMROutput, smpl: str, window: Window, size: int, image: Tensor) -> dict:
    """STEM.json: one body in numbers.  Camera frame (x right, y down, z away), metres; pixel i of
    the photo covers [i, i + 1), the crop is [-1, 1] in both directions."""
    f, translation = perspective(body.cam[0], size)
    points = {"joints": body.joints, "keypoints": body.keypoints3d}   # (1, 24, 3), (1, 19, 3)
    crop = {name: project(x, body.cam)[0] for name, x in points.items()}          # (24 or 19, 2)
    rotmats = body.rotmats[0].double().numpy()                        # (24, 3, 3)
    return {
        "body": smpl, "photo_pixels": [image.shape[2], image.shape[1]],
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


def network_of(args: argparse.Namespace) -> Network:
    """What decodes, and unless --fit sees; with its discriminators."""
    if args.checkpoint:
        network = load_network(args.checkpoint, args.smpl, args.device)
        if args.fit and not (network.D and network.config.adv):
            raise ValueError(f"--checkpoint {args.checkpoint}: holds no trained discriminators; "
                             f"leave it out, and --fit trains some")
        if not args.fit and network.world == data.SyntheticPeople.name:
            say("a network trained on drawn people is not expected to work on photographs")
        return network
    config = train.settle(train.Config(device=args.device, rotation="6d"))
    smpl = SMPL(args.smpl).to(config.device)
    model = HMR(smpl, depth=18, rotation="6d").to(config.device).eval()   # only `decode` is used
    return Network(model, kept_discriminators(smpl), config, "official", "no pictures")


def fit_and_print(network: Network, person: Person, window: Window, start: Tensor,
                  weight: float) -> Fit:
    """One person's fit.  Printed are README's columns: of the bodies' plausibility, the last two of
    train.py's table."""
    target = to_crop(person.keypoints, window).to(start.device)       # (19, 2)
    found = fit(network.model, network.D, target, person.visible.to(start.device), start, weight)
    recorded = train.recorded_rotations(train.Config(), start.device)             # (2M, 23, 9)
    odd = train.monstrosity(network.model.decode(found.theta), recorded)
    say(f"person {person.number} {f'+ {weight} L_adv':12s}{'60 L_reproj':>12s}{'L_adv':>8s}"
        f"{'px an axis':>12s}{'outside %':>11s}{'mocap deg':>11s}   heading at the start")
    for row in zip(60 * found.L_kp, found.L_adv, 112 * found.L_kp, odd["outside"].mean(1),
                   odd["mocap"], found.heading):
        say("{:33.3f}{:8.2f}{:12.2f}{:11.0f}{:11.0f}{:9.0f}".format(*(x.item() for x in row)))
    return found


def show(args: argparse.Namespace, network: Network, image: Tensor, person: Person, start: Tensor,
         stem: str, origin: dict) -> None:
    """One person: find Theta, decode it, write what came out.  Raises LookupError for no body."""
    model, size = network.model, network.config.size
    window, numbers, drawn = window_of(person, network.crop), {}, []
    if args.fit:
        fits = [fit_and_print(network, person, window, start, weight)
                for weight in (WEIGHT_ADV, 0.0)[:1 + args.sheet]]
        thetas = [found.theta[:1] for found in fits]
        numbers = {"fit": {key: getattr(fits[0], key)[0].item() for key in Fit._fields[1:]}}
    else:
        crop = cut_window(image, window.center, window.side, size, window.outside).clamp(0, 1)
        with torch.inference_mode():
            thetas = [model(crop[None].to(start.device))[0][-1]]      # (1, 85 or 157)
    for theta in reversed(thetas):                      # the last one drawn is the one that is kept
        with torch.inference_mode():
            body = HMROutput(*(x.cpu() for x in model.decode(theta, vertices=True)))
        if not body.vertices.abs().max() < 1e6 or not 1e-3 < body.cam[0, 0] < 1e6:  # NaN, too
            raise LookupError(f"no body found (camera scale {body.cam[0, 0]:.3g})")
        drawn.insert(0, panels(image, body, model.smpl.faces.cpu(), window, person))
    numbers = origin | describe(body, model.smpl.name, window, size, image) | numbers
    data.save_png(args.out / f"{stem}.png", drawn[0])
    if args.sheet:
        data.save_png(args.out / f"{stem}_fits.png", torch.cat(drawn, 1))
    # y up, as modelling programs expect: half a turn about x
    save_obj(args.out / f"{stem}.obj", body.vertices[0] * torch.tensor([1.0, -1, -1]),
             model.smpl.faces)
    write_atomically(args.out / f"{stem}.json",
                     json.dumps(numbers, indent=1, allow_nan=False).encode())
    say(f"wrote {printable(args.out / stem)}.png, .obj, .json" + ", _fits.png" * args.sheet)


def require_free(args: argparse.Namespace, stems: list[str], origin: dict) -> None:
    """Raises ValueError if a result would take the place of anything but the same photo's."""
    for stem in stems:
        try:
            old = read_json(args.out / f"{stem}.json", "numbers")["photo_sha256"]
        except (OSError, ValueError, LookupError, TypeError):
            old = None
        for end in (".json", ".png", ".obj", "_fits.png"):
            if old != origin["photo_sha256"] and (args.out / (stem + end)).exists():
                raise ValueError(f"--out {args.out}: {stem}{end} there is not of this photo; name "
                                 f"another folder")


def run(args: argparse.Namespace) -> None:
    if not args.fit and not args.checkpoint:
        raise ValueError("--checkpoint: none named; `python train.py --small` makes "
                         "runs/small/checkpoint.pt in some 10 minutes, --fit needs none")
    if args.fit and args.bbox:
        raise ValueError("--fit: fits a body to 2D keypoints, and --bbox has none; leave it out, "
                         "and the people are found, or name their points by --keypoints FILE.json")
    if args.person is not None and not (args.keypoints or args.fit):
        raise ValueError(f"--person {args.person}: one of --keypoints' people; name that file")
    device = train.settle(train.Config(device=args.device)).device
    image, people, several = find_people(args, device)
    stems = [args.photo.stem + f"_{p.number}" * several for p in people]
    origin = {"photo": printable(args.photo.name),
              "photo_sha256": hashlib.sha256(args.photo.read_bytes()).hexdigest()}
    require_free(args, stems, origin)
    start = read_mean_params(args.mean_params, "6d") if args.mean_params else None
    network, bodies = network_of(args), 0
    start = mean_theta(network.model.smpl.mean_pose, "6d") if start is None else start  # (1, 157)
    for person, stem in zip(people, stems):
        try:
            show(args, network, image, person, start.to(device), stem, origin)
            bodies += 1
        except LookupError as error:
            say(printable(f"person {person.number} is left out: {error}"))
    if not bodies:
        raise ValueError(f"{args.photo}: no body found; name the person by --bbox or --keypoints, "
                         f"or another --checkpoint")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m appendix.photo", allow_abbrev=False,
                                     description="Put bodies over the people in a photo.")
    parser.add_argument("photo", type=Path, metavar="PHOTO", help="picture of people")
    parser.add_argument("--fit", action="store_true", help="fit of Theta to 2D keypoints, without "
                        "an encoder; torchvision's detector finds them, unless --keypoints names "
                        "them")
    parser.add_argument("--checkpoint", metavar="FILE", help="a run's checkpoint.pt, or SPIN's "
                        "published weights; with --fit: whose discriminators judge")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--bbox", metavar="x,y,w,h", help="the person (default: the whole photo)")
    where.add_argument("--keypoints", type=Path, metavar="FILE.json", help="COCO's annotations or "
                       "results, OpenPose's output, or 17 (COCO's order) or 19 rows x, y, visible")
    parser.add_argument("--person", type=int, metavar="N", help="number of the only person wanted")
    parser.add_argument("--sheet", action="store_true", help="with --fit: a second fit without "
                        "L_adv, and STEM_fits.png, which shows it below the first")
    parser.add_argument("--smpl", metavar="FILE", help="body file (default: the checkpoint's)")
    parser.add_argument("--mean-params", type=Path, metavar="FILE", help="file of mean parameters "
                        "from which --fit starts (default: the body file's mean pose)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                        help="device [auto]")
    parser.add_argument("--out", type=Path, default=Path("out/photo"), help="folder of the results")
    words = list(sys.argv[1:] if argv is None else argv)
    for n, word in enumerate(words[:-1]):       # argparse takes -5,40,220,350 for a flag
        if word == "--bbox":
            words[n:n + 2] = [f"--bbox={words[n + 1]}"]
    args = parser.parse_args(words)
    return exit_status("photo.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
