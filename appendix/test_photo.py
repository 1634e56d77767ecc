"""Photographs: crops and cameras, keypoint files, the detector, the command, fits, SPIN's weights.

Fixtures and `close` are test_hmr.py's.
"""

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
from appendix.datasets import read_picture
from hmr import HMR, Discriminator, mean_theta
from smpl import KEYPOINT_NAMES, batch_rodrigues
from test_hmr import (body, close, precision_of_the_encoder,  # noqa: F401 (fixtures)
                      same_numbers_every_time)

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SAMPLE, ITS_KEYPOINTS = ASSETS / "000000000785.jpg", ASSETS / "person_keypoints_sample.json"


def command(*argv) -> int:
    return photo.main([str(word) for word in argv])


def is_sentence(argv: list, capsys, *words: str) -> None:
    """The command refuses in one line that holds these words, and exits with status 2."""
    capsys.readouterr()
    assert command(*argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("photo.py: "), error
    for word in words:
        assert word in error, f"{word!r} is not in: {error}"


def drawn_people(body, size: int, n: int) -> data.Batch:
    """People of the held-out clips, whose truth is known."""
    return data.SyntheticPeople(body, data.load_mocap(True, True), n, size, labels="all",
                                mix=False, seed=5).batch(0)


def by_box(box) -> photo.Person:
    return photo.Person(1, torch.zeros(19, 2), torch.zeros(19), torch.as_tensor(box).float())


def blank(path: Path, H=60, W=80, **options) -> Path:
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(path, **options)
    return path


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
    close(t[2], 2 * 500 / (224 * 0.9), 1e-4, "tz = 2 f / (size s), for the crop is 2 wide")
    X = torch.randn(50, 3)
    flat = X * torch.tensor([1.0, 1, 0])
    pinhole = f * (flat + t)[:, :2] / (flat + t)[:, 2:]               # from the principal point
    close(pinhole, hmr.project(flat[None], cam[None])[0] * size / 2, 1e-3, "equal where Z = 0")
    close(photo.perspective(cam, 48)[1], t, 1e-4, "as far away, however fine the crop is")


def test_a_keypoint_crop_is_crop_persons_or_spins():
    image, keypoints, visible = torch.rand(3, 90, 160), torch.zeros(19, 2), torch.zeros(19)
    for name, xy in (("right_ankle", (60, 80)), ("left_hip", (70, 50)), ("nose", (72, 12))):
        k = KEYPOINT_NAMES.index(name)
        keypoints[k], visible[k] = torch.tensor(xy).float(), 1
    person = photo.Person(1, keypoints, visible, None)
    window = photo.window_of(person)
    expected, points = datasets.crop_person(image, keypoints, visible, 64)
    close(datasets.cut_window(image, *window, 64), expected, 1e-5, "the same picture")
    close(photo.to_crop(keypoints, window)[visible > 0], points[visible > 0], 1e-5, "points")
    center, side = photo.window_of(person, "spin")
    close(center, [(60 + 70 + 72) / 3, (80 + 50 + 12) / 3], 1e-4, "SPIN's demo: the points' mean")
    assert side == pytest.approx(1.2 * 68)


def test_a_box_crop_shows_people_as_large_as_training_does(body):
    """A box holds the skin, keypoints lie inside: of the same people, both crops are alike."""
    batch, ratios = drawn_people(body, 16, 64), []
    skin = hmr.project(body(batch.betas, batch.rotmats).vertices, batch.cam)      # (64, V, 2)
    for points, keypoints in zip(100 * skin, 100 * batch.keypoints2d):
        low, high = points.amin(0), points.amax(0)
        window = photo.window_of(by_box(torch.cat([low, high - low])))
        size = (keypoints.amax(0) - keypoints.amin(0)).norm()
        ratios.append(window.side / (224 / 150 * size))
    assert 0.95 < sum(ratios) / 64 < 1.05, f"{sum(ratios) / 64:.3f} times the keypoint crop's side"


# ============================================================================================
# Files of keypoints

ROWS = [[4 * i, 3 * i, 2] for i in range(17)]                         # x, y, visible
GOOD = {"image_id": 9, "keypoints": sum(ROWS, [])}


def coco(*people, name="one.jpg", **more) -> dict:
    return {"images": [{"id": 9, "file_name": name, **more}], "annotations": people}


def points_of(content, photo_file: Path) -> list[photo.Person]:
    return photo.people_of(written(photo_file.parent / "points.json", content), photo_file)[1]


def at(person: photo.Person, name: str) -> list[float] | None:
    k = KEYPOINT_NAMES.index(name)
    return person.keypoints[k].tolist() if person.visible[k] else None


def test_coco_keypoints_are_put_in_order_by_name(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    one = blank(tmp_path / "b" / "one.jpg", 100, 200)
    wanted = [x for i in range(17) for x in (10 * i, 5 * i, i % 3)]
    odd = [{"iscrowd": 1}, {"keypoints": [0, 0, 0] * 17}, {"keypoints": None}, {"category_id": 17},
           {"keypoints": wanted, "bbox": [5, 6, 0, 8]}, {"keypoints": [3, 4]}]
    content = coco(*(GOOD | {"id": n} | row for n, row in enumerate(odd, 1)),
                   GOOD | {"image_id": 7}, name="x/b/one.jpg", width=200, height=100)
    content["images"].append({"id": 7, "file_name": "a/one.jpg"})     # the path's end says which
    person, = points_of(content, one)
    assert person.number == 3, "people are numbered in the file's order; no crowds, no dogs"
    printed = capsys.readouterr().out
    for words in ("person 1 is left out: 0 labelled points, 6 needed",
                  "person 2 is left out: without keypoints",
                  "person 4 is left out: broken rows, annotation 6's keypoints"):
        assert words in printed, words
    # 0 is not labelled, 1 and 2 are; COCO counts whole pixels, here pixel i covers [i, i + 1)
    for name, i in (("nose", 0), ("left_eye", 1), ("right_ear", 4), ("left_shoulder", 5),
                    ("right_wrist", 10), ("left_hip", 11), ("right_ankle", 16)):
        assert at(person, name) == ([10 * i + 0.5, 5 * i + 0.5] if i % 3 else None), name
    # PoseTrack's names
    names = ["nose", "head_bottom", "head_top", *datasets.COCO_NAMES[3:]]
    content["categories"] = [{"id": 2, "name": "person", "keypoints": names}]
    content["annotations"] = [GOOD | {"category_id": 2}]
    person, = points_of(content, one)
    assert at(person, "left_eye") is None and at(person, "head_top") == [8.5, 6.5]


FLAT = {count: [x for i in range(count) for x in (i, 2 * i, 1.02)] for count in (18, 25)}
LOW = [[i, 2 * i, 0.19 if i == 3 else 0.2] for i in range(17)]


@pytest.mark.parametrize("content, places", [
    ([[i, 2 * i, 1] for i in range(19)], {"right_ankle": 0, "neck": 12, "right_ear": 18}),
    *((x, {"left_ear": None, "left_ankle": 15}) for x in (LOW, sum(LOW, []), [
        GOOD, {"image_id": 785, "keypoints": sum(LOW, []), "category_id": 1, "score": 0.9}])),
    *(({"people": [{key: FLAT[count]}]}, {"right_wrist": 4, "left_wrist": 7, "neck": None,
                                          "right_ankle": more, "left_ear": more + 7})
      for count, key, more in ((25, "pose_keypoints_2d", 11), (18, "pose_keypoints", 10)))],
    ids=["19", "17", "51", "results", "BODY_25", "COCO18"])
def test_what_detectors_write_is_read(tmp_path, content, places):
    """Rows, COCO results, OpenPose's JSON; a confidence below 0.2 is no label."""
    person, = points_of(content, blank(tmp_path / "COCO_000785.jpg", 90, 90))
    for name, i in places.items():
        assert at(person, name) == (None if i is None else [i + 0.5, 2 * i + 0.5]), name


def test_bad_keypoint_files_end_in_a_sentence(tmp_path, capsys):
    one, bad = blank(tmp_path / "one.jpg", 50, 60), tmp_path / "bad.json"
    cases = [("", "not JSON"), ("[" * 100_000, "not JSON")] + [
        (json.dumps(content), words) for content, words in (
            (3, "or 19 rows"), ({}, "or 19 rows"), ([], "or 19 rows"), ([[1, 2, 1], [3]], "or 19"),
            ([[1, 2, "x"]] * 17, "or 19 rows"), ([[1, 2, 1]] * 16, "or 19 rows"),
            ([[1, 2, 0]] * 17, "with 6 labelled points"), ([[1, 2, 7]] * 17, "with 6 labelled"),
            ([[1, 2, 1]] * 17, "who is 5 pixels large"), (coco({"image_id": 9}), "with 6 labelled"),
            ([[99 + 9 * i, 2, 1] for i in range(17)], "inside the photo"),
            ([[math.nan, 1e39, 1]] * 17, "with 6 labelled"),
            (coco(GOOD, name="two.jpg"), "0 of its images are called one.jpg"))]
    for text, words in cases:
        bad.write_text(text, encoding="utf-8")
        is_sentence([one, "--keypoints", bad, "--fit"], capsys, "bad.json", words)
    written(bad, coco(GOOD, width=61, height=50))
    is_sentence([one, "--keypoints", bad, "--fit"], capsys, "one.jpg", "61 x 50")
    is_sentence([one, "--keypoints", tmp_path, "--fit"], capsys, str(tmp_path), "a folder")
    for n in (0, 3):
        is_sentence([one, "--keypoints", written(bad, coco(GOOD, GOOD)), "--fit", "--person", n],
                    capsys, f"--person {n}", "has 2")


def test_a_photo_is_turned_as_its_labels_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                  # a quarter turn
    one, file = blank(tmp_path / "one.jpg", 60, 80, exif=exif), tmp_path / "k.json"
    for size, shape in (({}, (80, 60)), (dict(width=60, height=80), (80, 60)),
                        (dict(width=80, height=60), (60, 80))):
        assert photo.people_of(written(file, coco(GOOD, **size)), one)[0].shape[1:] == shape, size


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
    assert photo.detect(random_detector, image, "one.jpg")["annotations"] == [], "nobody is sure"
    monkeypatch.setattr(photo, "SURE", answer["scores"][2].item())
    monkeypatch.setattr(photo, "POINT_SCORE", answer["keypoints_scores"][:3].median().item())
    found = photo.detect(random_detector, image, "one.jpg")
    assert found["images"] == [{"id": 1, "file_name": "one.jpg", "width": 80, "height": 60}]
    labels = []
    for row, box, points in zip(found["annotations"], answer["boxes"], answer["keypoints"]):
        table, (x, y, w, h) = torch.tensor(row["keypoints"]).view(17, 3), row["bbox"]
        # written with one decimal
        close(table[:, :2], points[:, :2], 0.051, "x, y as torchvision gives them")
        close([x, y, x + w, y + h], box, 0.102, "x, y, w, h")
        labels += table[:, 2].tolist()
    assert len(labels) == 3 * 17 and set(labels) == {0, 2}, "points of a low score are no labels"


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
    for error, words in ((urllib.error.URLError("x"), "no network to reach https://download"),
                         (PermissionError("x"), "cannot be read or written"),
                         (RuntimeError("x"), "is cut or not what its name says")):
        def fail(self, **_):
            raise error
        monkeypatch.setattr(weights, "get_state_dict", fail)
        is_sentence([blank(tmp_path / "one.png"), "--fit"], capsys, words, "--keypoints FILE.json")


class Finds(nn.Module):
    """In the detector's place: it finds the sample's person, or two of her, or nobody."""

    def __init__(self, people: int):
        super().__init__()
        row, = json.loads(ITS_KEYPOINTS.read_text())["annotations"]
        points, (x, y, w, h) = torch.tensor(row["keypoints"]).float().view(17, 3), row["bbox"]
        self.answer = {"boxes": torch.tensor([[x, y, x + w, y + h]] * people).view(people, 4),
                       "scores": torch.full((people,), 0.99),
                       "keypoints": points.repeat(people, 1, 1),
                       "keypoints_scores": torch.full((people, 17), 9.0)}

    def forward(self, images):
        return [self.answer]


def test_a_photo_alone_gives_what_its_keypoints_give(tmp_path, monkeypatch, judge, capsys):
    fit, stem = photo.fit, SAMPLE.stem
    monkeypatch.setattr(photo, "kept_discriminators", lambda smpl: judge)
    monkeypatch.setattr(photo, "load_detector", lambda device: Finds(1))
    monkeypatch.setattr(photo, "fit", lambda *args: fit(*args, headings=2, steps=3))
    alone, given, two, none = (tmp_path / name for name in "abcd")
    assert command(SAMPLE, "--fit", "--out", alone) == 0
    assert "Keypoint R-CNN: 1, scores 0.990" in capsys.readouterr().out
    assert names_in(alone) == [stem + end for end in (".json", ".obj", ".png", "_keypoints.json")]
    assert command(SAMPLE, "--fit", "--keypoints", ITS_KEYPOINTS, "--sheet", "--out", given) == 0
    a, b = ((folder / f"{stem}.json").read_text() for folder in (alone, given))
    assert a == b, "the same points, the same body"
    printed = capsys.readouterr().out
    assert printed.count("px an axis") == 2 and printed.count("+ 0.0 L_adv") == 1
    one, both = (read_picture(given / f"{stem}{end}.png") for end in ("", "_fits"))
    assert torch.equal(both[:, :425], one) and both.shape == (3, 850, one.shape[2])
    assert not torch.equal(both[:, 425:], one), "below: without L_adv"
    # a point that is mended by hand is used by the next run, which needs no detector
    monkeypatch.setattr(photo, "load_detector", lambda device: None)
    found = alone / f"{stem}_keypoints.json"
    found.write_text(found.read_text().replace("367.0", "340.0"))     # the nose's x
    assert command(SAMPLE, "--fit", "--out", alone) == 0
    assert (alone / f"{stem}.json").read_text() != a
    (alone / f"{stem}.json").unlink()
    is_sentence([blank(tmp_path / SAMPLE.name), "--fit", "--out", alone], capsys, found.name,
                "is not of this photo")
    monkeypatch.setattr(photo, "load_detector", lambda device: Finds(2))
    assert command(SAMPLE, "--fit", "--person", 2, "--out", two) == 0
    assert names_in(two) == [f"{stem}_{end}" for end in ("2.json", "2.obj", "2.png",
                                                         "keypoints.json")]
    monkeypatch.setattr(photo, "load_detector", lambda device: Finds(0))
    is_sentence([SAMPLE, "--fit", "--out", none], capsys, SAMPLE.name, "finds no people")
    assert not none.exists()


# ============================================================================================
# The command

class Answers(HMR):
    """A network that gives these Thetas, one after the other, and keeps what it was shown."""

    def __init__(self, smpl, *answers: Tensor):
        super().__init__(smpl, depth=18, rotation="6d")
        self.answers, self.seen = list(answers), []

    def forward(self, images):
        self.seen.append(images)
        return [self.answers.pop(0)], None


def instead(monkeypatch, network: HMR, world="photographs") -> None:
    """The command loads this network."""
    monkeypatch.setattr(photo, "load_network", lambda *args: spin.Network(
        network, None, train.Config(size=64, device="cpu"), "official", world))


def test_a_photo_becomes_a_picture_a_mesh_and_numbers(tmp_path, monkeypatch, body):
    """Told the Theta of a drawn person in the photo, the command gives back her pixels."""
    batch, one = drawn_people(body, 16, 1), tmp_path / "one.png"
    data.save_png(one, torch.ones(3, 300, 1280))
    picture = photo.Window(torch.tensor([214.0, 84]), 128.0)
    truth = photo.to_photo(batch.keypoints2d[0], picture)             # (19, 2) pixels of the photo
    box = torch.cat([truth.amin(0), truth.amax(0) - truth.amin(0)])
    window = photo.window_of(by_box(box))
    S, t = photo.camera_of_photo(batch.cam, picture).split([1, 2], 1) # pixel = S (X + t)
    close(S * (batch.keypoints3d[0, :, :2] + t), truth, 0.01, "the photo's camera")
    cam = torch.cat([S * 2 / window.side, t - window.center / S], 1)  # of the crop
    network = Answers(body, torch.cat([cam, batch.rotmats[..., :2].flatten(1), batch.betas], 1))
    instead(monkeypatch, network)
    assert command(one, "--checkpoint", "any", "--out", tmp_path / "out", "--bbox",
                   ",".join(map(str, box.tolist()))) == 0
    assert network.seen[0].shape == (1, 3, 64, 64)
    numbers = json.loads((tmp_path / "out" / "one.json").read_text(encoding="utf-8"))
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
    lines = (tmp_path / "out" / "one.obj").read_text().splitlines()
    v = torch.tensor([[float(x) for x in line.split()[1:]] for line in lines if line[0] == "v"])
    close(v, vertices[0] * torch.tensor([1.0, -1, -1]), 1e-5, "the mesh, metres, y up")
    # a photo of more than 1,024 pixels is shrunk: input, overlay, two views
    drawn = read_picture(tmp_path / "out" / "one.png").float() / 255
    assert drawn.shape == (3, 240, 1024 + 1024 + 240 + 240) and (drawn[..., :1024] == 1).all()
    rows, columns = (drawn[..., 1024:2048].amin(0) < 0.9).nonzero(as_tuple=True)
    skin = 0.8 * S * (vertices[0, :, :2] + t)                         # (V, 2)
    found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    # anti-aliased: a pixel's edge may be drawn too pale to count
    close(found, torch.cat([skin.amin(0), skin.amax(0)]), 1.5, "the silhouette's box, pixels")
    for view in drawn[..., 2048:].split(240, 2):
        assert 120 < (view.amin(0) < 0.9).any(1).sum() <= 240, "turned views fill their square"


@pytest.mark.parametrize("world, said", [("drawn people", True), ("drawn people, in capes", True),
                                         ("photographs (spin 4 people)", False)])
def test_a_whole_photo_or_a_box_and_what_to_expect_of_the_network(tmp_path, body, monkeypatch,
                                                                  capsys, world, said):
    theta, one = mean_theta(body.mean_pose, "6d"), blank(tmp_path / "one.jpg")
    instead(monkeypatch, Answers(body, theta, theta), world)
    for more, words, center in (([], "the whole photo is taken for one person", [40, 30]),
                                (["--bbox", "-5,-5,30,40"], "one.png, .obj, .json", [10, 15])):
        assert command(one, "--checkpoint", "any", "--out", tmp_path / "out", *more) == 0
        printed = capsys.readouterr().out
        assert words in printed and ("drawn people is not expected to work" in printed) == said
        assert json.loads((tmp_path / "out" / "one.json").read_text())["window"]["center"] == center


def test_every_person_has_files_of_its_own(tmp_path, body, monkeypatch, capsys):
    one, theta = blank(tmp_path / "one.jpg"), mean_theta(body.mean_pose, "6d")
    file = written(tmp_path / "k.json", coco(GOOD, {"image_id": 9}, GOOD))
    common = [one, "--checkpoint", "any", "--keypoints", file, "--out"]
    every = [f"one_{n}.{end}" for n in (1, 3) for end in ("json", "obj", "png")]
    behind, nan = theta.clone(), theta.clone()
    behind[:, 0], nan[:, 50] = -1, math.nan
    for folder, answers, more, names, words in (
            ("all", (theta, theta), [], every, "person 2 is left out: without keypoints"),
            ("third", (theta,), ["--person", 3], every[3:], "one_3.png"),
            ("behind", (behind, theta), [], every[3:], "person 1 is left out: no body found")):
        instead(monkeypatch, Answers(body, *answers))
        assert command(*common, tmp_path / folder, *more) == 0
        assert names_in(tmp_path / folder) == names and words in capsys.readouterr().out
    instead(monkeypatch, Answers(body, behind, nan))
    is_sentence([*common, tmp_path / "none"], capsys, "one.jpg: no body found")


def test_bad_options_end_in_a_sentence_and_nothing_is_overwritten(tmp_path, body, monkeypatch,
                                                                  capsys):
    one, rows = blank(tmp_path / "one.png"), written(tmp_path / "one.json", ROWS)
    theta, before = mean_theta(body.mean_pose, "6d"), one.read_bytes()
    with pytest.raises(SystemExit):
        command(one)                              # neither --fit nor --checkpoint
    for argv, words in (
            (["--fit", "--bbox", "0,0,9,9"], "--keypoints"), (["--checkpoint", one], "not a read"),
            (["--checkpoint", tmp_path / "absent.pt"], "no such file"),
            (["--person", 2, "--checkpoint", "x"], "--person 2"),
            (["--checkpoint", "x", "--out", tmp_path], "one.json there is not of this photo"),
            (["--checkpoint", "x", "--out", tmp_path, "--keypoints", rows], "another folder"),
            *((["--checkpoint", "x", "--bbox", box], f"--bbox {box}: expected four numbers")
              for box in ("1,2,3", "a,2,3,4", "0,0,1,1", "0,0,0,9", "nan,0,9,9", "0,0,inf,9",
                          "90,0,9,9", "-20,0,9,9"))):
        is_sentence([one, *argv], capsys, words)
    assert one.read_bytes() == before and names_in(tmp_path) == ["one.json", "one.png"]
    instead(monkeypatch, Answers(body, theta, theta))
    (tmp_path / "b").mkdir()
    other = blank(tmp_path / "b" / "one.png", 61)
    common = ["--checkpoint", "x", "--out", tmp_path / "c"]
    assert command(one, *common) == 0 and command(one, *common) == 0, "the same photo may again"
    is_sentence([other, *common], capsys, "one.json there is not of")


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
            out = model.decode(thetas)
            for n in range(2):
                one = [x[n:n + 1] for x in out[:-1]]
                close(found["L_kp"][n], hmr.keypoint_loss(one[5], keypoints[None], visible[None]),
                      1e-5, "Eq. (3) of each heading's body")
                close(found["L_adv"][n], hmr.encoder_adversarial_loss(
                    judge(one[0][:, 1:], one[1])), 1e-4, "Eq. (7) of each")
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
        torch.rand(1)
        return nn.utils.parameters_to_vector(photo.kept_discriminators(
            body, steps=steps, N=8).parameters())
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
    torch.manual_seed(0)
    resnet = torchvision.models.resnet50(weights=None).state_dict()
    shapes = {name: x.shape for name, x in resnet.items() if not name.startswith("fc.")}
    for name, inputs, outputs in (("fc1", 2205, 1024), ("fc2", 1024, 1024), ("decpose", 1024, 144),
                                  ("decshape", 1024, 10), ("deccam", 1024, 3)):
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    noise = 0.05 * torch.randn(max(math.prod(shape) for shape in shapes.values()))
    weights = {name: noise[:math.prod(shape)].view(shape) for name, shape in shapes.items()}
    for name in weights:
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(5)
        elif name.endswith("running_var") or ".bn" in name and name.endswith("weight"):
            weights[name] = 1 + weights[name]                         # a variance is positive
    # Theta_0: upright, and every joint turned a little
    weights["init_pose"] = torch.tensor([[1.0, 0, 0, -1, 0, 0] + [1, 0, 0, 1, 0, 0] * 23]) \
        + 0.1 * torch.randn(1, 144)
    weights["init_cam"], weights["init_shape"] = torch.tensor([[0.9, 0, 0]]), torch.randn(1, 10)
    path = tmp_path_factory.mktemp("spin") / "model_checkpoint.pt"
    torch.save({"model": weights, "epoch": np.int64(3), "batch_size": 64,
                "dataset_perm": np.arange(5), "total_step_count": np.float64(7.0)}, path,
               _use_new_zipfile_serialization=False)
    return path, weights


def spins_own_output(weights: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """SPIN's forward pass from its description: image (B, 3, 224, 224) in [0, 1] ->
    the first two columns of rotation matrices (B, 24, 3, 2), betas (B, 10), cam (B, 3)."""
    resnet = torchvision.models.resnet50(weights=None).eval()
    resnet.fc = nn.Identity()
    resnet.load_state_dict({k: v for k, v in weights.items() if k in resnet.state_dict()})
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    feature = resnet((image - mean) / std)                            # (B, 2048)
    state = {name: weights[f"init_{name}"].expand(len(image), -1)
             for name in ("pose", "shape", "cam")}

    def layer(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    for _ in range(3):
        x = layer("fc2", layer("fc1", torch.cat([feature, *state.values()], 1)))  # (B, 1024)
        state = {name: value + layer(f"dec{name}", x) for name, value in state.items()}
    six = state["pose"].view(-1, 24, 6)
    a1, a2 = six[..., 0::2], six[..., 1::2]                           # interleaved columns of R
    b1 = a1 / a1.norm(dim=-1, keepdim=True)
    b2 = a2 - (b1 * a2).sum(-1, keepdim=True) * b1
    return [torch.stack([b1, b2 / b2.norm(dim=-1, keepdim=True)], -1), state["shape"], state["cam"]]


def test_spins_weights_give_spins_output(published, body, capsys):
    path, weights = published
    model, image = spin.load_spin(path, body), torch.rand(2, 3, 224, 224)
    assert "SPIN was trained with SMPL's neutral body" in capsys.readouterr().out
    assert isinstance(model, HMR) and not model.training
    image[1, :, 60:] = 0
    with torch.inference_mode():
        thetas, out = model(image)
        columns, betas, cam = spins_own_output(weights, image)
    assert [tuple(theta.shape) for theta in thetas] == [(2, 157)] * 3
    start, size = model.regressor.theta_bar, betas.abs().max()        # thousands: random weights
    assert (thetas[-1] - start).abs().max() > 0.1, "the test says nothing if nothing moves"
    assert (thetas[-1][0] - thetas[-1][1]).abs().max() > 1e-4, "nor if pictures make no difference"
    close(out.rotmats[..., :2], columns, 1e-4, "24 rotations: a ReLU, the order of Theta, 6D?")
    close(out.betas / size, betas / size, 1e-5, "betas")
    close(out.cam / size, cam / size, 1e-5, "the camera")
    close(start[:, :3], [[0.9, 0, 0]], 1e-6, "Theta in our order: the camera first")


def test_what_differs_from_spins_layout_is_listed(published, tmp_path, body):
    bad = {f"module.{name}": x for name, x in published[1].items() if name != "fc2.bias"}
    bad["module.fc9.weight"] = torch.zeros(2)
    for weights, words in ((bad, r"2 of .* fc2.bias is missing.* fc9.weight is "),
                           ({"fc1.weight": torch.zeros(2)}, "not SPIN's checkpoint")):
        torch.save({"model": weights}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match="bad.pt: " + words):
            spin.load_spin(tmp_path / "bad.pt", body)


def test_spins_weights_are_shown_a_photo_as_spin_shows_it(published, tmp_path, monkeypatch, capsys):
    one, seen, encode = tmp_path / "one.png", [], HMR.encode
    Image.new("RGB", (80, 60), (255, 255, 255)).save(one)
    monkeypatch.setattr(HMR, "encode", lambda self, x: seen.append(x) or encode(self, x))
    # random weights may answer with any camera: give it one
    monkeypatch.setattr(spin.SpinRegressor, "forward", lambda self, x: [self.theta_bar])
    assert command(one, "--checkpoint", published[0], "--bbox", "0,0,20,40", "--device", "cpu",
                   "--out", tmp_path / "out") == 0
    numbers = json.loads((tmp_path / "out" / "one.json").read_text())
    assert numbers["window"] == {"center": [10, 20], "side": 40} and numbers["crop_pixels"] == 224
    image, = seen
    assert (image[0, :, :, :50] == 0).all() and (image[0, :, 30:200, 80:] > 0.999).all(), \
        "beyond the photo SPIN sees black"
    assert "drawn people" not in capsys.readouterr().out
