"""Shape comments that cannot lie: each trailing `# (B, 24, 3)` against the tensors of a small run.

`sys.settrace` watches the chapters build, train, measure and draw for a moment, and holds what a
line assigns or returns against the comment behind it:

    # (B, 24, 3) words                      the line's result; of several results, each one
    # (N, 72 or 144), (N, 10); N = B * T    result by result; the equation is checked as well
    # T x (B, 85)                           a list of T
    # (F, B) -> (S,)                        on a nested `def`: its first argument, what it returns
    # (U + 24, 3B)                          sums, products and quotients may stand in it

A letter means one number within a call: that of the local variable of this name, if there is one.
`...` is one row of leading axes.
"""

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import data
import hmr
import smpl
import train

LINES = {module.__file__: ["", *Path(module.__file__).read_text(encoding="utf-8").split("\n")]
         for module in (smpl, hmr, data, train)}                      # they count from 1
SHAPE = r"(?:(\w+) x )?\(([^()]*)\)"
# What a call leaves behind: of its owner and its first argument
LEFT = {"append": "{}[-1]", "copy_": "{}", "register_buffer": "{}.get_buffer({})"}


def statements(lines: list[str]) -> dict[int, ast.stmt]:
    """Number of a line -> the innermost statement there."""
    found = {}
    for node in ast.walk(ast.parse("\n".join(lines[1:]))):            # the outer ones first
        if isinstance(node, ast.stmt):
            found |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), node)
    return found


NODES = {path: statements(lines) for path, lines in LINES.items()}
# (file, number of a statement's first line) -> the comment behind it, on whichever of its lines
COMMENTS = {(path, NODES[path][number].lineno): found[1] for path, lines in LINES.items()
            for number, line in enumerate(lines)
            if (found := re.search(r"\S +# ((?:\w+ x )?\(.*)", line))}
LETTERS = set(re.findall(r"[A-Za-z]\w*", str(COMMENTS.values())))
FIELDS = {(node.name, field.target.id): (path, field.lineno)          # of NamedTuples
          for path, nodes in NODES.items() for node in nodes.values()
          if isinstance(node, ast.ClassDef) for field in node.body
          if (path, field.lineno) in COMMENTS}
FALSE, COMPARED, RESHAPED = {}, set(), set()    # what the run finds: lines


def results(node: ast.stmt) -> list[str]:
    """Expressions for what a statement leaves behind.  Of an element or slice that is set: none."""
    if isinstance(node, ast.Expr) and isinstance(call := node.value, ast.Call):
        owner, _, method = ast.unparse(call.func).rpartition(".")
        return [LEFT[method].format(owner, ast.unparse(call.args[0]))] if method in LEFT else []
    targets = getattr(node, "targets", None) or [getattr(node, "target", ast.Pass())]
    texts = [ast.unparse(part) for target in targets for part in ast.walk(target)
             if isinstance(getattr(part, "ctx", None), ast.Store)]
    return [text for text in texts if re.fullmatch(r"[\w.]+(\['\w+'\])?", text) and text != "_"]


def shapes(value) -> list[tuple]:
    """A tensor's or array's shape; the shapes in a list, tuple or dict of them."""
    parts = value.values() if type(value) is dict else value if type(value) in (
        list, tuple) else [value]
    return [tuple(part.shape) for part in parts if isinstance(part, (Tensor, np.ndarray))]


def fits(axis: str, size: int, known: dict[str, int]) -> bool:
    """Is this axis so long?  A letter that is not known yet is solved for, and then known."""
    code = re.sub(r"(\d)([A-Z])", r"\1 * \2", axis)
    for letter in set(re.findall(r"[A-Za-z]\w*", code)) - known.keys():
        at_0, at_1 = (eval(code, {}, known | {letter: x}) for x in (0, 1))
        known[letter] = round((size - at_0) / (at_1 - at_0))
    return eval(code, {}, known) == size


def matches(text: str, shape: tuple, known: dict) -> bool:
    axes = [axis.strip() for axis in text.split(",") if axis.strip()]
    if axes[:1] == ["..."]:
        axes[:1] = map(str, known.setdefault("...", shape[:len(shape) - len(axes) + 1]))
    return len(axes) == len(shape) and all(
        any(fits(one, size, known) for one in axis.split(" or "))
        for axis, size in zip(axes, shape))


def is_true(text: str, values: list, known: dict) -> bool:
    """Does a comment say what came about?"""
    said = re.findall(SHAPE, re.match(f"{SHAPE}(, {SHAPE})*", text)[0])
    if len(said) > 1 and len(values) == 1:
        values = values[0]                          # one name for several
    said *= len(values) if len(said) == 1 else 1
    pairs = [(*part, value) for part, value in zip(said, values) if shapes(value)]
    for count, axes, value in pairs:
        if count and not fits(count, len(value), known) or not all(
                matches(axes, shape, dict(known) if type(value) is dict else known)
                for shape in shapes(value)):        # a dict's entries have letters of their own
            return False
    equation = re.search(r"; (\w) = (.+)", text)
    return bool(pairs) and len(said) == len(values) and (
        not equation or fits(equation[2], known[equation[1]], known))


def compare(line: tuple[str, int], values: list, known: dict, side: int = -1) -> None:
    COMPARED.add(line)
    if not is_true(COMMENTS[line].split(" -> ")[side], values, known):
        FALSE[line] = f"# {COMMENTS[line]}, but live: {[shapes(value) for value in values]}"


class Call:
    """One call of a chapter's function.  A nested function knows the outer one's letters."""
    letters = {}                                # frames that run -> what their letters stand for

    def __init__(self, frame):
        self.path = frame.f_code.co_filename
        is_nested = frame.f_code.co_flags & inspect.CO_NESTED
        self.known = self.letters[frame] = dict(
            self.letters.get(frame.f_back, ()) if is_nested else ())
        self.node, self.returned, self.before, self.empty = None, None, set(), []
        self.head = frame.f_lineno if "->" in COMMENTS.get((self.path, frame.f_lineno), "") else 0
        if self.head:
            self.note(frame, self.head, [*frame.f_locals.values()][:1], side=0)

    def step(self, frame, event, arg):
        """Before a line, on return, on an exception: note the statement that has ended."""
        now = NODES[self.path][frame.f_lineno] if event == "line" else None
        if now and now is self.node:                # the same statement's next line
            return self.step
        if self.node and event != "exception" and not isinstance(self.node, ast.Return):
            self.note_results(frame, self.node)
        if event == "return":
            for node in self.empty:                 # they are filled by now
                self.note_results(frame, node)
            if self.returned and arg is not None:
                values = list(arg) if type(arg) is tuple else [arg]
                self.note(frame, self.head or self.returned, values)
            known = {}
            for name, part in getattr(arg, "_asdict", dict)().items():
                line = FIELDS.get((type(arg).__name__, name))
                if line and part is not None:       # the class of a NamedTuple says the shapes
                    compare(line, [part], known)
            del self.letters[frame]
        if isinstance(now, ast.Return):             # `with` goes back to its head before it ends
            self.returned = now.lineno
        self.node = now
        self.before = {shape for value in frame.f_locals.values() for shape in shapes(value)}
        return self.step

    def note_results(self, frame, node: ast.stmt) -> None:
        values = []
        for text in results(node):
            try:
                values.append(eval(text, frame.f_globals, frame.f_locals))
            except (NameError, LookupError):        # the loop was empty
                pass
        if [] in [value for value in values if type(value) is list] and node not in self.empty:
            self.empty.append(node)
        else:
            self.note(frame, node.lineno, values)

    def note(self, frame, number: int, values: list, side: int = -1) -> None:
        line = self.path, number
        made = {shape for value in values if type(value) is not dict for shape in shapes(value)}
        if made - self.before - {()}:               # a dict's parts have names, and a docstring
            RESHAPED.add(line)
        if line in COMMENTS and any(value is not None for value in values):
            self.known |= {name: value for name, value in frame.f_locals.items()
                           if name in LETTERS and type(value) is int}
            compare(line, values, self.known, side)


def watch(frame, event, arg) -> Callable | None:
    """A call begins.  The chapters' own are watched, but for comprehensions and lambdas."""
    if frame.f_code.co_filename in LINES and not frame.f_code.co_name.startswith("<"):
        return Call(frame).step


@pytest.fixture(scope="module", autouse=True)
def watched_run(tmp_path_factory):
    """The chapters' functions once at least, in sizes that differ from each other."""
    folder, threads, before = tmp_path_factory.mktemp("a"), torch.get_num_threads(), sys.gettrace()
    torch.manual_seed(0)
    torch.set_num_threads(1)      # PyTorch 2.6 crashes in backward with 5 pictures on two threads
    sys.settrace(watch)
    try:
        train.train(train.Config(
            depth=18, width=8, size=64, look="plain", upright=True, batch=5, steps=1, device="cpu",
            pretrained="none", amp="off", eval_pictures=7, out=str(folder)),
            theta_bar=lambda rotation: hmr.mean_theta(torch.zeros(72), rotation))
        model, D, config = train.load(folder / "checkpoint.pt", device="cpu")
        train.print_clips(model, config)
        hmr.mean_theta(model.smpl.mean_pose, "6d")
        theta = torch.rand(3, 157).requires_grad_()                   # with 6D rotations
        opt_E, opt_D = (torch.optim.SGD(weights, 0.1) for weights in ([theta], D.parameters()))
        world = data.SyntheticPeople(model.smpl, data.load_mocap(False, False), 3, 32, "hard")
        train.train_step(lambda image: ([theta], model.decode(theta)), D, opt_E, opt_D,
                         world.batch(0), world.motion(3, 0), config)
        hmr.ResNet(50, width=8, num_classes=11)(torch.rand(2, 3, 64, 64))
        model.smpl(torch.zeros(2, 10), torch.zeros(2, 72))
        data.demo(folder)
    finally:
        sys.settrace(before)
        torch.set_num_threads(threads)


def listed(lines: dict) -> str:
    return "\n".join(f"{Path(path).name}:{number}: {text}"
                     for (path, number), text in sorted(lines.items()))


def test_shape_comments_are_true():
    assert not FALSE, listed(FALSE)
    never = {line: COMMENTS[line] for line in COMMENTS.keys() - COMPARED}
    assert not never, f"the run above comes by none of these comments:\n{listed(never)}"


def test_lines_that_reshape_say_the_shape():
    bare = {(path, number): LINES[path][number] for path, number in RESHAPED - COMMENTS.keys()
            if not re.search(r"torch\.(eye|empty|zeros|ones|full|tensor)\(", LINES[path][number])}
    share = 1 - len(bare) / len(RESHAPED)       # a constructor names its shape already
    assert share >= 0.9, f"of lines that make a tensor of another shape than any local variable's "\
        f"only {share:.1%} say it, and not\n{listed(bare)}"
