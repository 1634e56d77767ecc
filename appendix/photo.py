"""A photograph on the command line: the people in it as bodies; by fitting alone, or by a network.

    python -m appendix.photo PHOTO.jpg --fit                          # finds the people itself
    python -m appendix.photo PHOTO.jpg --fit --keypoints FILE.json    # these people
    python -m appendix.photo PHOTO.jpg --checkpoint FILE --keypoints FILE.json --person 2
    python -m appendix.photo PHOTO.jpg --checkpoint FILE --bbox x,y,w,h

Results, in the folder --out: STEM.png, STEM.obj, STEM.json (STEM_N of person N, if there are
several), and STEM_keypoints.json with the people that --fit found.

Axes:  H, W pixels of the photo   19 keypoints   24 joints   B headings that a fit starts from
       N recorded bodies   n visible keypoints   L pixels of a square canvas
Photo: pixel i covers [i, i + 1), as everywhere here.  COCO's keypoints count whole pixels, so
0.5 is added to all that --keypoints reads; its boxes (and --bbox) are x, y, w, h of edges already.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torchvision.models import detection

import data
import train
from appendix.ablate import draw_points
from appendix.datasets import (COCO_NAMES, CONFIDENT, NOBODY, coco_person, cut_window, labelled,
                               person_points, person_window, read_json, read_picture)
from appendix.spin import Network, load_network
from hmr import CAM, HMR, POSE, Discriminator, HMROutput, discriminator_loss, mean_theta, project
from smpl import (KEYPOINT_NAMES, SMPL, batch_rodrigues, exit_status, load_tensors, plain_file,
                  printable, save_obj, say, write_atomically)

# --------------------------------------------------------------------------------------------
# 1. A body for 2D keypoints without an encoder: the paper's objective, Theta by gradient descent

# The official code's weights are 60 and 1.  0.1 is our choice: at 1 Theta is pulled away from what
# the points say, below 0.1 more and more joints leave the recorded range (appendix/README.md).
WEIGHT_ADV = 0.1


def fit(model: HMR, D: Discriminator, target: Tensor, visible: Tensor, weight_adv: float,
        headings: int = 8, steps: int = 300) -> tuple[Tensor, dict[str, Tensor]]:
    """min over Theta of 60 L_reproj + weight_adv L_adv, from several headings, all at once.

    target (19, 2) in [-1, 1] of the crop, visible (19,).  D is held fixed.  Theta is in 6D, since
    an axis-angle has seams; it starts from the mean pose, turned about the vertical, in the points'
    box.  -> Thetas (B, 157), best first; loss, L_kp, L_adv, heading at the start in degrees, (B,).
    """
    seen = visible > 0                                                # (19,)
    theta = mean_theta(model.smpl.mean_pose, "6d").repeat(headings, 1)            # (B, 157)
    angle = torch.arange(headings, device=theta.device) * 2 * math.pi / headings  # (B,)
    turn = batch_rodrigues(angle[:, None] * theta.new_tensor([0, 1, 0]))          # (B, 3, 3)
    root = batch_rodrigues(theta.new_tensor([math.pi, 0, 0])) @ turn  # (B, 3, 3) heading, upright
    theta[:, POSE][:, :6] = root[..., :2].flatten(1)                  # interleaved 6D
    low, high = model.decode(theta).keypoints3d[:, seen, :2].aminmax(dim=1)       # (B, 2) each
    there_low, there_high = target[seen].aminmax(dim=0)               # (2,) each
    scale = (there_high - there_low).norm() / (high - low).norm(dim=-1)           # (B,)
    shift = (there_low + there_high) / 2 / scale[:, None] - (low + high) / 2      # (B, 2)
    theta[:, CAM] = torch.cat([scale[:, None], shift], 1)

    def losses() -> tuple[Tensor, Tensor, Tensor]:                    # (B,) each
        out = model.decode(theta)
        error = (out.keypoints2d - target).abs().sum(-1) * seen       # (B, 19)
        L_kp = error.sum(1) / (2 * seen.sum())                        # Eq. (3) of one picture
        L_adv = (D(out.rotmats[:, 1:], out.betas) - 1).square().sum(1)            # Eq. (7)
        return train.Config.weight_kp * L_kp + weight_adv * L_adv, L_kp, L_adv    # Eq. (1)

    cycle = train.Config(schedule="onecycle", steps=steps)
    optimizer = torch.optim.Adam([theta.requires_grad_()], lr=0.03)   # our choice
    for step in range(steps):
        train.set_rate(optimizer, 0.03 * train.lr_factor(step, cycle))
        theta.grad, = torch.autograd.grad(losses()[0].sum(), theta)   # the B bodies are independent
        optimizer.step()
    loss, L_kp, L_adv = (x.detach() for x in losses())                # (B,) each
    found = {"loss": loss, "L_kp": L_kp, "L_adv": L_adv, "heading": angle.rad2deg()}
    best = loss.argsort()                                             # (B,)
    return theta.detach()[best], {key: x[best] for key, x in found.items()}       # (B, 157)


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

    Our choice: the fakes are `spoil`'s.  Under a checkpoint's discriminators, which know one
    encoder's mistakes, Theta finds poses that no encoder made, where D is wrong.
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
        train.set_rate(optimizer, 1e-3 * train.lr_factor(step, cycle))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 200 == 0:
            say(f"  {step + 1:5d} of {steps}: loss_D {loss.item():.2f} (25 if D says 0)")
    return D


def kept_discriminators(smpl: SMPL, **settings) -> Discriminator:
    """`train_discriminators`, once: kept in torch's cache under a name made of body and clips."""
    key = hashlib.sha256(repr((smpl.sha256, settings)).encode() + data.MOCAP.read_bytes())
    path, D = Path(torch.hub.get_dir()) / f"hmr_D_{key.hexdigest()[:16]}.pt", Discriminator()
    try:
        D.load_state_dict(load_tensors(path))
        say(f"25 discriminators of {path}")
    except (ValueError, OSError, RuntimeError):                       # not there yet, or broken
        say("25 discriminators are trained once, on recorded motion against the same with noise:")
        D, file = train_discriminators(smpl, **settings), io.BytesIO()
        torch.save(D.state_dict(), file)
        with contextlib.suppress(OSError):                            # a cache is no condition
            write_atomically(path, file.getvalue())
    return D.to(smpl.v_template.device)


# --------------------------------------------------------------------------------------------
# 2. Who is in the photo: torchvision's detector, or a file of keypoints

class Person(NamedTuple):
    """One person of the photo, and the square of the photo that the network sees of them."""
    number: int               # from 1, in the file's order
    keypoints: Tensor         # (19, 2) pixels of the photo
    visible: Tensor           # (19,) 1 = labelled, occluded or not; of a box: all 0
    center: Tensor            # (2,) the square's, pixels of the photo
    side: float


SURE, POINT_SCORE = 0.9, 2.0      # of a person; of a point, the logit of its place (our choice)


def load_detector(device: str) -> nn.Module:
    """torchvision's Keypoint R-CNN with COCO's weights, downloaded once.  Raises ValueError."""
    weights = detection.KeypointRCNN_ResNet50_FPN_Weights.COCO_V1
    # torchvision's own loading, below, neither says what to do nor refuses a pickle that runs code
    train.downloaded(weights, "--fit", "or name the people's keypoints by --keypoints FILE.json")
    return detection.keypointrcnn_resnet50_fpn(weights=weights).eval().to(device)


def detect(photo: Path, device: str) -> dict:
    """The people in a photo, as COCO's annotation file has them.  Raises ValueError."""
    image = read_picture(photo, turn=True).to(device) / 255           # (3, H, W)
    with torch.inference_mode():
        found = load_detector(device)([image])[0]
    labels = 2 * (found["keypoints_scores"] > POINT_SCORE)            # (n, 17)
    points = torch.cat([found["keypoints"][..., :2], labels[..., None]], 2)       # (n, 17, 3)
    low, high = found["boxes"].split(2, 1)                            # (n, 2) each
    rows = torch.cat([low, high - low, points.flatten(1)], 1).double().round(decimals=1)  # (n, 55)
    people = [{"id": n, "image_id": 1, "category_id": 1, "iscrowd": 0, "score": score,
               "bbox": row[:4], "keypoints": row[4:]}
              for n, (score, row) in enumerate(zip(found["scores"].tolist(), rows.tolist()), 1)
              if score >= SURE]
    if not people:
        raise ValueError(f"{photo}: the detector finds no people of a score of {SURE} or more; "
                         f"name their keypoints by --keypoints FILE.json")
    scores = ", ".join(f"{person['score']:.3f}" for person in people)
    say(f"found by torchvision's Keypoint R-CNN: people of scores {scores}")
    H, W = image.shape[1:]
    return {"images": [{"id": 1, "file_name": photo.name, "width": W, "height": H}],
            "categories": [{"id": 1, "name": "person", "keypoints": COCO_NAMES}],
            "annotations": people}


# OpenPose's neck is the shoulders' middle, LSP's is higher: it has a name of its own.
OPENPOSE = ("nose neck_openpose right_shoulder right_elbow right_wrist left_shoulder left_elbow "
            "left_wrist mid_hip right_hip right_knee right_ankle left_hip left_knee left_ankle "
            "right_eye left_eye right_ear left_ear" + 6 * " foot").split()
KEYPOINT_FILES = ("COCO's person keypoints or results, OpenPose's output, or 17 (COCO's order) or "
                  "19 rows of three numbers x, y, visible")
# The order of rows that have no names, by their number.
ORDERS = {17: COCO_NAMES, 19: KEYPOINT_NAMES, 25: OPENPOSE,
          18: [name for name in OPENPOSE[:19] if name != "mid_hip"]}


def annotations_of(content, photo: Path) -> tuple[list, dict, tuple[int, int] | None]:
    """What a keypoint file says of one photo -> COCO's annotations, their points' names as of
    `person_points`, and the size of the labelled picture, if it is said."""
    if isinstance(content, list) and isinstance(content[0], dict):    # COCO results
        ids = {str(row["image_id"]) for row in content}
        wanted = ids if len(ids) == 1 else {re.search(r"0*(\d*)$", photo.stem)[1]}
        return [row for row in content if str(row["image_id"]) in wanted], person_points({}), None
    if isinstance(content, list) or "people" in content:              # rows, or OpenPose's output
        people = [content] if isinstance(content, list) else [
            one.get("pose_keypoints_2d") or one["pose_keypoints"] for one in content["people"]]
        most = np.inf if isinstance(content, list) else 1       # confidences exceed 1 a little
        points = [np.minimum(np.array(one, float).reshape(-1, 3), [np.inf, np.inf, most]).tolist()
                  for one in people]
        names = {"1": ORDERS[len(points[0])]} if points else {}
        return [{"keypoints": rows} for rows in points], names, None
    here = photo.absolute().parts[::-1]
    same = [len(os.path.commonprefix([PurePosixPath(image["file_name"]).parts[::-1], here]))
            for image in content["images"]]             # how many last parts of the paths
    images = [image for image, n in zip(content["images"], same) if n == max(same) > 0]
    if len(images) != 1:
        raise ValueError(f"{len(images)} of its images are called {photo.name}")
    size = images[0].get("width"), images[0].get("height")
    return ([row for row in content["annotations"] if row["image_id"] == images[0]["id"]],
            person_points(content), size if all(size) else None)


def person_of(number: int, rows: np.ndarray, size: tuple[int, int], crop: str) -> Person:
    """rows (19, 3) x, y, visible in whole pixels, in a photo of size W, H -> Person.

    crop: of data.CROPS, or "spin": SPIN's demo has the points' mean in the middle.  Raises
    ValueError: why the person is left out.
    """
    seen = labelled(rows[:, 2]) & (np.abs(rows) < 1e6).all(1)         # (19,) NaN is not below
    if seen.sum() < 6:
        raise ValueError(f"{seen.sum()} labelled points, 6 needed (confidences below {CONFIDENT} "
                         f"do not count)")
    points = torch.from_numpy(np.where(seen[:, None], rows[:, :2] + 0.5, 0)).float()      # (19, 2)
    visible, found = torch.from_numpy(seen).float(), points[seen]     # (19,), (n, 2)
    center, side = person_window(points, visible, crop)               # (2,) raises for a few pixels
    if (found.amax(0) < 0).any() or (found.amin(0) >= torch.tensor(size)).any():
        raise ValueError(f"all points lie outside the photo of {list(size)} pixels, x and y")
    return Person(number, points, visible, found.mean(0) if crop == "spin" else center, side)


def people_of(path: Path, photo: Path, crop: str) -> tuple[Tensor, list[Person | None]]:
    """The photo (3, H, W) in [0, 1], and its people by a keypoint file, in the file's order.

    Crowds and animals do not count.  Who has fewer than 6 labelled points (Sec. 4), is smaller
    than 5 pixels or outside the photo is named, and None.  Raises FileNotFoundError, ValueError.
    """
    say(f"people of {printable(path)}")
    content, people = read_json(path, KEYPOINT_FILES), []
    try:
        rows, names, size = annotations_of(content, photo)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: not understood ({error!s:.99}); expected "
                         f"{KEYPOINT_FILES}") from None
    image = read_picture(photo, size, turn=True).float() / 255        # (3, H, W)
    for row in rows:
        try:
            points, _ = coco_person(row, names)                       # (19, 3)
            people.append(person_of(len(people) + 1, points, image.shape[:0:-1], crop))
        except ValueError as error:
            if error.args != (NOBODY,):
                people.append(None)
                say(printable(f"person {len(people)} is left out: {', '.join(error.args)}"))
    if not any(people):
        raise ValueError(f"{path}: nobody of {photo.name} with 6 labelled points who is 5 pixels "
                         f"large and inside the photo; name another file")
    return image, people


# The diagonal of a person's box (of the skin) over that of the box of the 19 keypoints, from which
# training's crops are made: 1.13 (mean of 512 drawn people, upright clips) to 1.16 (all clips).
BOX = 1.15


def person_in_box(text: str | None, photo: Path, crop: str) -> tuple[Tensor, list[Person]]:
    """--bbox x,y,w,h, or None: all of the photo -> the photo (3, H, W) in [0, 1], and its person.

    crop "spin": SPIN's demo cuts out the box's longer side.  Raises FileNotFoundError, ValueError.
    """
    image = read_picture(photo, turn=True).float() / 255              # (3, H, W)
    H, W = image.shape[1:]
    if not text:
        say("no --bbox and no --keypoints: the whole photo is taken for one person")
        text = f"0,0,{W},{H}"
    with contextlib.suppress(ValueError):
        x, y, w, h = [float(number) for number in text.split(",")]
        length = math.hypot(w, h)
        if min(w, h) > 0 and 5 <= length < math.inf and -w < x < W and -h < y < H:
            center = torch.tensor([x + w / 2, y + h / 2])             # (2,)
            side = max(w, h) if crop == "spin" else 224 / data.CROPS[crop][0] * length / BOX
            return image, [Person(1, torch.zeros(19, 2), torch.zeros(19), center, side)]
    raise ValueError(f"--bbox {text.strip()}: expected four numbers x,y,w,h, a box of at least 5 "
                     f"pixels, not outside the photo of {W} x {H} pixels")


# ============================================================================================
# Not needed to understand HMR: pictures and files, the command line.

def panels(image: Tensor, body: HMROutput, faces: Tensor, person: Person) -> Tensor:
    """input | overlay in the full photo | turned by 90 | by 180 degrees -> (3, h, 2w + 2h).

    body: of one person, drawn by the loss's own camera.  White circles are the given keypoints, red
    discs the body's.  A photo of over 1,024 pixels is shrunk.
    """
    side = max(image.shape[1:])
    L = min(side, 1024)
    h, w = (max(1, round(length * L / side)) for length in image.shape[1:])
    canvas = cut_window(image, torch.full((2,), side / 2), side, L)   # (3, L, L)
    s = body.cam[:, :1] * person.side / side                          # (1, 1)
    shift = (2 * person.center / side - 1) / s                        # (1, 2)
    cam = torch.cat([s, body.cam[:, 1:] + shift], 1)                  # (1, 3) of the canvas
    overlay = data.draw_mesh(body.vertices, faces, cam, L, canvas[None])[0]       # (3, L, L)
    seen, radius = person.visible > 0, max(2.0, h / 150)              # (19,)
    given = person.keypoints[seen] * 2 / side - 1                     # (n, 2)
    canvas, overlay = (draw_points(x, given, (1.0, 1, 1), 1.6 * radius, False)
                       for x in (canvas, overlay))
    overlay = draw_points(overlay, project(body.keypoints3d, cam)[0, seen], radius=radius)
    turned = data.side_view(body.vertices)                            # (1, V, 3)
    turned = torch.cat([turned, data.side_view(turned)])              # (2, V, 3)
    low, high = turned[..., :2].aminmax(dim=1)                        # (2, 2) each
    s = (1.8 / (high - low).max()).expand(2, 1)                       # both fill most of h x h
    views = data.draw_mesh(turned, faces, torch.cat([s, -(low + high) / 2], 1), h)  # (2, 3, h, h)
    return torch.cat([canvas[:, :h, :w], overlay[:, :h, :w], *views], 2)


def perspective(cam: Tensor, size: float) -> tuple[float, Tensor]:
    """The pinhole camera nearest to a weak-perspective one -> f in pixels, translation (3,).

    cam (3,) of a square of `size` pixels about the principal point.  f (X + tx) / (Z + tz) pixels
    are the loss's s (X + tx) size / 2 if |Z| << tz = 2 f / (size s).  f is the official renderer's.
    """
    f = 500 * size / 224
    return f, torch.cat([cam[1:], 2 * f / (size * cam[:1])])          # (3,)


def describe(body: HMROutput, person: Person, size: int) -> dict:
    """One body in numbers.  Camera frame (x right, y down, z away), metres; pixel i of the photo
    covers [i, i + 1), the crop is [-1, 1] in both directions; cameras are s, tx, ty."""
    center, side = person.center, person.side                         # (2,)
    f, translation = perspective(body.cam[0], size)                   # (3,)
    # center + side / 2 * s (X + t) = S (X + t + center / S): S is in pixels a metre
    S = body.cam[0, :1] * side / 2                                    # (1,)
    photo_cam = torch.cat([S, body.cam[0, 1:] + center / S])          # (3,)
    rotmats = body.rotmats[0].double().numpy()                        # (24, 3, 3)
    return {
        "crop_pixels": size, "window": {"center": center, "side": side},
        "camera": {"crop": body.cam[0], "photo": photo_cam},
        "perspective": {"f_crop": f, "f_photo": f * side / size,
                        "principal_point_photo": center, "translation": translation},
        "pose": Rotation.from_matrix(rotmats).as_rotvec(), "betas": body.betas[0],
        "joints3d": body.joints[0], "keypoints3d": body.keypoints3d[0],
        "joints2d_photo": center + side / 2 * project(body.joints, body.cam)[0],      # (24, 2)
        "keypoints2d_photo": center + side / 2 * body.keypoints2d[0]}                 # (19, 2)


def fit_and_print(network: Network, person: Person, weight: float
                  ) -> tuple[Tensor, dict[str, Tensor]]:
    """One person's best fit: Theta (1, 157) and its numbers.  The table shows all headings."""
    device = network.config.device
    target = ((person.keypoints - person.center) * 2 / person.side).to(device)    # (19, 2)
    theta, found = fit(network.model, network.D, target, person.visible.to(device), weight)
    recorded = train.recorded_rotations(train.Config(), device)       # (2M, 23, 9)
    odd = train.monstrosity(network.model.decode(theta), recorded)    # as in train.py's table
    say(f"person {person.number} + {weight} L_adv  60 L_reproj   L_adv  px an axis  outside %  "
        f"mocap deg   heading at the start")
    for row in zip(60 * found["L_kp"], found["L_adv"], 112 * found["L_kp"],
                   odd["outside"].mean(1), odd["mocap"], found["heading"]):
        say("{:33.3f}{:8.2f}{:12.2f}{:11.0f}{:11.0f}{:9.0f}".format(*row))
    return theta[:1], {key: x[0] for key, x in found.items()}


def show(args: argparse.Namespace, network: Network, image: Tensor, person: Person,
         stem: str, numbers: dict) -> bool:
    """One person: find Theta, decode it, write what came out.  Returns: is there a body?"""
    model, size, device = network.model, network.config.size, network.config.device
    if args.fit:
        thetas, found = zip(*[fit_and_print(network, person, weight)
                              for weight in (WEIGHT_ADV, 0.0)[:1 + args.sheet]])
        numbers = numbers | {"fit": found[0]}
    else:
        beyond = "zeros" if network.crop == "spin" else "border"      # the edge is repeated
        crop = cut_window(image, person.center, person.side, size, beyond)        # (3, size, size)
        with torch.inference_mode():
            thetas = [model(crop[None].clamp(0, 1).to(device))[0][-1]]            # (1, 85 or 157)
    with torch.inference_mode():
        bodies = [HMROutput(*(x.cpu() for x in model.decode(theta, vertices=True)))
                  for theta in thetas]
    body, faces, s = bodies[0], model.smpl.faces.cpu(), bodies[0].cam[0, 0]
    if not body.vertices.abs().max() < 1e6 or not 1e-3 < s < 1e6:     # NaN, too
        say(f"person {person.number} is left out: no body found (camera scale {s:.3g})")
        return False
    drawn = [panels(image, one, faces, person) for one in bodies]
    data.save_png(args.out / f"{stem}.png", drawn[0])
    if len(drawn) > 1:
        data.save_png(args.out / f"{stem}_fits.png", torch.cat(drawn, 1))
    # y up, as modelling programs expect: half a turn about x
    save_obj(args.out / f"{stem}.obj", body.vertices[0] * torch.tensor([1.0, -1, -1]), faces)
    numbers = numbers | {"body": model.smpl.name} | describe(body, person, size)
    write_atomically(args.out / f"{stem}.json", json.dumps(
        numbers, indent=1, allow_nan=False, default=lambda array: array.tolist()).encode())
    say(f"wrote {printable(args.out / stem)}.png, .obj, .json" + ", _fits.png" * (len(drawn) > 1))
    return True


def require_free(out: Path, stem: str, sha256: str) -> None:
    """Raises ValueError if a result would take the place of anything but the same photo's."""
    there = [stem + end for end in (".json", ".png", ".obj") if (out / (stem + end)).exists()]
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if not there or read_json(out / f"{stem}.json", "numbers")["photo_sha256"] == sha256:
            return
    raise ValueError(f"--out {out}: {there[0]} there is not of this photo; name another folder")


def run(args: argparse.Namespace) -> None:
    if args.fit and args.bbox:
        raise ValueError("--bbox: --fit needs 2D keypoints; leave --bbox out, and the people are "
                         "found, or name their points by --keypoints FILE.json")
    sha256 = hashlib.sha256(plain_file(args.photo, "a picture").read_bytes()).hexdigest()
    if args.fit:
        config = train.settle(train.Config(device=args.device, rotation="6d"))
        model = HMR(SMPL(args.smpl), depth=18, rotation="6d").eval()  # for `decode`
        network = Network(model.to(config.device), None, config, "official", "no pictures")
    else:
        network = load_network(args.checkpoint, args.smpl, args.device)
    path, stem = args.keypoints, args.photo.stem
    if args.fit and not path:
        path = args.out / f"{stem}_keypoints.json"
        require_free(args.out, path.stem, sha256)
        if not path.exists():
            found = detect(args.photo, config.device) | {"photo_sha256": sha256}
            write_atomically(path, json.dumps(found, indent=1).encode())
    image, people = (people_of(path, args.photo, network.crop) if path else
                     person_in_box(args.bbox, args.photo, network.crop))
    wanted = {stem + f"_{person.number}" * (len(people) > 1): person
              for person in people if person and args.person in (None, person.number)}
    if not wanted:
        raise ValueError(f"--person {args.person}: left out, or not one of the {len(people)} in "
                         f"{args.photo}; name another")
    for stem in wanted:
        require_free(args.out, stem, sha256)
    if args.fit:
        network = network._replace(D=kept_discriminators(model.smpl))
    if network.world.startswith(data.SyntheticPeople.name):
        say("a network trained on drawn people is not expected to work on photographs")
    numbers = {"photo": args.photo.name, "photo_sha256": sha256, "photo_pixels": image.shape[:0:-1]}
    if not any([show(args, network, image, person, stem, numbers)
                for stem, person in wanted.items()]):
        raise ValueError(f"{args.photo}: no body found; name the person by --bbox or --keypoints, "
                         f"or another --checkpoint")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m appendix.photo", allow_abbrev=False,
                                     description="Put bodies over the people in a photo.")
    parser.add_argument("photo", type=Path, metavar="PHOTO", help="picture of people")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--fit", action="store_true", help="fit of Theta to 2D keypoints, which a "
                     "detector finds, unless --keypoints names them")
    how.add_argument("--checkpoint", metavar="FILE", help="a run's checkpoint.pt (`python train.py "
                     "--small` makes runs/small/checkpoint.pt), or SPIN's published weights")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--bbox", metavar="x,y,w,h", help="the person (default: the whole photo)")
    where.add_argument("--keypoints", type=Path, metavar="FILE.json", help=KEYPOINT_FILES)
    parser.add_argument("--person", type=int, metavar="N", help="number of the only person wanted")
    parser.add_argument("--sheet", action="store_true", help="with --fit: STEM_fits.png, which "
                        "shows a second fit, without L_adv, below the first")
    parser.add_argument("--smpl", metavar="FILE", help="body file (default: the checkpoint's)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                        help="device [auto]")
    parser.add_argument("--out", type=Path, default=Path("out/photo"), help="folder of the results")
    # argparse takes -5,40,220,350 for a flag; with a space before it, it is a value
    words = [re.sub(r"^(?=-\d)", " ", word) for word in (sys.argv[1:] if argv is None else argv)]
    args = parser.parse_args(words)
    return exit_status("photo.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
