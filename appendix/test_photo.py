"""Photographs: crops and cameras there and back, keypoint files, fits, SPIN's weights.

Fixtures and `close` are test_hmr.py's.
"""

import io
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import data
import hmr
import train
from appendix import datasets, photo, spin
from hmr import HMR, Discriminator
from smpl import KEYPOINT_NAMES, SMPL, batch_rodrigues, rot6d_to_rotmat
from test_hmr import (body, close, precision_of_the_encoder,  # noqa: F401 (fixtures)
                      same_numbers_every_time, tiny)

HERE = Path(__file__).resolve().parent.parent
WINDOW = photo.Window(torch.tensor([210.0, 95.0]), 140.0)


def is_sentence(argv: list, capsys, *words: str) -> None:
    """The command refuses in one line that holds these words, and exits with status 2."""
    capsys.readouterr()
    assert photo.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("photo.py: "), error
    for word in words:
        assert word in error, f"{word!r} is not in: {error}"


def drawn_people(body, size: int = 224, n: int = 2) -> data.Batch:
    """People of the held-out clips, whose truth is known."""
    world = data.SyntheticPeople(body, data.load_mocap(True, True), n, size, labels="all",
                                 mix=False, seed=5)
    return world.batch(0)


# ============================================================================================
# Crop and photo


def test_points_and_cameras_go_to_the_photo_and_back():
    points = torch.tensor([[0.0, 0], [-1, -1], [1, 1], [0.5, -2]])
    close(photo.to_photo(points, WINDOW),
          [[210, 95], [140, 25], [280, 165], [245, -45]], 1e-4, "centre, corners, beyond")
    close(photo.to_crop(photo.to_photo(points, WINDOW), WINDOW), points, 1e-6, "there and back")
    X = torch.randn(2, 30, 3)
    cam = torch.tensor([[0.8, 0.1, -0.3], [1.7, -0.2, 0.4]])
    moved = photo.camera_of_photo(cam, WINDOW)
    close(moved[:, None, :1] * (X[..., :2] + moved[:, None, 1:]),
          photo.to_photo(hmr.project(X, cam), WINDOW), 1e-3, "one camera, in the photo's pixels")
    close(photo.camera_of_crop(moved, WINDOW), cam, 1e-6, "there and back")


def test_the_pinhole_camera_sees_what_the_losses_camera_sees():
    cam, size = torch.tensor([0.9, 0.2, -0.1]), 224
    f, t = photo.perspective(cam, size)
    assert f == 500 and abs(t[2].item() - 2 * 500 / (224 * 0.9)) < 1e-4
    X = torch.randn(50, 3)
    flat = X * torch.tensor([1.0, 1, 0])
    pinhole = f * (flat + t)[:, :2] / (flat + t)[:, 2:]               # from the principal point
    close(pinhole, hmr.project(flat[None], cam[None])[0] * size / 2, 1e-3, "equal where Z = 0")
    deep = f * (X + t)[:, :2] / (X + t)[:, 2:]
    # f x / (tz + Z) = f x / tz * 1 / (1 + Z / tz)
    close(deep * (1 + X[:, 2:] / t[2]), pinhole, 1e-2, "elsewhere off by 1 + Z / tz alone")
    f48, t48 = photo.perspective(cam, 48)
    close(t48, t, 1e-4, "the distance does not depend on how finely the crop is sampled")
    assert abs(f48 - 500 * 48 / 224) < 1e-9


def test_a_keypoint_crop_is_crop_persons():
    image, keypoints, visible = torch.rand(3, 90, 160), torch.zeros(19, 2), torch.zeros(19)
    for name, xy in (("right_ankle", (60, 80)), ("left_hip", (70, 50)), ("nose", (72, 12))):
        k = KEYPOINT_NAMES.index(name)
        keypoints[k], visible[k] = torch.tensor(xy).float(), 1
    for size in (224, 64):                    # magnified, and shrunk with a low-pass
        expected, points = datasets.crop_person(image, keypoints, visible, size)
        window = photo.keypoint_window(keypoints, visible)
        close(photo.cut(image, window, size), expected, 1e-5, "the same picture")
        close(photo.to_crop(keypoints, window)[visible > 0], points[visible > 0], 1e-5, "points")


def test_a_box_crop_shows_people_as_large_as_training_does(body):
    """A box holds the skin, keypoints lie inside: of the same people, both crops are alike."""
    batch, ratios = drawn_people(body, 16, 64), []
    skin = hmr.project(body(batch.betas, batch.rotmats).vertices, batch.cam)      # (64, V, 2)
    for points, keypoints in zip(skin, batch.keypoints2d):
        low, high = (f(100 * points, 0) for f in (torch.amin, torch.amax))
        by_box = photo.box_window(torch.cat([low, high - low]))
        size = (100 * (keypoints.amax(0) - keypoints.amin(0))).norm()
        ratios.append(by_box.side / (224 / 150 * size))
    assert 0.95 < sum(ratios) / 64 < 1.05, f"{sum(ratios) / 64:.3f} times the keypoint crop's side"


def test_a_tight_crop_is_closer(monkeypatch):
    monkeypatch.setattr(data, "CROPS", {"official": (150, 20, 0.8, 1.23),
                                        "tight": (212, 4, 0.95, 1.05)}, raising=False)
    keypoints, visible = 100 * torch.rand(19, 2), torch.ones(19)
    for make in (lambda kind: photo.keypoint_window(keypoints, visible, kind),
                 lambda kind: photo.box_window(torch.tensor([5.0, 5, 40, 90]), kind)):
        assert abs(make("official").side / make("tight").side - 212 / 150) < 1e-5


def test_a_window_beyond_the_photo_repeats_its_edge_or_is_black():
    image = torch.ones(3, 20, 30)
    corner = photo.Window(torch.tensor([0.0, 0]), 40.0)
    close(photo.cut(image, corner, 32), torch.ones(3, 32, 32), 1e-5, "its edge")
    black = photo.cut(image, corner._replace(outside="zeros"), 32)
    assert (black[:, :15] == 0).all() and (black[:, :, :15] == 0).all()
    close(black[:, 17:31, 17:], torch.ones(3, 14, 15), 1e-5, "the photo")


@pytest.mark.parametrize("H, W", [(425, 640), (640, 425), (900, 2048)])
def test_the_overlay_lies_where_the_camera_says(body, H, W):
    batch = drawn_people(body, 16, 1)
    window = photo.Window(torch.tensor([0.6 * W, 0.45 * H]), 0.8 * H)
    b = body(batch.betas, batch.rotmats)
    out = hmr.HMROutput(batch.rotmats, batch.betas, batch.cam, b.joints, b.keypoints,
                        batch.keypoints2d, b.vertices)
    drawn = photo.panels(torch.ones(3, H, W), out, body.faces, window, None)
    factor = min(1, 1024 / max(H, W))
    h, w = round(factor * H), round(factor * W)
    assert drawn.shape == (3, h, 2 * w + 2 * h)
    assert (drawn[:, :, :w] == 1).all(), "the input comes first"
    rows, columns = (drawn[:, :, w:2 * w].amin(0) < 0.9).nonzero(as_tuple=True)
    skin = factor * photo.to_photo(hmr.project(b.vertices, batch.cam)[0], window)
    found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    # anti-aliased: a pixel's edge may be drawn too pale to count
    close(found, torch.cat([skin.amin(0), skin.amax(0)]), 1.5, "the silhouette's box, pixels")
    for turned in drawn[:, :, 2 * w:].split(h, 2):
        drawn_rows = (turned.amin(0) < 0.9).any(1).sum()
        assert 0.5 * h < drawn_rows <= h, "turned views fill their square"


# ============================================================================================
# Files: photos


def save(path: Path, array: np.ndarray, mode=None, **options) -> Path:
    Image.fromarray(array, mode).save(path, **options) if mode else \
        Image.fromarray(array).save(path, **options)
    return path


def test_photos_of_every_kind_are_read(tmp_path):
    grey = np.full((4, 6), 100, np.uint8)
    for path in (save(tmp_path / "grey.jpg", grey), save(tmp_path / "grey.png", grey)):
        close(photo.read_photo(path), torch.full((3, 4, 6), 100 / 255), 0.01, path.name)
    color = np.zeros((4, 6, 4), np.uint8)
    color[..., 0], color[..., 3] = 200, 10
    rgba = photo.read_photo(save(tmp_path / "rgba.png", color))
    close(rgba[:, 0, 0], [200 / 255, 0, 0], 1e-6, "alpha is dropped")
    deep = photo.read_photo(save(tmp_path / "16.png", np.full((4, 6), 30000, np.uint16)))
    close(deep, torch.full((3, 4, 6), 30000 / 65535), 1e-4, "16 bits")
    turned = np.zeros((16, 32, 3), np.uint8)
    turned[:, :16] = 255                                              # left half white
    exif = Image.Exif()
    exif[0x0112] = 6                          # the camera was held upright: turn it clockwise
    image = photo.read_photo(save(tmp_path / "turned.jpg", turned, exif=exif))
    assert image.shape == (3, 32, 16) and image[:, :14].min() > 0.9 and image[:, 18:].max() < 0.1


def test_photos_that_are_none_end_in_a_sentence(tmp_path, capsys):
    whole = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(whole, "JPEG")
    for name, content in (("empty.jpg", b""), ("text.jpg", b"hello"),
                          ("cut.jpg", whole.getvalue()[:300])):
        (tmp_path / name).write_bytes(content)
        is_sentence([tmp_path / name, "--fit", "--keypoints", "x"], capsys, name, "not a readable")
    is_sentence([tmp_path / "absent.png"], capsys, "absent.png", "no such photo")


# ============================================================================================
# Files: keypoints


def coco_file(path: Path, people: list[dict], name="one.jpg", **image) -> Path:
    """A COCO annotation file of two pictures, the second one's people are `people`."""
    images = [{"id": 7, "file_name": "other.jpg"}, {"id": 9, "file_name": name, **image}]
    annotations = [{"image_id": 7, "keypoints": [1, 1, 2] * 17, "iscrowd": 0, "bbox": [0, 0, 9, 9]}]
    annotations += [{"image_id": 9, "iscrowd": 0} | person for person in people]
    path.write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
    return path


def test_coco_keypoints_are_put_in_order_by_name(tmp_path):
    rows = [[10 * i, 5 * i, i % 3] for i in range(17)]
    crowd = {"keypoints": [3, 3, 2] * 17, "iscrowd": 1}
    empty = {"keypoints": [0, 0, 0] * 17, "bbox": [1, 2, 3, 4]}
    file = coco_file(tmp_path / "k.json", [
        crowd, empty, {"keypoints": sum(rows, []), "bbox": [5, 6, 70, 80]}], width=200, height=100)
    person, = photo.read_keypoints(file, Path("folder/one.jpg"), (200, 100))
    assert person.number == 2, "people are numbered in the file's order, crowds are none"
    close(person.box, [5, 6, 70, 80], 0, "its box")
    for name, coco in (("nose", 0), ("left_eye", 1), ("right_ear", 4), ("left_shoulder", 5),
                       ("right_wrist", 10), ("left_hip", 11), ("right_ankle", 16)):
        k = KEYPOINT_NAMES.index(name)
        assert person.visible[k] == (coco % 3 > 0), f"{name}: 1 and 2 are labelled, 0 is not"
        if person.visible[k]:
            close(person.keypoints[k], [10 * coco + 0.5, 5 * coco + 0.5], 0,
                  f"{name}: COCO counts whole pixels, here pixel i covers [i, i + 1)")
    for name in ("neck", "head_top"):
        assert person.visible[KEYPOINT_NAMES.index(name)] == 0, f"COCO has no {name}"
    assert (person.keypoints[person.visible == 0] == 0).all()


def test_plain_lists_of_17_and_19_rows(tmp_path):
    file = tmp_path / "k.json"
    rows = [[i, 2 * i, 1] for i in range(19)]
    file.write_text(json.dumps(rows))
    person, = photo.read_keypoints(file, Path("p.jpg"), (50, 50))
    close(person.keypoints, torch.tensor(rows)[:, :2] + 0.5, 0, "19 rows are in our order")
    close(person.box, [0.5, 0.5, 18, 36], 1e-6, "without a box: the labelled points'")
    file.write_text(json.dumps(rows[:17]))
    person, = photo.read_keypoints(file, Path("p.jpg"), (50, 50))
    close(person.keypoints[KEYPOINT_NAMES.index("left_ankle")], [15.5, 30.5], 0, "17: COCO's order")


def test_bad_keypoint_files_end_in_a_sentence(tmp_path, capsys):
    save(tmp_path / "one.jpg", np.zeros((50, 60, 3), np.uint8))
    good = {"keypoints": [1, 2, 2] * 17, "bbox": [0, 0, 9, 9]}
    nan = {**good, "keypoints": [math.nan, 2, 2] * 17}
    short = {**good, "keypoints": [1, 2, 2] * 16}
    cases = {
        "": "not JSON", "[[1, 2": "not JSON", "3": "neither COCO's", "{}": "neither COCO's",
        "[[1, 2, 1], [3]]": "17 (COCO's order) or 19 rows", "[]": "17 (COCO's order)",
        json.dumps([[1, 2, "x"]] * 17): "17 (COCO's order)",
        json.dumps([[1, 2, 1]] * 18): "17 (COCO's order)",
        json.dumps([[1, 2, 0]] * 17): "nobody with 6 labelled points",
        json.dumps([[1, 2, 1]] * 17): "who is 5 pixels large",        # all on one spot
        "[" * 100_000: "not JSON"}
    for n, (people, image, words) in enumerate((
            ([nan], {}, "three numbers"), ([short], {}, "17 (COCO's order)"),
            ([{}], {}, "neither COCO's"), ([], {}, "nobody with 6"),
            ([{**good, "bbox": [0, 0, 0, 9]}], {}, "bbox"),
            ([good], {"width": 61, "height": 50}, "61 x 50"))):
        cases[coco_file(tmp_path / f"{n}.json", people, **image).read_text()] = words
    cases[coco_file(tmp_path / "n.json", [good], name="two.jpg").read_text()] = \
        "0 of its images are called one.jpg"
    for text, words in cases.items():
        (tmp_path / "bad.json").write_text(text, encoding="utf-8")
        is_sentence([tmp_path / "one.jpg", "--keypoints", tmp_path / "bad.json", "--fit"], capsys,
                    "bad.json", words)
    is_sentence([tmp_path / "one.jpg", "--keypoints", tmp_path / "absent.json", "--fit"], capsys,
                "absent.json", "no such file")
    file = coco_file(tmp_path / "two.json", [good, good])
    for n in (0, 3):
        is_sentence([tmp_path / "one.jpg", "--keypoints", file, "--fit", "--person", n], capsys,
                    f"--person {n}", "has 2")


def test_the_sample_is_read_and_cropped():
    """The one photograph of this project: COCO val2017's image 785."""
    path = HERE / "assets" / "000000000785.jpg"
    image = photo.read_photo(path)
    assert image.shape == (3, 425, 640)
    person, = photo.read_keypoints(HERE / "assets" / "person_keypoints_sample.json", path,
                                   (640, 425))
    assert person.visible.sum() == 17
    close(person.keypoints[KEYPOINT_NAMES.index("nose")], [367.5, 81.5], 0, "as in the file, + 0.5")
    close(person.keypoints[KEYPOINT_NAMES.index("right_ankle")], [396.5, 341.5], 0, "the same")
    by_points = photo.keypoint_window(person.keypoints, person.visible)
    by_box = photo.box_window(person.box)
    ratio = by_box.side / by_points.side
    assert 1.07 < ratio < 1.09, f"the box, which holds clothes and gloves, gives {ratio:.3f}"


# ============================================================================================
# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A run of one step."""
    out = tmp_path_factory.mktemp("run")
    train.train(tiny(out, steps=1, rotation="6d"))
    return out / "checkpoint.pt"


class Knows(HMR):
    """A network that answers with the truth, and keeps what it was shown."""

    def __init__(self, smpl: SMPL, theta: Tensor):
        super().__init__(smpl, depth=18, rotation="6d")
        self.answer, self.seen = theta, []

    def forward(self, images):
        self.seen.append(images)
        return [self.answer], None


def test_a_photo_becomes_a_picture_a_mesh_and_numbers(tmp_path, monkeypatch, body):
    """A drawn person is pasted into a photo; told its Theta, the command gives back its pixels."""
    batch = drawn_people(body, 128, 1)
    corner, side = torch.tensor([150.0, 20]), 128
    image = torch.full((3, 200, 400), 0.5)
    image[:, 20:148, 150:278] = batch.image[0]
    data.save_png(tmp_path / "one.png", image)
    truth = (batch.keypoints2d[0] + 1) * side / 2 + corner            # (19, 2) pixels of the photo
    box = torch.cat([truth.amin(0), truth.amax(0) - truth.amin(0)])
    window = photo.box_window(box)
    S = batch.cam[:, :1] * side / 2                                   # pixel = S (X + t)
    in_photo = torch.cat([S, batch.cam[:, 1:] + (corner + side / 2) / S], 1)
    theta = torch.cat([photo.camera_of_crop(in_photo, window),
                       batch.rotmats[..., :2].flatten(1), batch.betas], 1)
    network = Knows(body, theta)
    monkeypatch.setattr(photo, "load_network", lambda *args: (network, None, train.Config(size=64)))
    assert photo.main([str(tmp_path / "one.png"), "--checkpoint", "any", "--out",
                       str(tmp_path / "out"), f"--bbox={','.join(map(str, box.tolist()))}"]) == 0
    seen, = network.seen
    assert seen.shape == (1, 3, 64, 64)
    numbers = json.loads((tmp_path / "out" / "one.json").read_text(encoding="utf-8"))
    close(numbers["keypoints2d_photo"], truth, 0.01, "the photo's pixels")
    close((torch.tensor(numbers["keypoints2d_crop"]) + 1) * 32,
          (truth - window.center) * 64 / window.side + 32, 0.01, "the crop's")
    close(batch_rodrigues(torch.tensor(numbers["pose"])), batch.rotmats[0], 1e-5, "axis-angle")
    close(numbers["betas"], batch.betas[0], 1e-6, "betas")
    close(numbers["keypoints3d"], batch.keypoints3d[0], 1e-5, "metres, camera frame")
    s, tx, ty = numbers["camera"]["photo"]
    close(s * (batch.keypoints3d[0, :, :2] + torch.tensor([tx, ty])), truth, 0.01, "its camera")
    p = numbers["perspective"]
    assert abs(p["f_crop"] - 500 * 64 / 224) < 1e-9
    flat = batch.keypoints3d[0] * torch.tensor([1.0, 1, 0]) + torch.tensor(p["translation"])
    close(p["f_photo"] * flat[:, :2] / flat[:, 2:] + torch.tensor(p["principal_point_photo"]),
          truth, 0.02, "the pinhole of the whole photo, where Z = 0")
    picture = photo.read_photo(tmp_path / "out" / "one.png")
    assert picture.shape == (3, 200, 400 + 400 + 200 + 200)
    close(picture[:, :, :400], image, 0.01, "the input comes first")
    lines = (tmp_path / "out" / "one.obj").read_text().splitlines()
    v = torch.tensor([[float(x) for x in line.split()[1:]] for line in lines if line[0] == "v"])
    expected = body(batch.betas, batch.rotmats).vertices[0] * torch.tensor([1.0, -1, -1])
    close(v, expected, 1e-5, "the mesh, metres, y up")


def test_every_person_has_files_of_its_own(tmp_path, checkpoint, capsys):
    save(tmp_path / "one.jpg", np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    rng = np.random.default_rng(1)

    def person(n):                            # of n labelled points, partly outside
        points = np.column_stack([rng.uniform(0, 120, (17, 2)), np.arange(17) < n])
        return {"keypoints": points.flatten().tolist(), "bbox": [1, 1, 30, 50]}
    file = coco_file(tmp_path / "k.json", [person(17), person(5), person(6)])
    common = [str(tmp_path / "one.jpg"), "--checkpoint", str(checkpoint), "--keypoints", str(file)]
    assert photo.main([*common, "--out", str(tmp_path / "all")]) == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        f"one_{n}.{end}" for n in (1, 3) for end in ("json", "obj", "png")]
    printed = capsys.readouterr().out
    assert "person 2 is left out: 5 labelled points" in printed
    assert "drawn people is not expected to work on photographs" in printed
    assert photo.main([*common, "--out", str(tmp_path / "third"), "--person", "3"]) == 0
    assert sorted(path.name for path in (tmp_path / "third").iterdir()) == [
        "one.json", "one.obj", "one.png"]
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("all/one_3.json",
                                                                   "third/one.json"))
    assert a == b
    # the whole photo, and one pixel of it
    whole = [*common[:3], "--out", str(tmp_path / "whole")]
    assert photo.main(whole) == 0
    window = json.loads((tmp_path / "whole" / "one.json").read_text())["window"]
    close(window["center"], [40, 30], 0, "with neither box nor keypoints: the whole photo")
    assert window["side"] == pytest.approx(224 / 150 * 100 / photo.BOX)


def test_bad_options_end_in_a_sentence_and_nothing_is_overwritten(tmp_path, checkpoint, capsys):
    one = save(tmp_path / "one.png", np.zeros((60, 80, 3), np.uint8))
    before = one.read_bytes()
    rows = tmp_path / "one.json"
    rows.write_text(json.dumps([[i * 3, i * 2, 1] for i in range(17)]))
    is_sentence([one], capsys, "--checkpoint", "python train.py --small")
    is_sentence([one, "--fit"], capsys, "--fit", "--keypoints")
    is_sentence([one, "--person", 1, "--checkpoint", checkpoint], capsys, "--person 1")
    for box, words in (("1,2,3", "four numbers"), ("a,2,3,4", "four numbers"),
                       ("0,0,1,1", "at least 5 pixels"), ("0,0,0,9", "at least 5 pixels"),
                       ("nan,0,9,9", "at least 5"), ("90,0,9,9", "outside the photo"),
                       ("-20,0,9,9", "outside the photo")):
        is_sentence([one, f"--bbox={box}", "--checkpoint", checkpoint], capsys, box, words)
    for more in ([], ["--keypoints", rows]):
        is_sentence([one, "--checkpoint", checkpoint, "--out", tmp_path, *more], capsys, "--out",
                    "another folder")
    is_sentence([one, "--checkpoint", tmp_path / "absent.pt"], capsys, "absent.pt", "no such file")
    is_sentence([one, "--checkpoint", one], capsys, "one.png", "not a readable checkpoint")
    assert one.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "one.json", "one.png"], "something was written"


# ============================================================================================
# --fit


@pytest.fixture(scope="module")
def judge(body) -> Discriminator:
    return photo.train_discriminators(body, steps=400, N=48)


def test_a_fit_finds_the_keypoints_and_the_adversary_keeps_it_a_person(body, judge):
    """Fig. 5's monsters: keypoints alone are met better, by bodies that nobody's is."""
    batch, visible = drawn_people(body, 16, 4), torch.ones(19)
    visible[[12, 13]] = 0                                             # as in COCO
    model = HMR(body, depth=18, rotation="6d").eval()
    recorded, bodies = train.recorded_rotations(train.Config(), "cpu"), {}
    for weight in (photo.WEIGHT_ADV, 0):
        fits = [photo.fit(model, judge, keypoints, visible, weight, headings=4, steps=200)
                for keypoints in batch.keypoints2d]
        bodies[weight] = model.decode(torch.cat([found.theta[:1] for found in fits]))
        for found, keypoints in zip(fits, batch.keypoints2d):
            out = model.decode(found.theta)
            for n in range(4):
                one = [x[n:n + 1] for x in out[:-1]]
                close(found.L_kp[n], hmr.keypoint_loss(one[5], keypoints[None], visible[None]),
                      1e-5, "Eq. (3) of each heading's body")
                close(found.L_adv[n], hmr.encoder_adversarial_loss(judge(one[0][:, 1:], one[1])),
                      1e-4, "Eq. (7) of each")
            close(found.loss, 60 * found.L_kp + weight * found.L_adv, 1e-4, "Eq. (1) without 3D")
            assert (found.loss.diff() >= 0).all(), "the best comes first"
            assert found.L_kp[0] < 0.01, f"{112 * found.L_kp[0]:.1f} pixels off"
    person, monster = (train.monstrosity(out, recorded) for out in bodies.values())
    for measure in ("outside", "mocap"):
        a, b = (x[measure].mean().item() for x in (person, monster))
        assert a < 0.75 * b, f"{measure}: {a:.1f} with the adversary, {b:.1f} without"
    assert all(p.requires_grad for p in judge.parameters()), "D is handed back as it was"


def test_the_judges_fakes_are_spoiled_bodies(body, judge):
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
    again = photo.train_discriminators(body, steps=3, N=8)
    torch.rand(1)
    once_more = photo.train_discriminators(body, steps=3, N=8)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), once_more.parameters()))


def test_the_fit_on_the_command_line(tmp_path, checkpoint, monkeypatch, judge, capsys):
    monkeypatch.setattr(photo, "train_discriminators", lambda smpl: judge)
    fit = photo.fit
    monkeypatch.setattr(photo, "fit", lambda *args: fit(*args, headings=3, steps=4))
    one = save(tmp_path / "one.png", np.zeros((60, 80, 3), np.uint8))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([[i * 3, i * 2, 1] for i in range(17)]))
    for n, more in enumerate(([], ["--checkpoint", str(checkpoint)])):
        out = tmp_path / str(n)
        arguments = [str(one), "--keypoints", str(rows), "--fit", "--out", str(out), *more]
        assert photo.main(arguments) == 0
        assert sorted(path.name for path in out.iterdir()) == [
            "one.json", "one.obj", "one.png", "one_fits.png"]
        fitted = json.loads((out / "one.json").read_text())["fit"]
        assert set(fitted) == {"loss", "L_kp", "L_adv", "heading"}
        assert photo.read_photo(out / "one.png").shape == (3, 120, 280), "below: without L_adv"
        assert photo.read_photo(out / "one_fits.png").shape == (3, 3 * 224, 6 * 224)
    printed = capsys.readouterr().out
    assert "(ours)" in printed, "the discriminators trained anew are not the paper's"
    assert printed.count("px an axis") == 4 and printed.count("without it") == 2
    config = train.Config(adv=False)
    monkeypatch.setattr(photo, "load_network", lambda *args: (None, judge, config))
    is_sentence([one, "--keypoints", rows, "--fit", "--checkpoint", "no_adv.pt"], capsys,
                "no_adv.pt", "no trained discriminators")


# ============================================================================================
# SPIN's published weights


def spin_weights() -> dict[str, Tensor]:
    """Random numbers under the published names: all are views of one storage, a small file."""
    resnet = torchvision.models.resnet50(weights=None).state_dict()
    shapes = {name: x.shape for name, x in resnet.items() if not name.startswith("fc.")}
    for name, (inputs, outputs) in {"fc1": (2205, 1024), "fc2": (1024, 1024),
                                    "decpose": (1024, 144), "decshape": (1024, 10),
                                    "deccam": (1024, 3)}.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    shapes |= {"init_pose": (1, 144), "init_shape": (1, 10), "init_cam": (1, 3)}
    noise = 0.05 * torch.randn(max(math.prod(shape) for shape in shapes.values()))
    weights = {}
    for name, shape in shapes.items():
        weights[name] = noise[:math.prod(shape)].view(shape)
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(5)
        elif name.endswith("running_var") or ".bn" in name and name.endswith("weight"):
            weights[name] = 1 + weights[name]                         # a variance is positive
    # Theta_0: upright, and every joint turned a little
    weights["init_pose"] = torch.tensor([[1.0, 0, 0, -1, 0, 0] + [1, 0, 0, 1, 0, 0] * 23]) \
        + 0.1 * torch.randn(1, 144)
    weights["init_cam"], weights["init_shape"] = torch.tensor([[0.9, 0, 0]]), torch.randn(1, 10)
    return weights


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A file in the layout of SPIN's checkpoint, numpy's numbers among the rest, as torch 1.1 wrote
    it."""
    path, weights = tmp_path_factory.mktemp("spin") / "model_checkpoint.pt", spin_weights()
    content = {"model": weights, "optimizer": {"state": {}, "param_groups": []},
               "epoch": np.int64(3), "batch_idx": 0, "batch_size": 64,
               "dataset_perm": np.arange(5), "total_step_count": np.float64(7.0)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path, weights


def spins_own_output(weights: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """SPIN's forward pass from its description: image (B, 3, 224, 224) in [0, 1] ->
    rotation matrices (B, 24, 3, 3), betas (B, 10), cam (B, 3)."""
    resnet = torchvision.models.resnet50(weights=None).eval()
    resnet.fc = nn.Identity()
    resnet.load_state_dict({k: v for k, v in weights.items() if k in resnet.state_dict()})
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        image = image.clone()
        image[:, channel] = (image[:, channel] - mean) / std
    feature = resnet(image)                                           # (B, 2048)
    pose, shape, cam = (weights[f"init_{name}"].expand(len(image), -1)
                        for name in ("pose", "shape", "cam"))
    for _ in range(3):
        x = torch.cat([feature, pose, shape, cam], 1)                 # (B, 2205)
        x = x @ weights["fc1.weight"].T + weights["fc1.bias"]
        x = x @ weights["fc2.weight"].T + weights["fc2.bias"]
        pose = pose + x @ weights["decpose.weight"].T + weights["decpose.bias"]
        shape = shape + x @ weights["decshape.weight"].T + weights["decshape.bias"]
        cam = cam + x @ weights["deccam.weight"].T + weights["deccam.bias"]
    six = pose.view(-1, 24, 6)
    a1, a2 = six[..., 0::2], six[..., 1::2]                           # interleaved columns of R
    b1 = a1 / a1.norm(dim=-1, keepdim=True)
    b2 = a2 - (b1 * a2).sum(-1, keepdim=True) * b1
    b2 = b2 / b2.norm(dim=-1, keepdim=True)
    return [torch.stack([b1, b2, torch.linalg.cross(b1, b2)], -1), shape, cam]


def test_spins_weights_give_spins_output(published, body, capsys):
    path, weights = published
    model = spin.load_spin(path, body)
    assert "SPIN was trained with SMPL's neutral body" in capsys.readouterr().out
    assert isinstance(model, HMR) and not model.training
    image = torch.rand(2, 3, 224, 224)
    image[1, :, 60:] = 0
    with torch.inference_mode():
        thetas, out = model(image)
        rotmats, betas, cam = spins_own_output(weights, image)
    assert [tuple(theta.shape) for theta in thetas] == [(2, 157)] * 3
    start = model.regressor.theta_bar
    assert (thetas[-1] - start).abs().max() > 0.1, "the test says nothing if nothing moves"
    assert (thetas[-1][0] - thetas[-1][1]).abs().max() > 1e-4, "nor if pictures make no difference"
    close(out.rotmats, rotmats, 1e-4, "24 rotation matrices: a ReLU, the order of Theta, 6D?")
    size = betas.abs().max()                  # thousands, as the weights are random
    close(out.betas / size, betas / size, 1e-5, "betas")
    close(out.cam / size, cam / size, 1e-5, "the camera")
    close(start[:, :3], [[0.9, 0, 0]], 1e-6, "Theta in our order: the camera first")
    close(rot6d_to_rotmat(weights["init_pose"].view(24, 6)), model.decode(start).rotmats[0], 1e-6,
          "its first pose")


def test_spins_crop_is_a_fifth_more_than_the_longer_side():
    center, side, outside = spin.SPIN.crop(torch.tensor([10.0, 20, 30, 50]))
    assert center.tolist() == [25, 45] and side == pytest.approx(60) and outside == "zeros"


def test_what_differs_from_spins_layout_is_listed(published, tmp_path, body):
    path, weights = published
    bad = {k: v for k, v in weights.items() if k not in ("fc2.bias", "bn1.num_batches_tracked")}
    bad["deccam.weight"], bad["fc9.weight"] = torch.zeros(3, 1000), torch.zeros(2)
    torch.save({"model": bad}, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as error:
        spin.load_spin(tmp_path / "bad.pt", body)
    message = str(error.value)
    assert "bad.pt: 3 of its weights are not SPIN's" in message
    for words in ("fc2.bias is missing, expected (1024,)", "fc9.weight is (2,), expected no such",
                  "deccam.weight is (3, 1000), expected (3, 1024)"):
        assert words in message, message
    torch.save({"model": {"fc1.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not SPIN's checkpoint"):
        spin.load_spin(tmp_path / "other.pt", body)
    with pytest.raises(ValueError, match="not a checkpoint of this version of train.py"):
        train.load(tmp_path / "other.pt")


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_hostile_checkpoint_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "one.png", np.zeros((60, 80, 3), np.uint8))
    torch.save({"model": {"decpose.weight": Runs()}}, "hostile.pt")
    is_sentence(["one.png", "--checkpoint", "hostile.pt"], capsys, "hostile.pt", "not a readable")
    assert not Path("ran").exists()


def test_spins_weights_are_measured_and_shown_a_photo(published, tmp_path, monkeypatch, capsys):
    path, _ = published
    monkeypatch.chdir(tmp_path)
    model, D, config = spin.load_network(path, device="cpu")
    metrics = train.evaluate(model, dataclasses.replace(config, eval_pictures=2))
    assert D is None and len(metrics["per_iteration"]) == 3
    one = save(tmp_path / "one.png", np.full((60, 80, 3), 255, np.uint8))
    seen = []
    encode = HMR.encode
    monkeypatch.setattr(HMR, "encode", lambda self, x: seen.append(x) or encode(self, x))
    # random weights may answer with any camera: give it one
    monkeypatch.setattr(spin.SpinRegressor, "forward", lambda self, x: [self.theta_bar])
    assert photo.main([str(one), "--checkpoint", str(path), "--bbox", "0,0,20,40"]) == 0
    numbers = json.loads(Path("out/photo/one.json").read_text())
    assert numbers["window"]["side"] == pytest.approx(48) and numbers["crop_pixels"] == 224
    close(numbers["window"]["center"], [10, 20], 1e-6, "the box's middle")
    image, = seen
    assert (image[0, :, :, :60] == 0).all() and (image[0, :, 30:200, 80:] > 0.999).all(), \
        "beyond the photo SPIN sees black"
    assert "drawn people" not in capsys.readouterr().out
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([[i * 3, i * 2, 1] for i in range(17)]))
    is_sentence([one, "--checkpoint", path, "--keypoints", rows, "--fit"], capsys,
                "model_checkpoint.pt", "no trained discriminators")
