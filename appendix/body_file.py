"""Official SMPL files, and how they are read without chumpy.

    python -m appendix.body_file SMPL_NEUTRAL.pkl body.npz     # writes the project's plain layout

An official file is a pickle of Python 2 that holds chumpy's and scipy's objects, and a pickle is a
program.  `BodyUnpickler` runs it with an inert stand-in for each name that such files hold: it
imports and calls nothing, and refuses other names.  `plain` makes arrays of the stand-ins.  (A
forged state makes numpy's and scipy's own classes read and write anywhere in memory.)

Axes:  V vertices   F triangles   24 joints   19 keypoints   10 betas   207 pose features
"""

import argparse
import functools
import io
import pickle
import re
import sys
from pathlib import Path
from typing import Callable

import numpy as np

import smpl
from smpl import JOINT_NAMES, KEYPOINT_NAMES, PARENTS, printable

NAMES = ("_reconstruct", "_frombuffer", "ndarray", "dtype", "scalar", "csc_matrix", "csr_matrix",
         "Ch", "Select", "Reshape", "transpose",                      # chumpy's
         "_reconstructor", "object", "set", "encode", "bytes")        # Python's own
KEYS = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f",
        "cocoplus_regressor", "mean_pose")      # the last two: HMR's, this project's
# What people get in place of a body: its first bytes, with which no pickle begins, and what to do.
MISTAKEN = {b"<": "an HTML page: log in and download again",
            b"version https://git-lfs": "a Git LFS pointer: run git lfs pull",
            b"\x1f\x8b": "a gzip archive: unpack it and name the file in it",
            (b"{", b"["): "JSON: get an official .pkl"}


class Refused(ValueError):
    """The file is not broken: it wants something that no body file needs."""


class StandIn:
    """What a pickle wants to be made: the name it calls, arguments, state.  Nothing is called."""
    state = {}

    def __init__(self, name, args):
        self.name = args[0] if name == "_reconstructor" else name     # protocols 0 and 1
        self.args = args[:9]                    # no class here takes more; a text may have millions


def obey(run: Callable, unpickler: "BodyUnpickler") -> None:
    """Run one instruction of a pickle, unless it could fill the memory; a body takes some 1,000."""
    unpickler.left -= 1
    if unpickler.left < 0:
        raise Refused("it asks for over 20,000 instructions")
    run(unpickler)
    top = unpickler.stack[-1] if unpickler.stack else None
    if isinstance(top, bytes):
        unpickler.stack[-1] = top.decode("latin1")                    # as Python 2's strings
    elif isinstance(top, tuple):                # to hash a tuple of one tuple twice, and so on 60
        unpickler.stack[-1] = list(top)         # times, takes for ever; a list has no hash


class BodyUnpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, because its instructions can be replaced."""
    left = 20_000

    def find_class(self, module, name):
        if name not in NAMES:
            raise Refused(f"it asks for {module:.80}.{name:.80}")
        return name

    def call(self):
        name, args = self.stack[-2:]            # bytes of Python 3 are a call in protocols 0 to 2
        self.stack[-2:] = ["".join(args[:1]) if name in ("encode", "bytes") else
                           StandIn(name, args)]

    def build(self):
        state = self.stack.pop()
        self.stack[-1].state = state

    dispatch = pickle._Unpickler.dispatch | {
        pickle.REDUCE[0]: call, pickle.NEWOBJ[0]: call, pickle.BUILD[0]: build,
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8}       # takes no memory ahead
    dispatch = {code: functools.partial(obey, run) for code, run in dispatch.items()
                if code not in pickle.DUP + pickle.FROZENSET + pickle.NEWOBJ_EX}    # of no body


def require_size(numbers: int) -> None:
    if numbers > 2 ** 27:                       # 1 GiB as float64, and in an .npz at least a byte
        raise Refused("it unpacks to more than 128 million numbers or bytes")


def array_of(value: StandIn) -> np.ndarray:
    """numpy's two ways to write an array; frombuffer and reshape count the numbers."""
    if value.name == "_frombuffer":             # in protocol 5, unless the array has gaps
        data, dtype, shape, order, *axes = value.args
    else:                                       # _reconstruct, any array in any protocol
        _, shape, dtype, fortran, data = value.state
        order = "F" if fortran else "C"
    code = dtype.state[1] + dtype.args[0]                             # as "<f8"
    if not re.fullmatch("[<>|](b1|f[248]|[iu][1248])", code):
        raise ValueError(f"an array of {code!r}, not of numbers")
    array = np.frombuffer(data.encode("latin1"), code)
    require_size(array.size)                    # a Select by so many bytes is 8 times as large
    if order == "K":                            # numpy 2.3: as in memory, and the order of the axes
        return array.reshape(shape).transpose(*axes)
    return array.reshape(shape, order=order)


def dense(kind: str, part: dict) -> np.ndarray:
    """scipy's matrix as an array.  numpy itself checks counts and places, but for negative ones."""
    data, indices, starts = (array_of(part[key]) for key in ("data", "indices", "indptr"))
    count, (rows, columns) = np.diff(starts.astype(np.int64)), part.get("_shape") or part["shape"]
    if not (0 < rows < 10 ** 6 and 0 < columns < 10 ** 6 and rows * columns < 10 ** 7 and
            indices.min() >= 0 and data.shape == indices.shape == (count.sum(),)):
        raise ValueError("a sparse matrix whose numbers have no place in it")
    lines, matrix = np.repeat(np.arange(len(count)), count), np.zeros((rows, columns))
    np.add.at(matrix, (indices, lines) if kind == "csc_matrix" else (lines, indices), data)
    return matrix


def plain(value: StandIn) -> np.ndarray:
    """Stand-ins, nested as chumpy nests them, as one array."""
    kind, part = value.name, value.state
    if kind in ("_reconstruct", "_frombuffer"):
        return array_of(value)
    if kind.endswith("_matrix"):
        return dense(kind, part)
    array = plain(part["x" if kind == "Ch" else "a"])
    if kind == "transpose":
        return array.transpose(part.get("axes"))
    if kind == "Select":
        array = array.ravel()[array_of(part["idxs"])]
    shape = part.get("preferred_shape", part.get("newshape"))         # Select's, Reshape's
    return array if shape is None else array.reshape(shape)


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz or pickle under KEYS, still to be checked.  Raises ValueError."""
    for beginning, what in MISTAKEN.items():
        if content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(beginning):
            raise ValueError(f"neither an .npz nor an SMPL .pkl but {what}")
    what, arrays = "neither an .npz nor a readable SMPL .pkl", {}
    try:
        if content[:2] == b"PK":                # an .npz, whatever the file is called
            what = "not a whole .npz of plain number arrays"
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                require_size(sum(member.file_size for member in file.zip.infolist()))
                return {key: np.asarray(file[key]) for key in KEYS if key in file.files}
        for key, value in BodyUnpickler(io.BytesIO(content), encoding="latin1").load().items():
            if key in KEYS:
                arrays[key] = plain(value)
                require_size(sum(array.size for array in arrays.values()))
        return arrays
    except Refused as error:
        raise ValueError(f"refused, {error}; get an official SMPL .pkl, which needs nothing of the "
                         f"kind") from None
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {error!s:.200}); it may be truncated, "
                         f"get the file again") from None


def approximate_keypoints(template: np.ndarray, J_regressor: np.ndarray) -> np.ndarray:
    """A regressor of the 19 keypoints for files without HMR's -> (19, V).

    Limbs and neck are J_regressor's rows, near the 24 joints.  (LSP's annotators click elsewhere.)
    The face is five vertices, whose numbers in the paper's footnote are one too high, and the
    head's top the highest vertex.  Raises ValueError for another mesh than SMPL's.
    """
    if len(template) != 6890:
        raise ValueError("lacks cocoplus_regressor, which can only be approximated for SMPL's own "
                         "6890 vertices; use HMR's neutral_smpl_with_cocoplus_reg.pkl")
    regressor = np.zeros((19, 6890))
    regressor[:13] = J_regressor[[JOINT_NAMES.index(name) for name in KEYPOINT_NAMES[:13]]]
    vertices = (template[:, 1].argmax(), 332, 2800, 6260, 583, 4071)    # head top, nose, eyes, ears
    regressor[range(13, 19), vertices] = 1
    return regressor


def checked(raw: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Arrays of a file of this name -> what `smpl.load_body` returns.  Raises ValueError."""
    if missing := [key for key in KEYS[:7] if key not in raw]:
        raise ValueError(f"lacks {', '.join(missing)}; expected the keys of an SMPL file")
    tree = raw["kintree_table"]
    is_table = tree.ndim == 2 and tree.size and tree.dtype.kind in "fiu"
    # The official table stores the root's parent as 4294967295, which is -1 in uint32.
    parents = tree[0].astype(np.int64).astype(np.int32) if is_table else np.zeros(0)
    if parents.tolist() != list(PARENTS):
        kind = {16: ", as MANO", 52: ", as SMPL-H", 55: ", as SMPL-X"}.get(len(parents), "")
        raise ValueError(f"kintree_table is not SMPL's tree of 24 joints (this one has "
                         f"{len(parents)}{kind}); use SMPL's own file")
    if (betas := raw["shapedirs"].shape[2:]) > (10,):
        print(f"{name} has {betas[0]} betas: the first 10 are used, as in HMR")
        raw["shapedirs"] = raw["shapedirs"][:, :, :10]
    V, F = raw["v_template"].size // 3, raw["f"].size // 3
    shapes = {"v_template": (V, 3), "shapedirs": (V, 3, 10), "posedirs": (V, 3, 207), "f": (F, 3),
              "J_regressor": (24, V), "weights": (V, 24), "cocoplus_regressor": (19, V),
              "mean_pose": (72,), "kintree_table": (2, 24)}
    data = {"mean_pose": np.zeros(72)}          # official files have none: it is a file beside them
    for key, array in raw.items():
        if array.dtype.kind not in "fiu" or not array.size or array.shape != shapes[key]:
            raise ValueError(f"{key} is {array.dtype!s:.80} {array.shape}, expected numbers of "
                             f"shape {shapes[key]}; is it an SMPL file?")
        data[key] = array.astype(np.float64)
        if not np.abs(data[key]).max() < 1e15:  # products of two must fit float32
            raise ValueError(f"{key} holds NaN, infinity or over 10^15; get the file again")
    if "cocoplus_regressor" not in data:
        data["cocoplus_regressor"] = approximate_keypoints(data["v_template"], data["J_regressor"])
        print(f"{name} has no cocoplus_regressor: the 19 keypoints are approximate")
    f = data["f"].astype(np.int64)
    if (f != data["f"]).any() or f.min() < 0 or f.max() >= V:
        raise ValueError(f"f must be vertex numbers below {V}; get the file again")
    return {key: data[key] for key in KEYS if key != "kintree_table"} | {"f": f, "parents": parents}


def read_body_file(path: Path) -> dict[str, np.ndarray]:
    """An SMPL file, .npz or official .pkl -> the arrays of `smpl.load_body`, checked.  Raises
    OSError, or ValueError with one sentence that names file, key and remedy."""
    try:
        if not 0 < path.stat().st_size <= 2 ** 30:
            raise ValueError("an empty file or one of over 1 GiB; get it again")
        return checked(read_arrays(path.read_bytes()), printable(path.name))
    except ValueError as error:
        raise ValueError(printable(f"{path}: {error}")) from None


def write_plain(source: Path, target: Path) -> None:
    """Write the body of one file in the plain layout to a new file.  Raises ValueError, OSError."""
    if target.exists():
        raise ValueError(f"{target}: is there already; give the name of a new file")
    arrays, file = smpl.load_body(source), io.BytesIO()
    arrays["kintree_table"] = np.stack([arrays.pop("parents"), range(24)])    # as official files
    np.savez_compressed(file, **arrays)
    smpl.write_atomically(target, file.getvalue())
    print(printable(f"wrote {target}, a body of {len(arrays['v_template']):,} vertices under the "
                    f"licence of {source}"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m appendix.body_file",
                                     description="Write a body file in the project's plain layout.")
    parser.add_argument("source", type=Path, metavar="IN.pkl", help="an SMPL .pkl or .npz")
    parser.add_argument("target", type=Path, metavar="OUT.npz", help="the file to write")
    args = vars(parser.parse_args(argv))
    return smpl.exit_status("body_file.py", lambda: write_plain(**args))


if __name__ == "__main__":
    sys.exit(main())
