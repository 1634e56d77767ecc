"""SMPL, a body that one can differentiate: (betas, pose) -> vertices, joints, keypoints.

Chapter 1 of 4 (smpl.py <- hmr.py <- data.py <- train.py: each chapter imports those before it).
The chapter is HMR Sec. 3.1.  SMPL is Loper et al., "SMPL: A Skinned Multi-Person Linear Model",
2015.  SMPL starts from a mesh of V vertices in a T-pose.  It (1) gives the mesh a person's shape,
(2) finds that person's joints, (3) corrects the mesh for the pose, (4) poses the skeleton, and
(5) moves the skin along with the skeleton.  The function `lbs` below is these five steps.  Read
`lbs` first.

Axes:  B bodies   V vertices (1,229 in the open body, 6,890 in SMPL)   F triangles   24 joints
       U vertices that the keypoints are made of   19 keypoints   10 betas   C coefficients
       207 = 23 joints * 9 numbers of a rotation matrix
Frame: SMPL's own frame has x towards the person's LEFT, y UP, z forward (out of the chest), in
       metres.  The camera's frame in hmr.py has y DOWN.  The rotation Rx(pi), half a turn about
       the x axis, turns either frame into the other.  This chapter knows nothing about cameras.
Rotations act on column vectors, v' = R v.  `pose` holds axis-angle vectors: the direction of such
a vector is the axis, its length is the angle in radians.

    python smpl.py               # shapes and known values; writes a posed body to out/smpl.obj
    python smpl.py --smpl FILE   # the same with an official SMPL file: does the file load?
"""

import argparse
import hashlib
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------
# 1. The skeleton: names and numbers that everything else indexes by

JOINT_NAMES = (
    "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle",
    "right_ankle", "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar",
    "head", "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist",
    "right_wrist", "left_hand", "right_hand")
# PARENTS is the kinematic tree.  PARENTS[i] < i, so a loop over the joints 1..23 meets each parent
# before its children.
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)

# The 19 keypoints that pictures are labelled with are NOT the 24 joints.  A keypoint is a weighted
# mean of vertices.  The order is HMR's "cocoplus": LSP's 14 points, then COCO's 5 of the face.
KEYPOINT_NAMES = (
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "right_wrist",
    "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist", "neck",
    "head_top", "nose", "left_eye", "right_eye", "left_ear", "right_ear")

# In a mirrored person joint i takes the place of joint FLIP_JOINTS[i].  Flipping twice is identity.
FLIP_JOINTS = (0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22)
FLIP_KEYPOINTS = (5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6, 12, 13, 14, 16, 15, 18, 17)

OPEN_BODY = Path(__file__).resolve().parent / "assets" / "body.npz"


# --------------------------------------------------------------------------------------------
# 2. Rotations

def batch_rodrigues(pose: Tensor) -> Tensor:
    """Axis-angle to rotation matrix.  Value and gradient are exact to rounding, also at zero.

    pose (..., 3) radians -> (..., 3, 3).  Rodrigues: R = I + sin(a)/a K + (1 - cos a)/a^2 K^2,
    where a = |r| and K = [r]x, the matrix with K v = r x v.  The published implementations compute
    the angle of r + 1e-8 instead.  Their result is NaN at r = (-1e-8, -1e-8, -1e-8) and inexact
    near zero.  Here both factors are functions of a^2, and near zero, where the quotients would be
    0/0, their Taylor series take over.  Raises ValueError if the last axis is not 3.
    """
    if pose.shape[-1:] != (3,):
        raise ValueError(f"axis-angle must be (..., 3), got {tuple(pose.shape)}")
    a2 = pose.square().sum(-1)[..., None, None]                       # (..., 1, 1)
    small = a2 < 1e-4             # so that the series' next terms are below 1e-21
    # Where a is small, we divide by 1 instead, and `where` discards that quotient.  If we
    # divided by a, its value would be discarded, too, but the backward pass would multiply 0 by
    # infinity.
    safe = torch.where(small, torch.ones_like(a2), a2)
    a = safe.sqrt()
    sin_over_a = torch.where(small, 1 - a2 / 6 * (1 - a2 / 20 * (1 - a2 / 42)), a.sin() / a)
    # 1 - cos a = 2 sin^2(a/2).  In float32 the right side loses no digits at small angles.
    versine_over_a2 = torch.where(small, 0.5 - a2 / 24 * (1 - a2 / 30 * (1 - a2 / 56)),
                                  2 * (a / 2).sin().square() / safe)
    x, y, z = pose.unbind(-1)                                         # (...) each
    o = torch.zeros_like(x)
    K = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))   # (..., 3, 3)
    eye = torch.eye(3, dtype=pose.dtype, device=pose.device)
    return eye + sin_over_a * K + versine_over_a2 * (K @ K)           # (..., 3, 3)


def rot6d_to_rotmat(x: Tensor) -> Tensor:
    """Six numbers to a rotation matrix by Gram-Schmidt (Zhou et al. 2019); SPIN's form, not HMR's.

    x (..., 6) -> (..., 3, 3).  The layout is SPIN's: x, seen as a (3, 2) matrix, holds the first
    two columns of R, so that the identity is [1,0,0,1,0,0].  (4D-Humans stores one column after
    the other.)  Raises ValueError if the last axis is not 6.
    """
    if x.shape[-1:] != (6,):
        raise ValueError(f"6D rotations must be (..., 6), got {tuple(x.shape)}")
    a1, a2 = x.unflatten(-1, (3, 2)).unbind(-1)                       # (..., 3) each
    b1 = nn.functional.normalize(a1, dim=-1)
    b2 = nn.functional.normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1)
    b3 = torch.linalg.cross(b1, b2, dim=-1)
    return torch.stack([b1, b2, b3], -1)                              # (..., 3, 3) columns


# --------------------------------------------------------------------------------------------
# 3. The body

def blend_shapes(coefficients: Tensor, directions: Tensor) -> Tensor:
    """Offsets that are linear in some coefficients: (B, C), (V, 3, C) -> (B, V, 3).

    SMPL uses this formula twice: for the shape (C = 10 betas) and for the pose (C = 207).
    """
    V = directions.shape[0]
    offsets = coefficients @ directions.flatten(0, 1).T               # (B, V*3)
    return offsets.unflatten(-1, (V, 3))                              # (B, V, 3)


def batch_rigid_transform(rotmats: Tensor, joints: Tensor,
                          parents: tuple[int, ...] | Tensor) -> tuple[Tensor, Tensor]:
    """Forward kinematics: pose the skeleton.  Each rotation is given in its parent's frame.

    rotmats (B, 24, 3, 3) relative to the parent, joints (B, 24, 3) at rest ->
    posed joints (B, 24, 3), and A (B, 24, 4, 4), the motion of each bone from rest to posed.
    """
    # Each bone turns about its own joint J: x -> R (x - J) + J = R x + (J - R J).  Without the term
    # J - R J a bone turns about the origin, and the body explodes.  The root has a joint, too.
    t = joints - (rotmats @ joints[..., None])[..., 0]                # (B, 24, 3)
    last_row = torch.eye(4, dtype=t.dtype, device=t.device)[3].expand(*t.shape[:2], 1, 4)
    local = torch.cat([torch.cat([rotmats, t[..., None]], 3), last_row], 2)       # (B, 24, 4, 4)
    # Then the parent's motion is applied: A_i = A_parent local_i.  SMPL's paper writes
    # A_i = G_i(pose) G_i(rest)^-1.  Both give the same matrices: if one multiplies out two
    # bones, the bone vector J_i - J_parent cancels.
    bones = [local[:, 0]]                                             # (B, 4, 4) each
    for i in range(1, len(parents)):
        bones.append(bones[parents[i]] @ local[:, i])
    A = torch.stack(bones, 1)                                         # (B, 24, 4, 4)
    posed = A @ nn.functional.pad(joints, (0, 1), value=1.0)[..., None]           # (B, 24, 4, 1)
    return posed[:, :, :3, 0], A                                      # (B, 24, 3), (B, 24, 4, 4)


def lbs(betas: Tensor, rotmats: Tensor, v_template: Tensor, shapedirs: Tensor, posedirs: Tensor,
        J_regressor: Tensor, parents: tuple[int, ...] | Tensor,
        weights: Tensor) -> tuple[Tensor, Tensor]:
    """SMPL's function M(beta, theta): linear blend skinning of a corrected template.

    betas (B, 10), rotmats (B, 24, 3, 3), v_template (V, 3), shapedirs (V, 3, 10),
    posedirs (V, 3, 207), J_regressor (24, V), parents (24,), weights (V, 24)
    -> vertices (B, V, 3), joints (B, 24, 3), in metres.
    """
    # 1. Shape: add the person's own form.
    v_shaped = v_template + blend_shapes(betas, shapedirs)            # (B, V, 3)
    # 2. The joints of THIS person, in the rest pose and before any pose correction:
    #    J = J_regressor @ v_shaped.  einsum does it for all B bodies in one product.
    J = torch.einsum("jv,bvc->bjc", J_regressor, v_shaped)            # (B, 24, 3)
    # 3. Pose blend shapes correct what skinning alone gets wrong (elbows that collapse, knees that
    #    bulge).  They are linear in the elements of R - I, so that the rest pose needs none.
    #    The root is left out, because turning the whole body bends nothing.  With the root there
    #    would be 216 features instead of 207, and turning a body would deform it.
    eye = torch.eye(3, dtype=rotmats.dtype, device=rotmats.device)
    pose_feature = (rotmats[:, 1:] - eye).flatten(1)                  # (B, 207)
    v_posed = v_shaped + blend_shapes(pose_feature, posedirs)         # (B, V, 3)
    # 4. Kinematic chain.
    joints, A = batch_rigid_transform(rotmats, J, parents)            # (B, 24, 3), (B, 24, 4, 4)
    # 5. Skinning: each vertex follows a weighted mean T of the bones' motions, v' = T [v; 1].
    T = (weights @ A[:, :, :3].flatten(2)).unflatten(2, (3, 4))       # (B, V, 3, 4)
    v_homogeneous = nn.functional.pad(v_posed, (0, 1), value=1.0)     # (B, V, 4)
    vertices = (T @ v_homogeneous[..., None])[..., 0]                 # (B, V, 3)
    return vertices, joints                                           # (B, V, 3), (B, 24, 3)


# --------------------------------------------------------------------------------------------
# 4. A body file as a module

def without_autocast(method: Callable) -> Callable:
    """Decorator that switches a caller's autocast off: bfloat16 moves vertices by millimetres."""
    def in_full_precision(self, x: Tensor, *args, **options):
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *args, **options)
    return in_full_precision


def keypoint_body(data: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The part of a body that training needs -> its arrays for `lbs`, the indices of its vertices.

    The losses look at joints and keypoints, not at the skin.  So we keep a second, smaller body.
    Its points are the U vertices that the keypoints are made of, followed by the 24 rest joints.
    The rest joints, J_regressor @ (template + shapedirs betas), are linear in the betas, as
    vertices are.  So J_regressor is multiplied by template and shapedirs here, once.  No pose
    blend shape and no skinning applies to rest joints, so their posedirs and weights are 0.
    Step 2 of `lbs` picks the last 24 points.  The smaller body has 166 points, where the open
    body has 1,229.
    """
    J, used = data["J_regressor"], data["cocoplus_regressor"].any(0).nonzero()[0]  # (24, V), (U,)
    rest_joints = {"v_template": J @ data["v_template"],
                   "shapedirs": np.einsum("jv,vcn->jcn", J, data["shapedirs"]),
                   "posedirs": np.zeros((24, 3, 207)), "weights": np.zeros((24, 24))}
    small = {key: np.concatenate([data[key][used], rest_joints[key]]) for key in rest_joints}
    small["J_regressor"] = np.eye(24, len(used) + 24, len(used))      # (24, U + 24): the last 24
    return small, used


class SMPLOutput(NamedTuple):
    vertices: Tensor | None   # (B, V, 3), None if not asked for
    joints: Tensor            # (B, 24, 3) the skeleton's joints
    keypoints: Tensor         # (B, 19, 3) weighted means of the POSED vertices, KEYPOINT_NAMES


class SMPL(nn.Module):
    """A body file as a module.  `SMPL()` is the open body, `SMPL(path)` any SMPL .npz or .pkl.

    All arrays are buffers, so that `.double()` and `.to(device)` work.  No buffer is persistent.
    Checkpoints therefore hold no licensed body, and store only its `name` and `sha256`.
    Loading rounds to float32, and `.double()` does not bring the lost digits back.
    Raises FileNotFoundError or ValueError as `load_body` does.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        super().__init__()
        path = Path(path or OPEN_BODY)
        data = load_body(path)
        small, used = keypoint_body(data)
        self.name, self.sha256 = printable(path.name), hashlib.sha256(path.read_bytes()).hexdigest()
        self.parents = tuple(int(p) for p in data["parents"])
        regressor = data["cocoplus_regressor"]                        # (19, V)
        constants = {key: data[key] for key in small}
        constants |= {"kp_" + key: small[key] for key in small}       # the smaller body's arrays
        constants |= {"cocoplus_regressor": regressor, "kp_regressor": regressor[:, used],
                      "mean_pose": data["mean_pose"]}
        for key, array in constants.items():
            self.register_buffer(key, torch.tensor(array, dtype=torch.float32), persistent=False)
        self.register_buffer("kp_vertices", torch.tensor(used), persistent=False)     # (U,)
        self.register_buffer("faces", torch.tensor(data["f"]), persistent=False)      # (F, 3)

    @without_autocast
    def forward(self, betas: Tensor, pose: Tensor, vertices: bool = True) -> SMPLOutput:
        """betas (B, 10); pose (B, 72) or (B, 24, 3) axis-angle, or (B, 24, 3, 3) matrices.

        -> SMPLOutput in SMPL's frame, in metres.  With `vertices=False` only the smaller body is
        posed.  Raises ValueError for other shapes and dtypes.
        """
        if betas.ndim != 2 or betas.shape[1] != 10 or not {betas.dtype, pose.dtype} <= {
                torch.float32, torch.float64}:
            raise ValueError(f"betas must be (B, 10), and with the pose float32 or float64; got "
                             f"{tuple(betas.shape)}, {betas.dtype} and {pose.dtype}")
        B = betas.shape[0]
        if tuple(pose.shape) == (B, 24, 3, 3):
            rotmats = pose
        elif tuple(pose.shape) in ((B, 72), (B, 24, 3)):
            rotmats = batch_rodrigues(pose.reshape(B, 24, 3))         # (B, 24, 3, 3)
        else:
            raise ValueError(f"pose must be ({B}, 72), ({B}, 24, 3) or ({B}, 24, 3, 3) to go with "
                             f"betas {tuple(betas.shape)}, got {tuple(pose.shape)}")
        template, shapedirs, posedirs, J_regressor, weights = (
            getattr(self, key if vertices else "kp_" + key) for key in (
                "v_template", "shapedirs", "posedirs", "J_regressor", "weights"))
        v, joints = lbs(betas, rotmats, template, shapedirs, posedirs, J_regressor, self.parents,
                        weights)                          # (B, V or U + 24, 3), (B, 24, 3)
        v_used = v[:, self.kp_vertices] if vertices else v[:, :-24]   # (B, U, 3)
        # This is cocoplus_regressor @ vertices without the regressor's columns of zeros.
        keypoints = torch.einsum("ku,buc->bkc", self.kp_regressor, v_used)        # (B, 19, 3)
        return SMPLOutput(v if vertices else None, joints, keypoints)


# ============================================================================================
# Not needed to understand HMR: reading and writing files, ending a command.

def load_body(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a body file -> its arrays, checked.

    Keys: v_template (V,3), shapedirs (V,3,10), posedirs (V,3,207), J_regressor (24,V),
    weights (V,24), cocoplus_regressor (19,V), f (F,3), parents (24,), mean_pose (72,).
    The function first tries the project's own layout, a plain .npz.  Any other file goes to
    appendix/body_file.py, which reads official files and says what is wrong with a broken one.
    Raises FileNotFoundError or ValueError with one sentence that names file, key and remedy.
    """
    path = plain_file(path, "a body file; give --smpl its place, or leave --smpl out for the open "
                            "body")
    try:
        return read_plain_body(path)
    except Exception:                               # numpy, zipfile and zlib raise many kinds
        pass
    try:                                            # no other line imports the appendix
        from appendix.body_file import read_body_file
    except ModuleNotFoundError:                     # a copy without the appendix's folder
        raise ValueError(printable(f"{path}: not a body in this project's plain layout; official "
                                   f"files are read by appendix/body_file.py, which is missing "
                                   f"here; get the whole project")) from None
    return read_body_file(path)


def read_plain_body(path: Path) -> dict[str, np.ndarray]:
    """The project's own layout, as of assets/body.npz.  Any other file raises some exception."""
    with np.load(path, allow_pickle=False) as file:
        if sum(member.file_size for member in file.zip.infolist()) > 2 ** 27:
            raise ValueError("takes more than 1 GiB as float64")  # a number may be one byte
        V, F = len(file["v_template"]), len(file["f"])
        shapes = {"v_template": (V, 3), "shapedirs": (V, 3, 10), "posedirs": (V, 3, 207),
                  "J_regressor": (24, V), "weights": (V, 24), "cocoplus_regressor": (19, V),
                  "mean_pose": (72,), "f": (F, 3), "kintree_table": (2, 24)}
        stored = {key: file[key] for key in shapes}
    data = {key: array.astype(np.float64) for key, array in stored.items()
            if array.shape == shapes[key] and array.dtype.kind in "fiu"}
    # The official table stores the root's parent as 4294967295, which is -1 in uint32.
    data["parents"] = data.pop("kintree_table")[0].astype(np.int64).astype(np.int32)
    faces, data["f"] = data["f"], data["f"].astype(np.int64)
    finite = all(np.abs(array).max() < 1e15 for array in data.values())     # as float32, too
    if not (finite and data["parents"].tolist() == list(PARENTS) and (data["f"] == faces).all()
            and 0 <= faces.min() <= faces.max() < V):
        raise ValueError("the tree, the triangles or the numbers are not a body's")
    return {key: data[key] for key in (*shapes, "parents") if key != "kintree_table"}


def plain_file(path: str | os.PathLike, expected: str) -> Path:
    """The path of a file that can be opened.  Raises FileNotFoundError for a folder or a pipe."""
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no plain file" if path.exists() else "no such file"
        raise FileNotFoundError(printable(f"{path}: {what}; expected {expected}"))
    return path


def load_tensors(path: str | os.PathLike) -> dict:
    """A dict that torch.save wrote, read without running code.  Raises ValueError, OSError."""
    path = plain_file(path, "a checkpoint")
    try:
        if zipfile.is_zipfile(path):                # older files than PyTorch 1.6's are not
            with zipfile.ZipFile(path) as archive:  # PyTorch itself checks no checksums
                size = sum(member.file_size for member in archive.infolist())
                if size > 2 ** 32 or archive.testzip():
                    raise ValueError("more than 4 GiB, or a flipped bit")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}); it may be "
                         f"truncated or of another program") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors by name; name a checkpoint")
    return content


def require_finite(state: dict, name: str, remedy: str = "name another file") -> None:
    """Raises ValueError if a network's or an optimiser's state holds NaN or an odd tensor.

    A tensor is odd if it has no memory of its own for each of its numbers (sparse, expanded).  A
    later in-place write to it would change other numbers, too.
    """
    found = dict(state)
    for number, kept in state.get("state", {}).items():             # an optimiser's
        found |= {f"state.{number}.{key}": value for key, value in kept.items()}
    for key, x in found.items():
        if isinstance(x, Tensor) and not (
                x.layout == torch.strided and not x.is_meta and not x.is_quantized and x.numel()
                * x.element_size() <= x.untyped_storage().nbytes() and x.isfinite().all()):
            raise ValueError(f"{name}.{key} holds NaN or infinity, or is no plain tensor; {remedy}")


def say(text: str) -> None:
    """Print a line of a run.  The run goes on if nobody reads the line any more (`| head`)."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def save_obj(path: str | os.PathLike, vertices: Tensor, faces: Tensor) -> None:
    """Write one mesh, vertices (V, 3) and faces (F, 3), as Wavefront OBJ (which counts from 1)."""
    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices.tolist()]
    lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces.tolist()]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def write_atomically(path: str | os.PathLike, content: bytes, is_new: bool = False) -> None:
    """Write under a temporary name, then rename: an interrupted write leaves no half file.

    An old file stays until the rename.  With is_new no file may exist, and if two programs try at
    once, one of them fails.  Raises OSError with a sentence.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        if is_new:
            path.open("x").close()
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); name another folder, or make "
                      f"room") from None
    finally:                                        # after Ctrl-C, too
        if temporary.exists():
            temporary.unlink()


def printable(text: object) -> str:
    """Escape characters that could steer a terminal, as \\x1b or \\n, in a text of others."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def exit_status(program: str, run: Callable[[], None]) -> int:
    """Run a command -> its exit status.

    Bad input (ValueError, OSError) and a full memory print one sentence and return 2.  Ctrl-C
    returns 130.  Letters that the terminal cannot show are escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):          # a notebook's streams lack it
            stream.reconfigure(errors="backslashreplace")
    try:
        run()
        return 0
    except KeyboardInterrupt as error:
        status, why = 130, str(error) or "stopped"
    except (ValueError, OSError) as error:
        status, why = 2, str(error)
    except (RuntimeError, MemoryError) as error:    # of a GPU, of the CPU, of Python
        full = "MemoryError|out of memory|allocate memory|size calculation overflowed"
        if not re.search(full, f"{type(error).__name__}: {error}"):
            raise
        status, why = 2, "the memory is full; free some, or make --batch or --size smaller"
    print(f"{program}: {printable(why)}", file=sys.stderr)
    return status


# --------------------------------------------------------------------------------------------
# The demo

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pose a body; print shapes and known values.")
    parser.add_argument("--smpl", metavar="FILE", help="an SMPL .npz or .pkl (default: open body)")
    parser.add_argument("--out", default="out", help="folder for smpl.obj")
    args = parser.parse_args(argv)
    return exit_status("smpl.py", lambda: demo(SMPL(args.smpl), Path(args.out)))


def demo(smpl: SMPL, out: Path) -> None:
    pose = torch.zeros(2, 24, 3)                        # the rest pose and a posed body
    for name, axis, angle in (("left_shoulder", 2, -1.2), ("right_shoulder", 2, 0.9),
                              ("right_elbow", 1, 1.6), ("left_hip", 0, -0.6),
                              ("left_knee", 0, 0.9)):
        pose[1, JOINT_NAMES.index(name), axis] = angle  # radians about x, y or z
    vertices, joints, keypoints = smpl(torch.zeros(2, 10), pose)
    quarter = batch_rodrigues(torch.tensor([0, 0, torch.pi / 2])) @ torch.tensor([1.0, 0, 0])
    print(f"{smpl.name}, vertices, joints, keypoints:",
          *(tuple(x.shape) for x in (vertices, joints, keypoints)))
    for what, got, expected in [
            ("a quarter turn about z takes x to", [round(v, 3) for v in quarter.tolist()], "y"),
            ("zero betas and pose minus template, m",
             f"{(vertices[0] - smpl.v_template).abs().max():.1e}", "below 1e-6"),
            ("stature, m", f"{vertices[0, :, 1].max() - vertices[0, :, 1].min():.2f}", "about 1.7"),
            ("left wrist at x, m", f"{joints[0, 20, 0]:.2f}", "positive: left is +x")]:
        print(f"  {what:40s} {got!s:18s} expected {expected}")
    save_obj(out / "smpl.obj", vertices[1], smpl.faces)
    print(f"wrote {out / 'smpl.obj'}: arms down, right elbow and left leg bent")


if __name__ == "__main__":
    sys.exit(main())
