"""Photographs: crops and cameras there and back, keypoint files, the detector, fits, SPIN's weights.

Fixtures and `close` are test_hmr.py's.
"""

import dataclasses
import json
import math
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models import detection

import data
import hmr
import train
from appendix import datasets, photo, spin
from appendix.datasets import COCO_NAMES, read_picture
from hmr import HMR, Discriminator, mean_theta
from smpl import KEYPOINT_NAMES, SMPL, batch_rodrigues, rot6d_to_rotmat
from test_hmr import (body, close, precision_of_the_encoder,  # noqa: F401 (fixtures)
                      same_numbers_every_time, tiny)

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SAMPLE, ITS_KEYPOINTS = ASSETS / "000000000785.jpg", ASSETS / "person_keypoints_sample.json"
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


def by_box(box) -> photo.Person:
    return photo.Person(1, None, torch.zeros(19), torch.as_tensor(box, dtype=torch.float32))


def by_points(keypoints: Tensor, visible: Tensor) -> photo.Person:
    return photo.Person(1, keypoints, visible, torch.zeros(4))


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


def test_a_keypoint_crop_is_crop_persons_or_spins():
    image, keypoints, visible = torch.rand(3, 90, 160), torch.zeros(19, 2), torch.zeros(19)
    for name, xy in (("right_ankle", (60, 80)), ("left_hip", (70, 50)), ("nose", (72, 12))):
        k = KEYPOINT_NAMES.index(name)
        keypoints[k], visible[k] = torch.tensor(xy).float(), 1
    window = photo.window_of(by_points(keypoints, visible))
    for size in (224, 64):                    # magnified, and shrunk with a low-pass
        expected, points = datasets.crop_person(image, keypoints, visible, size)
        close(datasets.cut_window(image, window.center, window.side, size, window.outside),
              expected, 1e-5, "the same picture")
        close(photo.to_crop(keypoints, window)[visible > 0], points[visible > 0], 1e-5, "points")
    tight = photo.window_of(by_points(keypoints, visible), "tight")
    assert abs(window.side / tight.side - 212 / 150) < 1e-5, "a tight crop is closer"
    center, side, outside = photo.window_of(by_points(keypoints, visible), "spin")
    close(center, [(60 + 70 + 72) / 3, (80 + 50 + 12) / 3], 1e-4, "SPIN's demo: the points' mean")
    assert side == pytest.approx(1.2 * 68) and outside == "zeros"
    center, side, _ = photo.window_of(by_box([10, 20, 30, 142]), "spin")
    assert center.tolist() == [25, 91] and side == 142, "SPIN's demo: the box itself"
    black = datasets.cut_window(torch.ones(3, 20, 30), torch.zeros(2), 40.0, 32, outside)
    assert (black[:, :15] == 0).all() and (black[:, :, :15] == 0).all(), "SPIN sees black outside"


def test_a_box_crop_shows_people_as_large_as_training_does(body):
    """A box holds the skin, keypoints lie inside: of the same people, both crops are alike."""
    batch, ratios = drawn_people(body, 16, 64), []
    skin = hmr.project(body(batch.betas, batch.rotmats).vertices, batch.cam)      # (64, V, 2)
    for points, keypoints in zip(skin, batch.keypoints2d):
        low, high = (f(100 * points, 0) for f in (torch.amin, torch.amax))
        window = photo.window_of(by_box(torch.cat([low, high - low])))
        size = (100 * (keypoints.amax(0) - keypoints.amin(0))).norm()
        ratios.append(window.side / (224 / 150 * size))
    assert 0.95 < sum(ratios) / 64 < 1.05, f"{sum(ratios) / 64:.3f} times the keypoint crop's side"


@pytest.mark.parametrize("H, W", [(425, 640), (900, 2048)])
def test_the_overlay_lies_where_the_camera_says(body, H, W):
    batch = drawn_people(body, 16, 1)
    window = photo.Window(torch.tensor([0.6 * W, 0.45 * H]), 0.8 * H)
    b = body(batch.betas, batch.rotmats)
    out = hmr.HMROutput(batch.rotmats, batch.betas, batch.cam, b.joints, b.keypoints,
                        batch.keypoints2d, b.vertices)
    drawn = photo.panels(torch.ones(3, H, W), out, body.faces, window, by_box([0, 0, W, H]))
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
# Files of keypoints

def blank(path: Path, H=60, W=80, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(path, **options)
    return path


def read(file: Path, photo_file: Path, only=None) -> list[photo.Person]:
    content = datasets.read_json(file, "keypoints")
    return photo.people_of(content, f"--keypoints {file}", photo_file, only)[1]


def coco_file(path: Path, people: list[dict], name="one.jpg", **image) -> Path:
    """A COCO annotation file of two pictures, the second one's people are `people`."""
    images = [{"id": 7, "file_name": "other.jpg"}, {"id": 9, "file_name": name, **image}]
    annotations = [{"image_id": 7, "keypoints": [1, 1, 2] * 17, "iscrowd": 0, "bbox": [0, 0, 9, 9]}]
    annotations += [{"id": n, "image_id": 9} | one for n, one in enumerate(people, 1)]
    content = {"images": images, "annotations": annotations}
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")     # a byte order mark
    return path


GOOD = {"keypoints": [x for i in range(17) for x in (4 * i, 3 * i, 2)]}


def test_coco_keypoints_are_put_in_order_by_name(tmp_path, capsys):
    one = blank(tmp_path / "b" / "one.jpg", 100, 200)
    rows = [[10 * i, 5 * i, i % 3] for i in range(17)]
    people = [{**GOOD, "iscrowd": 1}, {"keypoints": [0, 0, 0] * 17}, {"bbox": [1, 2, 3, 4]},
              {**GOOD, "category_id": 17}, {"keypoints": sum(rows, []), "bbox": [5, 6, 0, 80]},
              {"keypoints": [3, 4]}]
    person, = read(coco_file(tmp_path / "k.json", people, width=200, height=100), one)
    assert person.number == 3, "people are numbered in the file's order; no crowds, no dogs"
    printed = capsys.readouterr().out
    for words in ("person 1 is left out: 0 labelled points, 6 needed",
                  "person 2 is left out: without keypoints",
                  "person 4 is left out: broken rows, annotation 6's keypoints"):
        assert words in printed, words
    for name, coco in (("nose", 0), ("left_eye", 1), ("right_ear", 4), ("left_shoulder", 5),
                       ("right_wrist", 10), ("left_hip", 11), ("right_ankle", 16)):
        k = KEYPOINT_NAMES.index(name)
        assert person.visible[k] == (coco % 3 > 0), f"{name}: 1 and 2 are labelled, 0 is not"
        if person.visible[k]:
            close(person.keypoints[k], [10 * coco + 0.5, 5 * coco + 0.5], 0,
                  f"{name}: COCO counts whole pixels, here pixel i covers [i, i + 1)")
    assert not any(person.visible[KEYPOINT_NAMES.index(name)] for name in ("neck", "head_top"))
    assert (person.keypoints[person.visible == 0] == 0).all()
    # two pictures of one name: the path's end says which
    content = json.loads(coco_file(tmp_path / "k.json", [GOOD], "a/one.jpg").read_text("utf-8-sig"))
    content["images"][0]["file_name"] = "b/one.jpg"
    content["annotations"][0]["keypoints"] = [x for i in range(17) for x in (i, i, 2)]
    person, = photo.people_of(content, "k", one, None)[1]
    assert person.keypoints.max() == 16.5, "picture 7's person"


def test_what_detectors_write_is_read(tmp_path):
    """OpenPose's JSON, COCO results, lists of rows or of numbers; confidences below 0.2 are none."""
    one, file = blank(tmp_path / "000785.jpg", 90, 90), tmp_path / "k.json"

    def points_of(content) -> photo.Person:
        file.write_text(json.dumps(content), encoding="utf-8")
        person, = read(file, one)
        return person
    ours = [[i, 2 * i, 1] for i in range(19)]
    close(points_of(ours).keypoints, torch.tensor(ours)[:, :2] + 0.5, 0, "19 rows: our order")
    coco = [[i, 2 * i, 0.19 if i == 3 else 0.2] for i in range(17)]
    for content in (coco, sum(coco, []), [{"image_id": 785, "keypoints": sum(coco, []),
                                           "category_id": 1, "score": 0.9}]):
        person = points_of(content)
        close(person.keypoints[KEYPOINT_NAMES.index("left_ankle")], [15.5, 30.5], 0, "COCO's order")
        assert person.visible.sum() == 16 and not person.visible[KEYPOINT_NAMES.index("left_ear")]
    for count, key in ((25, "pose_keypoints_2d"), (18, "pose_keypoints")):
        flat = [x for i in range(count) for x in (i, 2 * i, 1.02)]
        person = points_of({"version": 1.3, "people": [{key: flat}]})
        # BODY_25 has the hips' middle in place 8
        for name, place in (("right_wrist", 4), ("left_wrist", 7), ("right_ankle", count // 25 + 10),
                            ("left_ear", count // 25 + 17)):
            close(person.keypoints[KEYPOINT_NAMES.index(name)], [place + 0.5, 2 * place + 0.5], 0,
                  f"OpenPose's {count}: {name}")
        assert not person.visible[KEYPOINT_NAMES.index("neck")], "OpenPose's neck is another point"


def test_bad_keypoint_files_end_in_a_sentence(tmp_path, capsys):
    one = blank(tmp_path / "one.jpg", 50, 60)
    cases = {
        "": "not JSON", "[[1, 2": "not JSON", "3": "neither COCO's", "{}": "neither COCO's",
        "[[1, 2, 1], [3]]": "17 (COCO's order) or 19 rows", "[]": "17 (COCO's order)",
        json.dumps([[1, 2, "x"]] * 17): "17 (COCO's order)",
        json.dumps([[1, 2, 1]] * 16): "17 (COCO's order)",
        json.dumps([[1, 2, 0]] * 17): "nobody with 6 labelled points",
        json.dumps([[1, 2, 7]] * 17): "nobody with 6 labelled points",
        json.dumps([[1, 2, 1]] * 17): "who is 5 pixels large",        # all on one spot
        json.dumps([[99 + 9 * i, 2, 1] for i in range(17)]): "inside the photo",
        json.dumps([[math.nan, 1e39, 1]] * 17): "nobody with 6", "[" * 100_000: "not JSON"}
    for n, (people, image, words) in enumerate((
            ([{}], {}, "nobody with 6"), ([], {}, "nobody with 6"),
            ([GOOD], {"width": 61, "height": 50}, "61 x 50"))):
        cases[coco_file(tmp_path / f"{n}.json", people, **image).read_text("utf-8-sig")] = words
    cases[coco_file(tmp_path / "n.json", [GOOD], name="two.jpg").read_text("utf-8-sig")] = \
        "0 of its images are called one.jpg"
    for text, words in cases.items():
        (tmp_path / "bad.json").write_text(text, encoding="utf-8")
        is_sentence([one, "--keypoints", tmp_path / "bad.json", "--fit"], capsys,
                    "one.jpg" if "61" in words else "bad.json", words)
    is_sentence([one, "--keypoints", tmp_path, "--fit"], capsys, str(tmp_path), "a folder")
    file = coco_file(tmp_path / "two.json", [GOOD, GOOD])
    for n in (0, 3):
        is_sentence([one, "--keypoints", file, "--fit", "--person", n], capsys, f"--person {n}",
                    "has 2")
    for name, content in (("text.jpg", b"hello"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        is_sentence([tmp_path / name, "--checkpoint", "x"], capsys, name, "no whole JPEG")


def test_the_sample_is_read_and_cropped():
    """The one photograph of this project: COCO val2017's image 785."""
    person, = read(ITS_KEYPOINTS, SAMPLE)
    assert person.visible.sum() == 17
    close(person.keypoints[KEYPOINT_NAMES.index("nose")], [367.5, 81.5], 0, "as in the file, + 0.5")
    close(person.keypoints[KEYPOINT_NAMES.index("right_ankle")], [396.5, 341.5], 0, "the same")
    box, = json.loads(ITS_KEYPOINTS.read_text())["annotations"]
    ratio = photo.window_of(by_box(box["bbox"])).side / photo.window_of(person).side
    assert 1.07 < ratio < 1.09, f"the box, which holds clothes and gloves, gives {ratio:.3f}"


# ============================================================================================
# The detector

@pytest.fixture(scope="module")
def random_detector() -> nn.Module:
    """torchvision's network with random weights; it looks at small pictures and few places."""
    torch.manual_seed(0)
    return detection.keypointrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=96, box_score_thresh=0.0,
        rpn_post_nms_top_n_test=9, box_detections_per_img=4).eval()


def test_the_detectors_answer_becomes_cocos_annotations(random_detector, monkeypatch):
    image = torch.rand(3, 60, 80)
    with torch.inference_mode():
        answer, = random_detector([image])
    assert answer["keypoints"].shape[1:] == (17, 3) and len(answer["scores"]) > 2
    assert photo.detect(random_detector, image, "one.jpg")["annotations"] == [], "nobody is sure"
    monkeypatch.setattr(photo, "SURE", answer["scores"][2].item())
    monkeypatch.setattr(photo, "POINT_SCORE", answer["keypoints_scores"][:3].median().item())
    found = json.loads(json.dumps(photo.detect(random_detector, image, "one.jpg"), allow_nan=False))
    assert found["images"] == [{"id": 1, "file_name": "one.jpg", "width": 80, "height": 60}]
    assert len(found["annotations"]) == 3 and found["annotations"][0]["score"] >= photo.SURE
    for row, box, points in zip(found["annotations"], answer["boxes"], answer["keypoints"]):
        table = torch.tensor(row["keypoints"]).view(17, 3)
        close(table[:, :2], points[:, :2], 1e-4, "x, y as torchvision gives them")
        assert set(table[:, 2].tolist()) <= {0.0, 2.0}
        x, y, w, h = row["bbox"]
        close([x, y, x + w, y + h], box, 1e-4, "x, y, w, h")
    labels = [row["keypoints"][2::3] for row in found["annotations"]]
    assert 0 < np.mean(labels) < 2, "points of a low score are not labelled"


def test_the_detector_is_torchvisions_and_says_why_it_is_not_there(random_detector, monkeypatch,
                                                                   tmp_path, capsys):
    weights = detection.KeypointRCNN_ResNet50_FPN_Weights
    state = {key: x for key, x in random_detector.state_dict().items()
             if not key.endswith("num_batches_tracked")}              # as the published file
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: state)
    with torch.inference_mode():
        one, other = (network.backbone(torch.full((1, 3, 64, 64), 0.3))["0"] for network in (
            photo.load_detector("cpu"), detection.keypointrcnn_resnet50_fpn(
                weights=weights.COCO_V1).eval()))
    # torchvision's frozen batch norm is another formula for the same numbers
    close(one, other, 1e-5 * other.abs().max().item(), "torchvision's own: batch norm's epsilon?")
    for error, words in ((urllib.error.URLError("x"), "no network to reach https://download.pytorch"),
                         (PermissionError("x"), "cannot be read or written"),
                         (RuntimeError("x"), "is cut or not what its name says")):
        def fail(self, **_):
            raise error
        monkeypatch.setattr(weights, "get_state_dict", fail)
        is_sentence([blank(tmp_path / "one.png"), "--fit"], capsys, words, "by --keypoints FILE.json")


class Finds(nn.Module):
    """In the detector's place: it finds the sample's person, or two of her, or nobody."""

    def __init__(self, people: int):
        super().__init__()
        row, = json.loads(ITS_KEYPOINTS.read_text())["annotations"]
        points, box = torch.tensor(row["keypoints"]).float().view(17, 3), torch.tensor(row["bbox"])
        box = torch.cat([box[:2], box[:2] + box[2:]])
        self.answer = {"boxes": box.repeat(people, 1), "scores": torch.full((people,), 0.99),
                       "labels": torch.ones(people, dtype=torch.int64),
                       "keypoints": points.repeat(people, 1, 1),
                       "keypoints_scores": torch.full((people, 17), 9.0)}

    def forward(self, images):
        return [self.answer]


def test_a_photo_alone_gives_what_its_keypoints_give(tmp_path, monkeypatch, judge, capsys):
    monkeypatch.setattr(photo, "kept_discriminators", lambda smpl: judge)
    monkeypatch.setattr(photo, "load_detector", lambda device: Finds(1))
    fit = photo.fit
    monkeypatch.setattr(photo, "fit", lambda *args: fit(*args, headings=2, steps=3))
    alone, given, again = (str(tmp_path / name) for name in "abc")
    assert photo.main([str(SAMPLE), "--fit", "--out", alone]) == 0
    assert "Keypoint R-CNN: 1, scores 0.990" in capsys.readouterr().out
    assert photo.main([str(SAMPLE), "--fit", "--keypoints", str(ITS_KEYPOINTS), "--out", given]) == 0
    found = tmp_path / "a" / f"{SAMPLE.stem}_keypoints.json"
    assert photo.main([str(SAMPLE), "--fit", "--keypoints", str(found), "--out", again]) == 0
    a, b, c = ((tmp_path / name / f"{SAMPLE.stem}.json").read_text() for name in "abc")
    assert a == b == c, "the same points, the same body"
    assert photo.main([str(SAMPLE), "--fit", "--out", alone]) == 0, "the same photo once more"
    found.write_text(found.read_text().replace("0.99", "0.98"))       # mended by hand
    is_sentence([SAMPLE, "--fit", "--out", alone], capsys, found.name, "give them back by --keypoints")
    monkeypatch.setattr(photo, "load_detector", lambda device: Finds(2))
    assert photo.main([str(SAMPLE), "--fit", "--person", "2", "--out", str(tmp_path / "d")]) == 0
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        f"{SAMPLE.stem}_{end}" for end in ("2.json", "2.obj", "2.png", "keypoints.json")]
    monkeypatch.setattr(photo, "load_detector", lambda device: Finds(0))
    is_sentence([SAMPLE, "--fit", "--out", tmp_path / "e"], capsys, SAMPLE.name, "finds no people")
    assert not (tmp_path / "e").exists()


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

    def __init__(self, smpl: SMPL, *answers: Tensor):
        super().__init__(smpl, depth=18, rotation="6d")
        self.answers, self.seen = list(answers), []

    def forward(self, images):
        self.seen.append(images)
        return [self.answers.pop(0)], None


def instead(monkeypatch, network: HMR, world="photographs", **changes) -> None:
    """The command loads this network."""
    loaded = spin.Network(network, None, train.Config(size=64, device="cpu"), "official", world)
    monkeypatch.setattr(photo, "load_network", lambda *args: loaded._replace(**changes))


def test_a_photo_becomes_a_picture_a_mesh_and_numbers(tmp_path, monkeypatch, body, capsys):
    """A drawn person is pasted into a photo; told its Theta, the command gives back its pixels."""
    batch = drawn_people(body, 128, 1)
    corner, side = torch.tensor([150.0, 20]), 128
    image = torch.full((3, 200, 400), 0.5)
    image[:, 20:148, 150:278] = batch.image[0]
    data.save_png(tmp_path / "one.png", image)
    truth = (batch.keypoints2d[0] + 1) * side / 2 + corner            # (19, 2) pixels of the photo
    box = torch.cat([truth.amin(0), truth.amax(0) - truth.amin(0)])
    window = photo.window_of(by_box(box))
    S = batch.cam[:, :1] * side / 2                                   # pixel = S (X + t)
    in_photo = batch.cam[:, 1:] + (corner + side / 2) / S             # (1, 2)
    cam = torch.cat([S * 2 / window.side, in_photo - window.center / S], 1)       # of the crop
    network = Knows(body, torch.cat([cam, batch.rotmats[..., :2].flatten(1), batch.betas], 1))
    instead(monkeypatch, network)
    assert photo.main([str(tmp_path / "one.png"), "--checkpoint", "any", "--out",
                       str(tmp_path / "out"), "--bbox", ",".join(map(str, box.tolist()))]) == 0
    assert "drawn people" not in capsys.readouterr().out, "it was trained on photographs"
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
    picture = read_picture(tmp_path / "out" / "one.png").float() / 255
    assert picture.shape == (3, 200, 400 + 400 + 200 + 200)
    close(picture[:, :, :400], image, 0.01, "the input comes first")
    lines = (tmp_path / "out" / "one.obj").read_text().splitlines()
    v = torch.tensor([[float(x) for x in line.split()[1:]] for line in lines if line[0] == "v"])
    expected = body(batch.betas, batch.rotmats).vertices[0] * torch.tensor([1.0, -1, -1])
    close(v, expected, 1e-5, "the mesh, metres, y up")


def test_every_person_has_files_of_its_own(tmp_path, checkpoint, body, monkeypatch, capsys):
    one, rng = blank(tmp_path / "one.jpg"), np.random.default_rng(1)

    def person(n):                            # of n labelled points, partly outside
        points = np.column_stack([rng.uniform(0, 120, (17, 2)), 2 * (np.arange(17) < n)])
        return {"keypoints": points.flatten().tolist(), "bbox": [1, 1, 30, 50]}
    file = coco_file(tmp_path / "k.json", [person(17), person(5), person(6)])
    common = [str(one), "--checkpoint", str(checkpoint), "--keypoints", str(file), "--device", "cpu"]
    assert photo.main([*common, "--out", str(tmp_path / "all")]) == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        f"one_{n}.{end}" for n in (1, 3) for end in ("json", "obj", "png")]
    printed = capsys.readouterr().out
    assert "person 2 is left out: 5 labelled points" in printed
    assert "drawn people is not expected to work on photographs" in printed
    assert photo.main([*common, "--out", str(tmp_path / "third"), "--person", "3"]) == 0
    assert sorted(path.name for path in (tmp_path / "third").iterdir()) == [
        "one_3.json", "one_3.obj", "one_3.png"], "the next person must not take its place"
    a, b = ((tmp_path / name / "one_3.json").read_text() for name in ("all", "third"))
    assert a == b
    # one person without a body: the other one is still written
    theta = mean_theta(body.mean_pose, "6d")
    behind, nan = theta.clone(), theta.clone()
    behind[:, 0], nan[:, 50] = -1, math.nan
    instead(monkeypatch, Knows(body, behind, theta))
    assert photo.main([*common, "--out", str(tmp_path / "fourth")]) == 0
    assert "person 1 is left out: no body found (camera scale -1)" in capsys.readouterr().out
    assert len(list((tmp_path / "fourth").iterdir())) == 3
    instead(monkeypatch, Knows(body, behind, nan))
    is_sentence([*common, "--out", tmp_path / "none"], capsys, "one.jpg: no body found")
    # the whole photo, and one pixel of it
    instead(monkeypatch, Knows(body, theta, theta))
    whole = [*common[:3], "--out", str(tmp_path / "whole")]
    assert photo.main(whole) == 0
    assert "the whole photo is taken for one person" in capsys.readouterr().out
    window = json.loads((tmp_path / "whole" / "one.json").read_text())["window"]
    close(window["center"], [40, 30], 0, "with neither box nor keypoints: the whole photo")
    assert window["side"] == pytest.approx(224 / 150 * 100 / photo.BOX)
    assert photo.main([*whole[:3], "--bbox", "-5,-5,30,40", "--out", str(tmp_path / "box")]) == 0


def test_bad_options_end_in_a_sentence_and_nothing_is_overwritten(tmp_path, checkpoint, body,
                                                                  monkeypatch, capsys):
    one, rows = blank(tmp_path / "one.png"), tmp_path / "one.json"
    before = one.read_bytes()
    rows.write_text(json.dumps([[i * 3, i * 2, 1] for i in range(17)]))
    is_sentence([one], capsys, "--checkpoint", "python train.py --small")
    is_sentence([one, "--fit", "--bbox", "0,0,9,9"], capsys, "--fit", "--keypoints")
    is_sentence([one, "--person", 1, "--checkpoint", checkpoint], capsys, "--person 1")
    is_sentence([one, "--fit", "--mean-params", "x.npz", "--keypoints", rows], capsys, "x.npz")
    for box, words in (("1,2,3", "four numbers"), ("a,2,3,4", "four numbers"),
                       ("0,0,1,1", "at least 5 pixels"), ("0,0,0,9", "at least 5 pixels"),
                       ("nan,0,9,9", "at least 5"), ("90,0,9,9", "outside the photo"),
                       ("-20,0,9,9", "outside the photo")):
        is_sentence([one, "--bbox", box, "--checkpoint", checkpoint], capsys, box, words)
    for more in ([], ["--keypoints", rows]):
        is_sentence([one, "--checkpoint", checkpoint, "--out", tmp_path, *more], capsys, "--out",
                    "another folder")
    is_sentence([one, "--checkpoint", tmp_path / "absent.pt"], capsys, "absent.pt", "no such file")
    is_sentence([one, "--checkpoint", one], capsys, "one.png", "not a readable checkpoint")
    assert one.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "one.json", "one.png"], "something was written"
    theta = mean_theta(body.mean_pose, "6d")
    instead(monkeypatch, Knows(body, theta, theta))
    other, out = blank(tmp_path / "b" / "one.png", 61), tmp_path / "out"
    for _ in range(2):                                                # the same photo may again
        assert photo.main([str(one), "--checkpoint", "any", "--out", str(out)]) == 0
    is_sentence([other, "--checkpoint", "any", "--out", out], capsys, "one.json there is not of")


# ============================================================================================
# --fit

@pytest.fixture(scope="module")
def judge(body) -> Discriminator:
    return photo.train_discriminators(body, steps=160, N=32)


def test_a_fit_finds_the_keypoints_and_the_adversary_keeps_it_a_person(body, judge):
    """Fig. 5's monsters: keypoints alone are met better, by bodies that nobody's is."""
    batch, visible = drawn_people(body, 16, 3), torch.ones(19)
    visible[[12, 13]] = 0                                             # as in COCO
    model, start = HMR(body, depth=18, rotation="6d").eval(), mean_theta(body.mean_pose, "6d")
    recorded, bodies = train.recorded_rotations(train.Config(), "cpu"), {}
    for weight in (photo.WEIGHT_ADV, 0):
        fits = [photo.fit(model, judge, keypoints, visible, start, weight, headings=3, steps=120)
                for keypoints in batch.keypoints2d]
        bodies[weight] = model.decode(torch.cat([found.theta[:1] for found in fits]))
        for found, keypoints in zip(fits, batch.keypoints2d):
            out = model.decode(found.theta)
            for n in range(3):
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


def test_the_judges_are_kept_under_their_bodys_and_clips_name(body, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def weights() -> list[Tensor]:
        torch.rand(1)
        return [p.detach() for p in photo.kept_discriminators(body, steps=2, N=8).parameters()]
    first, second = weights(), weights()
    kept, = (tmp_path / "hub").iterdir()
    kept.write_bytes(kept.read_bytes()[:999])                         # a broken file is made anew
    third = weights()
    printed = capsys.readouterr().out
    assert printed.count("trained once") == 2 and printed.count("25 discriminators of") == 1
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third))
    photo.kept_discriminators(body, steps=1, N=8)
    assert len(list((tmp_path / "hub").iterdir())) == 2, "another training has another name"


def test_the_fit_on_the_command_line(tmp_path, checkpoint, monkeypatch, judge, capsys):
    monkeypatch.setattr(photo, "kept_discriminators", lambda smpl: judge)
    fit, starts = photo.fit, []
    monkeypatch.setattr(photo, "fit", lambda *args: starts.append(args[4]) or fit(
        *args, headings=3, steps=4))
    one, rows = blank(tmp_path / "one.png"), tmp_path / "rows.json"
    rows.write_text(json.dumps([[i * 3, i * 2, 1] for i in range(17)]))
    np.savez(tmp_path / "mean.npz", pose=np.tile([1.0, 0, 0, 1, 0, 0], 24), shape=np.ones(10))
    common, files = [str(one), "--keypoints", str(rows), "--fit", "--out"], ["json", "obj", "png"]
    for more in ([], ["--sheet"], ["--checkpoint", str(checkpoint)],
                 ["--mean-params", str(tmp_path / "mean.npz")]):
        out = tmp_path / str(len(starts))
        assert photo.main([*common, str(out), *more]) == 0
        sheet = ["one_fits.png"] * ("--sheet" in more)
        assert sorted(path.name for path in out.iterdir()) == [f"one.{end}" for end in files] + sheet
        fitted = json.loads((out / "one.json").read_text())["fit"]
        assert set(fitted) == {"loss", "L_kp", "L_adv", "heading"}
        assert read_picture(out / "one.png").shape == (3, 60, 280)
        if sheet:
            both = read_picture(out / "one_fits.png")
            assert both.shape == (3, 120, 280), "below: without L_adv"
            assert torch.equal(both[:, :60], read_picture(out / "one.png"))
    printed = capsys.readouterr().out
    assert printed.count("px an axis") == 5 and printed.count("+ 0.0 L_adv") == 1
    close(starts[-1][0, -10:], torch.ones(10), 0, "--mean-params: where the fit starts")
    instead(monkeypatch, None, D=judge, config=train.Config(adv=False))
    is_sentence([*common, tmp_path / "no", "--checkpoint", "no_adv.pt"], capsys, "no_adv.pt",
                "no trained discriminators")


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


def test_what_differs_from_spins_layout_is_listed(published, tmp_path, body):
    path, weights = published
    bad = {k: v for k, v in weights.items() if k not in ("fc2.bias", "bn1.num_batches_tracked")}
    bad["deccam.weight"], bad["fc9.weight"] = torch.zeros(3, 1000), torch.zeros(2)
    torch.save({"model": {f"module.{name}": x for name, x in bad.items()}}, tmp_path / "bad.pt")
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
    blank(tmp_path / "one.png")
    torch.save({"model": {"decpose.weight": Runs()}}, "hostile.pt")
    is_sentence(["one.png", "--checkpoint", "hostile.pt"], capsys, "hostile.pt", "not a readable")
    assert not Path("ran").exists()


def test_spins_weights_are_measured_and_shown_a_photo(published, tmp_path, monkeypatch, capsys):
    path, _ = published
    monkeypatch.chdir(tmp_path)
    network = spin.load_network(path, device="cpu")
    config = dataclasses.replace(network.config, eval_pictures=2)
    assert len(train.evaluate(network.model, config)["per_iteration"]) == 3
    assert network.D is None and network.crop == "spin"
    one = tmp_path / "one.png"
    Image.new("RGB", (80, 60), (255, 255, 255)).save(one)
    seen = []
    encode = HMR.encode
    monkeypatch.setattr(HMR, "encode", lambda self, x: seen.append(x) or encode(self, x))
    # random weights may answer with any camera: give it one
    monkeypatch.setattr(spin.SpinRegressor, "forward", lambda self, x: [self.theta_bar])
    assert photo.main([str(one), "--checkpoint", str(path), "--bbox", "0,0,20,40"]) == 0
    numbers = json.loads(Path("out/photo/one.json").read_text())
    assert numbers["window"]["side"] == 40 and numbers["crop_pixels"] == 224
    close(numbers["window"]["center"], [10, 20], 1e-6, "the box's middle")
    image, = seen
    assert (image[0, :, :, :50] == 0).all() and (image[0, :, 30:200, 80:] > 0.999).all(), \
        "beyond the photo SPIN sees black"
    assert "drawn people" not in capsys.readouterr().out
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([[i * 3, i * 2, 1] for i in range(17)]))
    is_sentence([one, "--checkpoint", path, "--keypoints", rows, "--fit"], capsys,
                "model_checkpoint.pt", "no trained discriminators")
