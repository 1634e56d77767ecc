"""Real data for HMR: the crop that the official code makes, its jitter, and the flip.

No chapter calls these: the people of data.py are rendered already cropped, and mirrored as poses.
They are for photographs (Sec. 3.4; official data_loader).

Axes:  H, W pixels of a picture   size = 224 pixels of a crop   19 keypoints
2D as everywhere: crop coordinates in [-1, 1]; a picture's pixel i covers [i, i + 1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from data import CROPS, Batch
from smpl import FLIP_JOINTS, FLIP_KEYPOINTS


def person_scale(keypoints: Tensor, visible: Tensor, crop: str = "official") -> float:
    """How many pixels of a 224 crop a picture's pixel becomes, by the official converters' rule.

    Where an ankle is visible, the diagonal of the visible points' box becomes 150 pixels; where
    none is (the person is cut off), the mean shoulder-to-hip distance 75; without that the box 50.
    (COCO's converter.  MPII's takes head top to hip, 75, else shoulder to hip, 56, else leaves the
    person out.)  crop: of data.CROPS; another than the official one scales all three alike.
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
    return wanted * CROPS[crop][0] / 150 / length


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
    H, W = image.shape[1:]
    if side > size:                                    # shrinking: low-pass first, or it aliases
        shrunk = [max(1, round(length * size / side)) for length in (H, W)]
        image = vision.resize(image, shrunk, antialias=True)          # (3, h, w)
    # Crop coordinates in [-1, 1] -> the picture's, in [-1, 1] as well, so the shrinking drops out.
    extent = keypoints.new_tensor([W, H])                             # (2,)
    window = torch.cat([torch.diag(side / extent), (2 * center / extent - 1)[:, None]], 1)  # (2, 3)
    grid = F.affine_grid(window[None], [1, 3, size, size], align_corners=False)
    picture = F.grid_sample(image[None], grid, "bilinear", padding_mode="border",
                            align_corners=False)[0]                   # (3, size, size)
    points = 2 * (keypoints - center) / side                          # (19, 2)
    return picture, torch.where(visible[:, None] > 0, points, torch.zeros_like(points))


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
