"""Official SMPL files: everything that is known of them, and how they are read without chumpy.

    python -m appendix.body_file SMPL_NEUTRAL.pkl body.npz   # writes the project's plain layout once

`smpl.load_body` reads the project's own layout and calls `read_body_file` for any other file.

An official file is a pickle of Python 2 that holds chumpy's and scipy's objects.  A pickle is a
program.  `pickle.load` runs whatever the program says, and it needs chumpy, which no longer
imports.  This module reads such a file in three steps:
  1. `scan` reads the program without running it, and refuses one that is far longer than a body's
     or that asks for much memory.
  2. `BodyUnpickler` runs the program.  It knows the few names that such files hold and puts an
     inert stand-in for each.  It imports nothing, calls nothing, and refuses any other name.
  3. `plain` makes arrays of the stand-ins' parts, by functions that check what they are given.
numpy's and scipy's own classes get stand-ins, too, because they trust a pickled state: a forged
dtype makes numpy read anywhere in memory, and forged indices make scipy write anywhere.

Axes:  V vertices   F triangles   24 joints   19 keypoints   10 betas   207 pose features
"""

import argparse
import io
import math
import pickle
import pickletools
import re
import sys
from pathlib import Path

import numpy as np
import scipy.sparse

from smpl import JOINT_NAMES, KEYPOINT_NAMES, PARENTS, exit_status, load_body, printable, \
    write_atomically

CHUMPY = ("Ch", "Select", "Reshape", "transpose")
SPARSE = tuple(f"{kind}_{of}" for kind in ("csc", "csr", "coo") for of in ("matrix", "array"))
# No module is imported, nor asked for: their names change with the versions (numpy.core, _core).
NAMES = ("_reconstruct", "_frombuffer", "ndarray", "dtype", "scalar", *CHUMPY, *SPARSE,
          "_reconstructor", "object", "set", "encode", "bytes")       # Python's own


class Refused(ValueError):
    """The file is not broken: it wants something that no body file needs."""


class StandIn:
    """An object of a pickle: its class's name, its arguments and its state, never acted on."""

    args, state = (), {}

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):              # without it a pickle may set any attribute
        self.state = state


class BodyUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in NAMES:
            raise Refused(f"it asks for {module:.80}.{name:.80}")
        return type(name, (StandIn,), {})

    def persistent_load(self, name):
        raise Refused("it asks for an object outside the file")


class Ascii(io.BytesIO):
    def readline(self, *_):                     # pickletools takes no other strings: here any do
        return super().readline().translate(None, bytes([*b"\\", *range(128, 256)]))


def scan(program: bytes, limit: int = 20_000) -> None:
    """Refuse what would fill the memory or the stack; a body takes some 1,000 instructions.

    The unpickler in C allocates as many memory slots as the highest number says, and a byte array
    before it reads it (pickletools raises if the file ends before); a million nested tuples as a
    dictionary's key end the process.
    """
    for n, (instruction, argument, _) in enumerate(pickletools.genops(Ascii(program))):
        if n > limit or instruction.name.endswith("PUT") and argument > limit:
            raise Refused(f"it asks for more than {limit:,} instructions or memory slots")


def text_of(x):
    """A string of Python 2 or 3 or bytes, however written, as the text of these characters."""
    if isinstance(x, StandIn):                 # encode(text, "latin1"), bytes(): protocols 0 to 2
        return "".join(x.args[:1])
    return x.decode("latin1") if isinstance(x, (bytes, bytearray)) else x


def array_of(value: StandIn) -> np.ndarray:
    """numpy's three ways to write numbers; frombuffer and reshape count them."""
    kind, shape, order = type(value).__name__, (), "C"
    if kind == "_frombuffer":                   # an array in protocol 5, unless it has gaps
        data, dtype, shape, order, *axes = value.args
    elif kind == "scalar":
        dtype, data = value.args
    else:                                       # _reconstruct, any array in any protocol
        _, shape, dtype, fortran, data = value.state
        order = "F" if fortran else "C"
    code = text_of(dtype.args[0])
    if not re.fullmatch("b1|f[248]|[iu][1248]", code):
        raise ValueError(f"an array of {code!r}, not of numbers")
    stored = np.dtype(code).newbyteorder(text_of(dtype.state[1]))       # "<", ">" or "|"
    array = np.frombuffer(text_of(data).encode("latin1"), stored).astype(code, copy=False)
    if order == "K":                            # numpy 2.3: as in memory, and the order of the axes
        return array.reshape(shape).transpose(*axes)
    return array.reshape(shape, order=order)


def dense(kind: str, part: dict) -> np.ndarray:
    """scipy's matrix, built anew, so that scipy checks the indices (coo's without being asked)."""
    data, shape = array_of(part["data"]), part.get("_shape") or part["shape"]
    if math.prod(int(n) for n in shape) > 10 ** 7:      # SMPL's largest array: 6.2 million numbers
        raise ValueError(f"a sparse matrix of shape {shape}")
    make = getattr(scipy.sparse, kind)
    if kind.startswith("coo"):
        places = part.get("coords") or (part["row"], part["col"])
        return make((data, tuple(array_of(axis) for axis in places)), shape=shape).toarray()
    matrix = make((data, array_of(part["indices"]), array_of(part["indptr"])), shape=shape)
    matrix.check_format(full_check=True)
    # ... which looks at no index where indptr ends in 0, and takes differences that wrap at 2^31
    if (matrix.indptr[1:] < matrix.indptr[:-1]).any():
        raise ValueError("a sparse matrix whose indptr falls")
    return matrix.toarray()


def plain(value) -> np.ndarray:
    """Stand-ins, nested as chumpy nests them, as one array."""
    kind = type(value).__name__
    if kind == "_reconstructor":                # protocols 0 and 1
        kind = value.args[0].__name__
    if kind in ("_reconstruct", "_frombuffer", "scalar"):
        return array_of(value)
    if kind not in CHUMPY + SPARSE:
        raise ValueError(f"{kind} where numbers should be")
    part = {text_of(key): x for key, x in value.state.items()}
    if kind in SPARSE:
        return dense(kind, part)
    array = plain(part["x" if kind == "Ch" else "a"])
    if kind == "Select":
        array = array.ravel()[array_of(part["idxs"])]
        return array.reshape(part.get("preferred_shape", array.shape))
    if kind == "Reshape":
        return array.reshape(part["newshape"])
    return array.transpose(part.get("axes")) if kind == "transpose" else array


KEYS = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f")
OWN_KEYS = ("cocoplus_regressor", "mean_pose")    # HMR's; this project's
# What people get in place of a body: its first bytes, with which no pickle begins, and what to do.
MISTAKEN = {b"<": "an HTML page: log in and download again",
             b"version https://git-lfs": "a Git LFS pointer: run git lfs pull",
             b"\x1f\x8b": "a gzip archive: unpack it and name the file in it",
             (b"{", b"["): "JSON: get an official .pkl"}


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz or pickle under the keys above, still to be checked."""
    for beginning, what in MISTAKEN.items():
        if content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(beginning):
            raise ValueError(f"neither an .npz nor an SMPL .pkl but {what}")
    try:
        if content[:2] == b"PK":                # a zip: .npz, whatever the file is called
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                if sum(member.file_size for member in file.zip.infolist()) > 2 ** 30:
                    raise Refused("it unpacks to more than 1 GiB")
                return {key: file[key] for key in file.files if key in KEYS + OWN_KEYS}
        scan(content)
        raw = BodyUnpickler(io.BytesIO(content), encoding="latin1").load()
        if isinstance(raw, dict):
            raw = {text_of(key): value for key, value in raw.items()}
            return {key: plain(raw[key]) for key in KEYS + OWN_KEYS if key in raw}
    except Refused as error:
        raise ValueError(f"refused, {error}; an official SMPL .pkl needs nothing of the kind, get "
                         f"that file") from None
    except Exception as error:
        what = ("not a whole .npz of plain number arrays" if content[:2] == b"PK" else
                "neither an .npz nor a readable SMPL .pkl")
        raise ValueError(f"{what} ({type(error).__name__}: {error!s:.200}); it may be truncated, "
                         f"get the file again") from None
    raise ValueError(f"expected a pickled dict of SMPL arrays, found {type(raw).__name__}; use an "
                     f"official SMPL .pkl")


def approximate_keypoints(template: np.ndarray, J_regressor: np.ndarray) -> np.ndarray:
    """For official files without HMR's regressor: 19 keypoints from joints and skin -> (19, V).

    Limbs and neck are J_regressor's rows, applied to the posed skin (so that in a bent pose they
    are near the 24 joints but not equal to them); the face is five vertices of the official mesh
    (the paper's footnote is one too high) and the head's top its highest vertex.  Approximate:
    SMPL's hips, neck and ankles are not where LSP's annotators click.
    """
    if len(template) != 6890:
        raise ValueError("lacks cocoplus_regressor (the 19 keypoints), which can only be "
                         "approximated for SMPL's own mesh of 6890 vertices; use HMR's "
                         "neutral_smpl_with_cocoplus_reg.pkl")
    regressor = np.zeros((19, 6890))
    regressor[:13] = J_regressor[[JOINT_NAMES.index(name) for name in KEYPOINT_NAMES[:13]]]
    vertices = (template[:, 1].argmax(), 332, 2800, 6260, 583, 4071)    # head top, nose, eyes, ears
    regressor[range(13, 19), vertices] = 1
    return regressor


def checked(raw: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    missing = [key for key in KEYS if key not in raw]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; expected the keys of an SMPL file")
    for key, array in raw.items():
        if array.dtype.kind not in "fiu" or not array.size:
            raise ValueError(f"{key} is {array.dtype!s:.80} {array.shape}, expected numbers; is it "
                             f"an SMPL file?")
        if not np.isfinite(array).all():
            raise ValueError(f"{key} holds NaN or infinity; get the file again")
    tree = raw["kintree_table"]
    # The official table stores the root's parent as 4294967295, which is -1 in uint32.
    parents = tree[0].astype(np.int64).astype(np.int32) if tree.ndim == 2 else np.zeros(0)
    if parents.tolist() != list(PARENTS):
        others = {16: ", as MANO", 52: ", as SMPL-H", 55: ", as SMPL-X"}
        raise ValueError(f"kintree_table is not SMPL's tree of 24 joints (this one has "
                         f"{len(parents)}{others.get(len(parents), '')}); use SMPL's own file")
    V = raw["v_template"].size // 3             # its shape is checked below
    shapes = {"v_template": (V, 3), "shapedirs": (V, 3, 10), "posedirs": (V, 3, 207),
              "J_regressor": (24, V), "weights": (V, 24), "cocoplus_regressor": (19, V),
              "mean_pose": (72,)}
    raw.setdefault("mean_pose", np.zeros(72))   # official files have none: it is a file beside them
    data = {}
    for key, shape in shapes.items():
        if key not in raw:
            raw[key] = approximate_keypoints(data["v_template"], data["J_regressor"])
            print(f"{name} has no cocoplus_regressor: the 19 keypoints are approximate")
        array = raw[key]
        if key == "shapedirs" and array.ndim == 3 and array.shape[2] > 10:
            print(f"{name} has {array.shape[2]} betas: the first 10 are used, as in HMR")
            array = array[:, :, :10]
        if array.shape != shape:
            raise ValueError(f"{key} is {array.dtype} {array.shape}, expected numbers of shape "
                             f"{shape}; is it an SMPL file?")
        data[key] = array.astype(np.float64)
    data["parents"], f = parents, raw["f"]
    if f.ndim != 2 or f.shape[1] != 3 or (f % 1).any() or f.min() < 0 or f.max() >= V:
        raise ValueError(f"f must be (F, 3) vertex numbers below {V}; get the file again")
    data["f"] = f.astype(np.int64)
    return data


def read_body_file(path: Path) -> dict[str, np.ndarray]:
    """Read and check an SMPL file, .npz or official .pkl -> the arrays of `smpl.load_body`.

    Raises ValueError with one sentence that names file, key and remedy, or OSError.
    """
    content = path.read_bytes()
    try:
        if not content:
            raise ValueError("an empty file; get it again")
        return checked(read_arrays(content), printable(path.name))
    except ValueError as error:
        raise ValueError(printable(f"{path}: {error}")) from None


def write_plain(source: Path, target: Path) -> None:
    """Write the body of one file in the plain layout.  Raises ValueError, OSError."""
    if target.exists():
        raise ValueError(f"{target}: is there already; name another file")
    if target.suffix != ".npz":
        raise ValueError(f"{target}: expected a name that ends in .npz")
    arrays = load_body(source)
    # the layout that `smpl.load_body` reads: the tree as the official files store it
    arrays["kintree_table"] = np.stack([arrays.pop("parents"), np.arange(24)]).astype(np.int64)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_atomically(target, file.getvalue())
    print(printable(f"wrote {target}: {len(arrays['v_template']):,} vertices; the file it was made "
                    f"of keeps its licence"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m appendix.body_file",
                                     description="Write a body file in the project's plain layout.")
    parser.add_argument("source", type=Path, metavar="IN.pkl", help="an SMPL .pkl or .npz")
    parser.add_argument("target", type=Path, metavar="OUT.npz", help="the file to write")
    args = parser.parse_args(argv)
    return exit_status("body_file.py", lambda: write_plain(args.source, args.target))


if __name__ == "__main__":
    sys.exit(main())
