"""Photographs: crops and cameras, keypoint files, the detector, the command, fits, SPIN's weights.

Fixtures and `close` are test_hmr.py's.
"""

import functools
import json
import math
import re
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import detection, resnet50

import data
import hmr
import train
from appendix import datasets, photo, spin
from hmr import HMR, Discriminator, mean_theta
from smpl import KEYPOINT_NAMES, batch_rodrigues
from test_hmr import (body, close, precision_of_the_encoder,  # noqa: F401 (fixtures)
                      same_numbers_every_time)

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SAMPLE = ASSETS / "000000000785.jpg"
PERSON, = json.loads((ASSETS / "person_keypoints_sample.json").read_text())["annotations"]


def command(*argv) -> int:
    return photo.main([str(word) for word in argv])


@pytest.fixture
def refused(capsys):
    """The command refuses in one line that holds these words, and exits with status 2."""
    def check(argv: list, *words: str) -> None:
        capsys.readouterr()
        assert command(*argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("photo.py: "), error
        assert all(word in error for word in words), f"{words} are not in: {error}"
    return check


def drawn_people(body, size: int, n: int) -> data.Batch:
    """People of the held-out clips, whose truth is known."""
    return data.SyntheticPeople(body, data.load_mocap(True, True), n, size, labels="all",
                                mix=False, seed=5).batch(0)


def picture(path: Path, H=60, W=80, color="black", **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (W, H), color).save(path, **options)
    return path


@pytest.fixture
def one(tmp_path) -> Path:
    return picture(tmp_path / "one.png")


def written(path: Path, content) -> Path:
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")     # a byte order mark
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ============================================================================================
# Crop and photo

def test_the_pinhole_camera_sees_what_the_losses_camera_sees():
    cam, size = torch.tensor([0.9, 0.2, -0.1]), 224
    f, t = photo.perspective(cam, size)
    assert f == 500, "the official renderer's, in pixels"
    X = torch.randn(50, 3) * torch.tensor([1.0, 1, 0])                # flat
    pinhole = f * (X + t)[:, :2] / (X + t)[:, 2:]                     # from the principal point
    close(pinhole, hmr.project(X[None], cam[None])[0] * size / 2, 1e-3, "equal where Z = 0")
    close(photo.perspective(cam, 48)[1], t, 1e-4, "as far away, however fine the crop is")


def test_spins_crop_is_its_demos():
    rows = np.zeros((19, 3))
    rows[:6] = [[60 + 2 * i, 80 - 2 * i * i, 1] for i in range(6)]
    person = photo.person_of(1, rows, (160, 90), "spin")
    close(person.center, [65.5, 80.5 - 55 / 3], 1e-4, "the points' mean")
    assert person.side == pytest.approx(1.2 * 50), "the longer side"


def test_a_box_crop_shows_people_as_large_as_training_does(body, one):
    """A box holds the skin, keypoints lie inside: of the same people, both crops are alike."""
    batch, ratios = drawn_people(body, 16, 64), []
    skin = hmr.project(body(batch.betas, batch.rotmats).vertices, batch.cam)      # (64, V, 2)
    for points, keypoints in zip(30 + 30 * skin, 30 + 30 * batch.keypoints2d):
        low, high = points.aminmax(dim=0)                             # (2,) each
        box = ",".join(map(str, torch.cat([low, high - low]).tolist()))
        _, (in_box,) = photo.person_in_box(box, one, "official")
        rows = np.column_stack([keypoints, np.ones(19)])              # (19, 3)
        ratios.append(in_box.side / photo.person_of(1, rows, (80, 60), "official").side)
    assert 0.95 < sum(ratios) / 64 < 1.05, f"{sum(ratios) / 64:.3f} times the keypoint crop's side"


# ============================================================================================
# Files of keypoints

GOOD = {"image_id": 9, "keypoints": [x for i in range(17) for x in (4 * i, 3 * i, 2)]}


def coco(*people, name="one.png", **more) -> dict:
    return {"images": [{"id": 9, "file_name": name, **more}], "annotations": people}


def people_of(content, file: Path) -> list[photo.Person | None]:
    return photo.people_of(written(file.parent / "points.json", content), file, "official")[1]


def places_of(person: photo.Person, names) -> dict[str, list[float] | None]:
    """Where these keypoints are; None: not labelled."""
    return {name: person.keypoints[k].tolist() if person.visible[k] else None
            for name in names for k in [KEYPOINT_NAMES.index(name)]}


def test_coco_keypoints_are_put_in_order_by_name(tmp_path, capsys):
    names = datasets.COCO_NAMES[::-1]                                 # as the categories say
    wanted = [x for i in range(17) for x in (10 * i, 5 * i, i % 3)]   # 0: not labelled
    rows = [{"iscrowd": 1}, {"keypoints": [0, 0, 0] * 17}, {"keypoints": None}, {"category_id": 2},
            {"keypoints": wanted, "bbox": [5, 6, 0, 8]}, {"keypoints": [3, 4]}, {"image_id": 7}]
    content = coco(*(GOOD | {"id": n} | row for n, row in enumerate(rows, 1)), name="x/b/one.png",
                   width=200, height=100) | {"categories": [
                       {"id": 1, "name": "person", "keypoints": names}]}
    content["images"].append({"id": 7, "file_name": "a/one.png"})     # the path's end says which
    people = people_of(content, picture(tmp_path / "b" / "one.png", 100, 200))
    assert [person and person.number for person in people] == [None, None, 3, None], \
        "people are numbered in the file's order; no crowds, no dogs"
    # COCO counts whole pixels, here pixel i covers [i, i + 1)
    assert places_of(people[2], names) == {name: [10 * i + 0.5, 5 * i + 0.5] if i % 3 else None
                                           for i, name in enumerate(names)}
    printed = capsys.readouterr().out
    for words in ("1 is left out: 0 labelled points", "2 is left out: without keypoints",
                  "4 is left out: broken rows, annotation 6"):
        assert words in printed, words


FLAT = {count: [x for i in range(count) for x in (i, 2 * i, 1.02)] for count in (18, 25)}
LOW = [[i, 2 * i, 0.19 if i == 3 else 0.2] for i in range(17)]


@pytest.mark.parametrize("content, places", [
    ([[i, 2 * i, 1] for i in range(19)], {"right_ankle": 0, "neck": 12, "right_ear": 18}),
    *((x, {"left_ear": None, "left_ankle": 15}) for x in (sum(LOW, []), [
        GOOD, {"image_id": 785, "keypoints": sum(LOW, []), "category_id": 1, "score": 0.9}])),
    *(({"people": [{key: FLAT[count]}]}, {"right_wrist": 4, "left_wrist": 7, "neck": None,
                                          "right_ankle": more, "left_ear": more + 7})
      for count, key, more in ((25, "pose_keypoints_2d", 11), (18, "pose_keypoints", 10)))],
    ids=["19", "51", "results", "BODY_25", "COCO18"])
def test_what_detectors_write_is_read(tmp_path, content, places):
    """Rows, COCO results, OpenPose's JSON; a confidence below 0.2 is no label."""
    person, = people_of(content, picture(tmp_path / "COCO_000785.jpg", 90, 90))
    assert places_of(person, places) == {name: None if i is None else [i + 0.5, 2 * i + 0.5]
                                         for name, i in places.items()}


@pytest.mark.parametrize("content, words", [
    ("[" * 100_000, "not JSON"), (3, "or 19 rows"), ({}, "or 19 rows"), ([], "or 19 rows"),
    ([[1, 2, "x"]] * 17, "or 19 rows"), ([[1, 2, 1]] * 16, "or 19 rows"),
    *(([[4 * i, 3 * i, label] for i in range(17)], "6 labelled") for label in (0, 7)),
    ([[math.nan, 1e39, 1]] * 17, "6 labelled"), ([[1, 2, 1]] * 17, "5 pixels large"),
    ([[99 + 9 * i, 2, 1] for i in range(17)], "inside the photo"),
    (coco(GOOD, name="two.jpg"), "0 of its images are called one.png"),
    (coco(GOOD, width=81, height=60), "81 x 60")])
def test_bad_keypoint_files_end_in_a_sentence(tmp_path, refused, one, content, words):
    bad = tmp_path / "bad.json"
    bad.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    refused([one, "--keypoints", bad, "--fit"], words)


def test_a_photo_is_turned_as_its_labels_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                  # a quarter turn
    one, file = picture(tmp_path / "one.png", exif=exif), tmp_path / "k.json"
    for size, shape in (({}, (80, 60)), (dict(width=60, height=80), (80, 60)),
                        (dict(width=80, height=60), (60, 80))):
        image, _ = photo.people_of(written(file, coco(GOOD, **size)), one, "official")
        assert image.shape[1:] == shape, size


# ============================================================================================
# The detector

def test_the_detector_is_torchvisions_and_says_why_it_is_not_there(monkeypatch, one, refused):
    small = functools.partial(detection.keypointrcnn_resnet50_fpn, min_size=64)   # it is faster
    monkeypatch.setattr(detection, "keypointrcnn_resnet50_fpn", small)
    weights = detection.KeypointRCNN_ResNet50_FPN_Weights
    state = small(weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: state)
    run = [one, "--fit", "--out", one.parent]
    refused(run, "one.png: the detector finds no people")             # by random weights
    for error, words in ((urllib.error.URLError("x"), "no network to reach https://download"),
                         (PermissionError("x"), "cannot be read or written"),
                         (RuntimeError("x"), "is cut or not what its name says")):
        monkeypatch.setattr(weights, "get_state_dict", Mock(side_effect=error))
        refused(run, words, "--keypoints FILE.json")
    assert names_in(one.parent) == ["one.png"]


def finds(device: str):
    """In the detector's place: the sample's person, once for sure and once unsure; no nose."""
    box = torch.tensor(PERSON["bbox"])                                # (4,)
    answer = {"boxes": torch.cat([box[:2], box[:2] + box[2:]]).repeat(2, 1),      # (2, 4)
              "scores": torch.tensor([0.99, 0.89]),
              "keypoints": torch.tensor(PERSON["keypoints"] * 2).float().view(2, 17, 3),
              "keypoints_scores": torch.tensor([[1.9] + [2.1] * 16] * 2)}         # (2, 17)
    return lambda images: [answer]


def test_the_people_of_a_photo_are_found_fitted_and_drawn(tmp_path, monkeypatch, judge, refused,
                                                          capsys):
    fit, stem, targets, out = photo.fit, SAMPLE.stem, [], tmp_path / "a"
    monkeypatch.setattr(photo, "kept_discriminators", lambda smpl: judge)
    monkeypatch.setattr(photo, "load_detector", finds)
    monkeypatch.setattr(photo, "fit", lambda *args: targets.append(args[2]) or fit(
        *args, headings=2, steps=3))
    assert command(SAMPLE, "--fit", "--sheet", "--out", out) == 0
    assert names_in(out) == [stem + end for end in (".json", ".obj", ".png", "_fits.png",
                                                    "_keypoints.json")]
    found, printed = out / f"{stem}_keypoints.json", capsys.readouterr().out
    assert "Keypoint R-CNN: people of scores 0.990" in printed
    assert printed.count("px an axis") == 2 and printed.count("+ 0.0 L_adv") == 1
    first, both = (datasets.read_picture(out / f"{stem}{end}.png") for end in ("", "_fits"))
    assert torch.equal(both[:, :425], first) and both.shape == (3, 850, first.shape[2])
    assert not torch.equal(both[:, 425:], first), "below: without L_adv"
    x, y = map(int, json.loads((out / f"{stem}.json").read_text())["keypoints2d_photo"][0])
    assert first[:, y, 640 + x].tolist() == [255, 51, 51], "a red disc at the body's right ankle"
    assert (first[:, 345, 396] == 255).all(), "a white circle about the given right ankle"
    # what was found
    row, = json.loads(found.read_text())["annotations"]
    expected = torch.tensor(PERSON["keypoints"]).view(17, 3)
    expected[0, 2] = 0                                                # the nose's label
    close(torch.tensor(row["keypoints"]).view(17, 3), expected, 0, "x, y, label")
    close(row["bbox"], PERSON["bbox"], 0.051, "x, y, w, h with one decimal")
    image, (person,) = photo.people_of(found, SAMPLE, "official")
    _, points = datasets.crop_person(image, person.keypoints, person.visible)     # (19, 2)
    close(targets[0] * person.visible[:, None], points, 1e-5, "it is fitted to the crop's points")
    # a point that is mended by hand is used by the next run, which needs no detector
    monkeypatch.setattr(photo, "load_detector", None)
    found.write_text(found.read_text().replace("399.0", "380.0"))
    assert command(SAMPLE, "--fit", "--out", out) == 0
    assert not targets[-1].equal(targets[0])
    (out / f"{stem}.json").unlink()
    refused([picture(tmp_path / SAMPLE.name), "--fit", "--out", out], found.name)


# ============================================================================================
# The command

@pytest.fixture
def network_of(monkeypatch, body):
    """The command loads a network that gives these Thetas (none: two means), -> its `forward`."""
    def load(*answers: Tensor, world="photographs", crop="official") -> Mock:
        model, mean = HMR(body, depth=18, rotation="6d"), mean_theta(body.mean_pose, "6d")
        model.forward = Mock(side_effect=[([0 * theta, theta], None)              # the last counts
                                          for theta in answers or (mean, mean)])
        monkeypatch.setattr(photo, "load_network", lambda *args: spin.Network(
            model, None, train.Config(size=64, device="cpu"), crop, world))
        return model.forward
    return load


def test_a_photo_becomes_a_picture_a_mesh_and_numbers(tmp_path, network_of, body):
    """Told the Theta of a drawn person in the photo, the command gives back her pixels."""
    batch, out = drawn_people(body, 16, 1), tmp_path / "out"
    one, place = picture(tmp_path / "one.png", 300, 1280, "white"), torch.tensor([214.0, 84])
    truth = place + 64 * batch.keypoints2d[0]                         # (19, 2) pixels of the photo
    S, t = 64 * batch.cam[:, :1], batch.cam[:, 1:] + place / (64 * batch.cam[:, :1])
    theta = torch.cat([batch.cam, batch.rotmats[..., :2].flatten(1), batch.betas], 1)   # (1, 157)
    network_of(theta, crop="spin")                                    # a box is the crop itself
    assert command(one, "--checkpoint", "any", "--out", out, "--bbox", "150,20,128,128") == 0
    numbers = json.loads((out / "one.json").read_text(encoding="utf-8"))
    close(numbers["keypoints2d_photo"], truth, 0.01, "the photo's pixels")
    close(batch_rodrigues(torch.tensor(numbers["pose"])), batch.rotmats[0], 1e-5, "axis-angle")
    close(numbers["betas"], batch.betas[0], 1e-6, "betas")
    close(numbers["keypoints3d"], batch.keypoints3d[0], 1e-5, "metres, camera frame")
    close(numbers["camera"]["photo"], torch.cat([S, t], 1)[0], 1e-3, "its camera")
    p = numbers["perspective"]
    flat = batch.keypoints3d[0] * torch.tensor([1.0, 1, 0]) + torch.tensor(p["translation"])
    close(p["f_photo"] * flat[:, :2] / flat[:, 2:] + torch.tensor(p["principal_point_photo"]),
          truth, 0.02, "the pinhole of the whole photo, where Z = 0")
    vertices = body(batch.betas, batch.rotmats).vertices              # (1, V, 3)
    mesh = np.loadtxt(out / "one.obj", usecols=(1, 2, 3), max_rows=vertices.shape[1])
    close(mesh.tolist(), vertices[0] * torch.tensor([1.0, -1, -1]), 1e-5, "metres, y up")
    # a photo of more than 1,024 pixels is shrunk: input, overlay, two views
    drawn = datasets.read_picture(out / "one.png").float() / 255
    assert drawn.shape == (3, 240, 1024 + 1024 + 240 + 240) and (drawn[..., :1024] == 1).all()
    rows, columns = (drawn[..., 1024:2048].amin(0) < 0.9).nonzero(as_tuple=True)
    skin = 0.8 * S * (vertices[0, :, :2] + t)                         # (V, 2)
    found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    # anti-aliased: a pixel's edge may be drawn too pale to count
    close(found, torch.cat(skin.aminmax(dim=0)), 1.5, "the silhouette's box, pixels")
    for view in drawn[..., 2048:].split(240, 2):
        assert 120 < (view.amin(0) < 0.9).any(1).sum() <= 240, "turned views fill their square"


@pytest.mark.parametrize("world, crop, side, beyond", [
    ("drawn people, in capes", "official", 224 / 150 * 50 / 1.15, 1), ("people", "spin", 40, 0)])
def test_a_whole_photo_or_a_box_is_shown_as_in_training(tmp_path, network_of, capsys, world, crop,
                                                        side, beyond):
    one, out = picture(tmp_path / "one.png", color="white"), tmp_path / "out"
    forward = network_of(world=world, crop=crop)
    assert command(one, "--checkpoint", "any", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "the whole photo is taken for one person" in printed
    assert ("drawn people is not expected to work" in printed) == (crop == "official")
    assert command(one, "--checkpoint", "any", "--out", out, "--bbox", "-5,-5,30,40") == 0
    window = json.loads((out / "one.json").read_text())["window"]
    assert window == {"center": [10, 15], "side": pytest.approx(side)}
    seen, = forward.call_args.args                                    # (1, 3, 64, 64)
    close(seen[..., :9], float(beyond), 1e-3, "the edge is repeated, but SPIN sees black")
    close(seen[..., 9:, 32:], 1.0, 1e-3, "the white photo")


def test_every_person_has_files_of_its_own(tmp_path, one, body, network_of, refused, capsys):
    run = [one, "--checkpoint", "any", "--keypoints", written(tmp_path / "k.json", coco(
        GOOD, {"image_id": 9}, GOOD)), "--out"]
    every = [f"one_{n}.{end}" for n in (1, 3) for end in ("json", "obj", "png")]
    theta = mean_theta(body.mean_pose, "6d")
    behind, nan = theta.clone(), theta.clone()
    behind[:, 0], nan[:, 50] = -1, math.nan
    for folder, answers, more, names, words in (
            ("all", (theta, theta), [], every, "person 2 is left out: without keypoints"),
            ("third", (theta,), ["--person", 3], every[3:], "one_3.png"),
            ("behind", (behind, theta), [], every[3:], "person 1 is left out: no body found")):
        network_of(*answers)
        assert command(*run, tmp_path / folder, *more) == 0
        assert names_in(tmp_path / folder) == names and words in capsys.readouterr().out
    network_of(behind, nan)
    refused([*run, tmp_path / "none"], "one.png: no body found")
    for n in (2, 4):
        refused([*run, tmp_path, "--person", n], f"--person {n}", "of the 3 in")


def test_bad_options_end_in_a_sentence_and_overwrite_nothing(tmp_path, one, network_of, refused):
    run, before, rows = ["--checkpoint", "x"], one.read_bytes(), written(
        tmp_path / "one.json", GOOD["keypoints"])
    with pytest.raises(SystemExit):
        command(one)                              # neither --fit nor --checkpoint
    for argv, words in ((["--fit", "--bbox", "0,0,9,9"], "--keypoints"), (run, "no such file"),
                        (["--checkpoint", one], "not a readable")):
        refused([one, *argv], words)
    network_of()
    for argv, words in (
            (["--keypoints", tmp_path], "a folder"),
            (["--out", tmp_path, "--keypoints", rows], "one.json there is not of this photo"),
            *((["--bbox", box], f"--bbox {box}: expected four numbers")
              for box in ("1,2,3", "a,2,3,4", "0,0,1,1", "0,0,0,9", "nan,0,9,9", "0,0,inf,9",
                          "90,0,9,9", "-20,0,9,9"))):
        refused([one, *run, *argv], words)
    assert one.read_bytes() == before and names_in(tmp_path) == ["one.json", "one.png"]
    run += ["--out", tmp_path / "c"]
    assert command(one, *run) == 0 and command(one, *run) == 0, "the same photo may again"
    refused([picture(tmp_path / "b" / "one.png", 61), *run], "one.json there is not of")


# ============================================================================================
# --fit

@pytest.fixture(scope="module")
def judge(body) -> Discriminator:
    return photo.train_discriminators(body, steps=160, N=32)


def test_a_fit_finds_the_keypoints_and_the_adversary_keeps_it_a_person(body, judge):
    """Fig. 5's monsters: keypoints alone are met better, by bodies that nobody's is."""
    batch, visible, odd = drawn_people(body, 16, 3), torch.ones(19), []
    visible[[12, 13]] = 0                                             # as in COCO
    model = HMR(body, depth=18, rotation="6d").eval()
    recorded = train.recorded_rotations(train.Config(), "cpu")
    for weight in (photo.WEIGHT_ADV, 0):
        best = []
        for keypoints in batch.keypoints2d:
            thetas, found = photo.fit(model, judge, keypoints, visible, weight, 2, 100)
            best.append(thetas[:1])
            out = model.decode(thetas[:1])
            close(found["L_kp"][0], hmr.keypoint_loss(out.keypoints2d, keypoints[None],
                                                      visible[None]), 1e-5, "Eq. (3)")
            close(found["L_adv"][0], hmr.encoder_adversarial_loss(
                judge(out.rotmats[:, 1:], out.betas)), 1e-4, "Eq. (7)")
            close(found["loss"], 60 * found["L_kp"] + weight * found["L_adv"], 1e-4, "Eq. (1)")
            assert (found["loss"].diff() >= 0).all(), "the best comes first"
            assert found["L_kp"][0] < 0.01, f"{112 * found['L_kp'][0]:.1f} pixels off"
        odd.append(train.monstrosity(model.decode(torch.cat(best)), recorded))
    for measure in ("outside", "mocap"):
        a, b = (x[measure].mean().item() for x in odd)
        assert a < 0.75 * b, f"{measure}: {a:.1f} with the adversary, {b:.1f} without"


def test_the_judges_tell_spoiled_bodies_apart_and_are_kept(body, judge, tmp_path, monkeypatch,
                                                           capsys):
    world = data.SyntheticPeople(body, data.load_mocap(False, False), 2, 2, seed=3)
    rotmats, betas = world.motion(300, 0)
    spoiled, spoiled_betas = photo.spoil(rotmats, betas, world.generator(0, 2))
    close(spoiled @ spoiled.mT, torch.eye(3).expand(300, 23, 3, 3), 1e-5, "rotations stay ones")
    same = (spoiled - rotmats).abs().amax((2, 3)) < 1e-6              # (300, 23)
    assert 0.3 < same.float().mean() < 0.7, "half of all joints are left alone, on average"
    with torch.no_grad():
        real, fake = judge(rotmats, betas), judge(spoiled, spoiled_betas)
    # the shape's, which has 176 parameters, takes longer to learn
    assert (real.mean(0) > fake.mean(0))[:24].all(), "each tells them apart, on average"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def weights(steps: int = 2) -> Tensor:
        torch.rand(1)                                                 # the seed is its own
        return next(photo.kept_discriminators(body, steps=steps, N=8).parameters())
    first, second = weights(), weights()
    kept, = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:999])                         # a broken file is made anew
    assert torch.equal(first, second) and torch.equal(first, weights())
    printed = capsys.readouterr().out
    assert printed.count("trained once") == 2 and printed.count("25 discriminators of") == 1
    weights(1)
    assert len(names_in(tmp_path)) == 2, "another training has another name"


# ============================================================================================
# SPIN's published weights

@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A file in the layout of SPIN's checkpoint, with numpy's numbers, as torch 1.1 wrote it.

    Random numbers under the published names: all are views of one storage, a small file.
    """
    noise = 0.05 * torch.randn(3_000_000)
    network = resnet50().state_dict() | spin.SpinRegressor().state_dict()
    weights = {name: noise[:x.numel()].view(x.shape) for name, x in network.items()
               if not re.search(r"^fc\.|num_batches_tracked", name)}  # counters came later
    path = tmp_path_factory.mktemp("spin") / "model_checkpoint.pt"
    torch.save({"model": weights, "epoch": np.int64(3), "batch_size": 64,
                "dataset_perm": np.arange(5), "total_step_count": np.float64(7.0)}, path,
               _use_new_zipfile_serialization=False)
    return path, weights


def test_spins_regressor_is_spins(published, capsys):
    """The regressor from its description.  ResNet and 6D rotations are the chapter's."""
    path, weights = published
    model, _, config, crop, _ = spin.load_network(path, device="cpu")
    assert "SPIN was trained with SMPL's neutral body" in capsys.readouterr().out
    assert not model.training and (config.size, crop) == (224, "spin")
    assert torch.equal(model.encoder.layer4[2].conv3.weight, weights["layer4.2.conv3.weight"])
    assert weights["fc1.weight"].shape == (1024, 2048 + 144 + 10 + 3)
    feature = torch.rand(2, 2048)
    pose, shape, cam = (weights[f"init_{name}"].expand(2, -1) for name in ("pose", "shape", "cam"))

    def layer(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    thetas = model.regressor(feature)
    assert len(thetas) == 3
    for theta in thetas:
        x = layer("fc2", layer("fc1", torch.cat([feature, pose, shape, cam], 1)))     # (2, 1024)
        pose, shape, cam = (old + layer(name, x) for old, name in (
            (pose, "decpose"), (shape, "decshape"), (cam, "deccam")))
        close(theta, torch.cat([cam, pose, shape], 1), 1e-3, "a ReLU, the order of Theta?")


def test_what_differs_from_spins_layout_is_listed(published, tmp_path):
    good = {f"module.{name}": x for name, x in published[1].items()}
    short = {name: x for name, x in good.items() if name != "module.fc2.bias"}
    for weights, words in (
            (short | {"module.fc9.weight": torch.zeros(2)}, ".*fc2.bias.*fc9.weight"),
            (good | {"module.deccam.bias": torch.full((3,), math.nan)}, "deccam.bias holds NaN"),
            ({"fc1.weight": torch.zeros(2)}, "not a checkpoint")):
        torch.save({"model": weights}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=f"bad.pt.*{words}"):
            spin.load_network(tmp_path / "bad.pt")
