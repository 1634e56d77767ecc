"""Shape comments that cannot lie: each trailing `# (B, 24, 3)` against the tensors of a small run.

`sys.settrace` watches the chapters build, train, measure and draw for a moment and notes the shape
of whatever a line assigns or returns.  The comments are then held against the notes:

    # (B, 24, 3) words                      the line's result; of several results, each one
    # (N, 72 or 144), (N, 10); N = B * T    result by result; the equation is checked as well
    # T x (B, 85)                           a list of T
    # (F, B) -> (S,)                        on a nested `def`: its first argument, what it returns
    # (U + 24, 3B)                          sums, products and quotients may stand in it

A letter means one number within a call: that of the local variable of this name, if there is one.
`...` is one row of leading axes.  Only n, where nothing is called n, differs from line to line.
"""

import ast
import functools
import inspect
import io
import re
import sys
import tokenize
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import data
import hmr
import smpl
import train

SOURCES = {module.__file__: Path(module.__file__).read_text(encoding="utf-8")
           for module in (smpl, hmr, data, train)}
SHAPE = r"(?:(\w+) x )?\(([^()]*)\)"
# A constructor names its shape already, and a loss is one number, ().
CONSTRUCTOR = r"torch\.(eye|empty|zeros|ones|full|tensor)\("


def place(path: str, line: int) -> str:
    return f"{Path(path).name}:{line}"


# The lines.  A statement, or the head of a compound one, goes by the number of its first line.

def statements(source: str) -> dict[int, ast.stmt]:
    """Number of any line -> its statement."""
    found = {}
    for node in ast.walk(ast.parse(source)):            # the outer ones first
        if isinstance(node, ast.stmt):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            last = node.body[0].lineno - 1 if hasattr(node, "body") else node.end_lineno
            found |= dict.fromkeys(range(first, max(node.lineno, last) + 1), node)
    return found


def comments(source: str) -> dict[int, str]:
    """Number of a statement -> the shape comment behind it, on whichever of its lines."""
    nodes = statements(source)
    return {nodes[token.start[0]].lineno: token.string[2:]
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and re.match(r"# (\w+ x )?\(", token.string)
            and token.line[:token.start[1]].strip()}


@functools.cache
def results(node: ast.stmt) -> list[str]:
    """Expressions for what a statement leaves behind.  Of an element or slice that is set: none."""
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.For)):
        found = list(node.targets) if isinstance(node, ast.Assign) else [node.target]
        while packed := [t for t in found if isinstance(t, (ast.Tuple, ast.Starred))]:
            at = found.index(packed[0])
            found[at:at + 1] = getattr(found[at], "elts", None) or [found[at].value]
        return [ast.unparse(t) for t in found if ast.unparse(t) != "_" and not (
            isinstance(t, ast.Subscript) and not isinstance(getattr(t.slice, "value", None), str))]
    text = ast.unparse(node)
    for pattern, result in ((r"([\w.]+)\.append\(", "{}[-1]"), (r"([\w.]+)\.copy_\(", "{}"),
                            (r"self\.register_buffer\('(\w+)'", "self.{}")):
        if found := re.match(pattern, text):
            return [result.format(found[1])]
    return []


@functools.cache
def operands(node: ast.stmt) -> list[str]:
    """Names that a statement reads, with the attributes behind them: "self.frames"."""
    part = node.iter if isinstance(node, ast.For) else node
    texts = [ast.unparse(n) for n in ast.walk(part) if isinstance(n, (ast.Name, ast.Attribute))
             and (isinstance(n.ctx, ast.Load) or isinstance(node, ast.AugAssign))]
    return [text for text in texts if re.fullmatch(r"[\w.]+(?<!\.T)(?<!\.mT)", text)]


def look_up(texts: list[str], frame) -> list:
    values = []
    for text in texts:
        try:
            values.append(eval(text, frame.f_globals, frame.f_locals))
        except (NameError, AttributeError, LookupError):     # the loop was empty; not yet there
            pass
    return values


def shapes(value) -> tuple | None:
    """A tensor's or array's shape; ("list" or "dict", shape, ..) for a list or dict of them."""
    if isinstance(value, (Tensor, np.ndarray)):
        return tuple(value.shape)
    if type(value) in (list, tuple, dict):
        parts = [shapes(v) for v in (value.values() if type(value) is dict else value)]
        if None not in parts and not any(map(is_nest, parts)):
            return ("dict" if type(value) is dict else "list", *parts)
    return None


def is_nest(shape: tuple | None) -> bool:
    return bool(shape) and isinstance(shape[0], str)


def leaves(shape: tuple | None) -> list[tuple]:
    return list(shape[1:]) if is_nest(shape) else [] if shape is None else [shape]


class Watch:
    """A trace function and its notes: what came about in each call; of equal calls, one.

    A note: which nested call or 0, number of the statement, whether it is a result, its shapes, the
    local variables that a comment may name.
    """

    def __init__(self):
        self.nodes = {path: statements(source) for path, source in SOURCES.items()}
        self.comments = {path: comments(source) for path, source in SOURCES.items()}
        self.letters = set(re.findall(r"[A-Za-z]\w*", str(self.comments)))
        self.calls, self.reshaped = set(), {}
        self.running = {}                       # frames of the chapters' functions -> their notes
        self.fields = {(node.name, field.target.id): (path, field.lineno)    # NamedTuples'
                       for path, nodes in self.nodes.items() for node in nodes.values()
                       if isinstance(node, ast.ClassDef) for field in node.body
                       if isinstance(field, ast.AnnAssign) and field.lineno in self.comments[path]}

    def __call__(self, frame, event, arg):
        """A call begins.  The chapters' own are watched, but for comprehensions and lambdas."""
        path, code = frame.f_code.co_filename, frame.f_code
        if path in SOURCES and not code.co_name.startswith("<"):
            outer = frame.f_back if code.co_flags & inspect.CO_NESTED else None
            while outer and code not in outer.f_code.co_consts:
                outer = outer.f_back
            return Call(self, frame, path, outer).step


class Call:
    """One call of a chapter's function; a nested function's notes go to the outer one's."""

    def __init__(self, watch: Watch, frame, path: str, outer):
        self.watch, self.path, self.is_nested = watch, path, outer in watch.running
        self.notes = watch.running[frame] = watch.running.get(outer, [])
        self.number = len(self.notes) + 1 if self.is_nested else 0
        self.node, self.read, self.returned, self.filled_later = None, set(), None, []
        head = watch.nodes[path][frame.f_lineno]
        self.head = head if "->" in watch.comments[path].get(head.lineno, "") else None
        if self.head:
            self.note(frame, head, list(frame.f_locals.values())[:1], is_result=False)

    def step(self, frame, event, arg):
        """Before a line, on return, on an exception: note the statement that has ended."""
        now = self.watch.nodes[self.path][frame.f_lineno] if event == "line" else None
        if now and now is self.node:                # the same statement's next line
            return self.step
        if self.node and event != "exception" and not isinstance(self.node, ast.Return):
            values = look_up(results(self.node), frame)
            self.filled_later += [self.node] * (tuple(map(shapes, values)) == (("list",),))
            self.note(frame, self.node, values)
        self.node = now
        if now:
            self.read = {leaf for value in look_up(operands(now), frame)
                         for leaf in leaves(shapes(value))}
            if isinstance(now, ast.Return):         # `with` goes back to its head before it ends
                self.returned = now, self.read
        if event == "return":
            for node in self.filled_later:
                self.note(frame, node, look_up(results(node), frame))
            if self.returned and arg is not None:
                node, self.read = self.returned
                self.note(frame, self.head or node, list(arg) if type(arg) is tuple else [arg])
                self.note_fields(arg)
            del self.watch.running[frame]
            if not self.is_nested:
                self.watch.calls.add((self.path, tuple(self.notes)))
        return self.step

    def note(self, frame, node: ast.stmt, values: list, is_result: bool = True) -> None:
        found, line = tuple(map(shapes, values)), (self.path, node.lineno)
        made = {leaf for shape in found if shape is None or shape[:1] != ("dict",)
                for leaf in leaves(shape)}          # a dict's parts have names, and a docstring
        if is_result and made - self.read:
            self.watch.reshaped[line] = found
        if node.lineno in self.watch.comments[self.path] and found != (("list",),) and any(
                value is not None for value in values):
            numbers = tuple((name, value) for name, value in frame.f_locals.items()
                            if name in self.watch.letters and type(value) is int)
            self.notes.append((self.number, node.lineno, is_result, found, numbers))

    def note_fields(self, value) -> None:
        """Of a NamedTuple that a function returns: its class says the shapes."""
        fields = {self.watch.fields.get((type(value).__name__, name)): shapes(part)
                  for name, part in getattr(value, "_asdict", dict)().items() if part is not None}
        for path in {field[0] for field in fields if field}:
            self.watch.calls.add((path, tuple((0, field[1], True, (shape,), ())
                                              for field, shape in fields.items() if field)))


def run(folder: Path) -> None:
    """The chapters' functions once at least, in sizes that differ from each other."""
    train.train(train.Config(
        depth=18, width=8, size=64, look="plain", upright=True, batch=5, steps=1, device="cpu",
        pretrained="none", amp="off", eval_pictures=7, out=str(folder / "run")),
        theta_bar=lambda rotation: hmr.mean_theta(torch.zeros(72), rotation))
    model, D, config = train.load(folder / "run" / "checkpoint.pt", device="cpu")
    body, theta = model.smpl, torch.rand(3, 157).requires_grad_()        # with 6D rotations
    hmr.mean_theta(body.mean_pose, "6d")
    world = data.SyntheticPeople(body, data.load_mocap(False, False), 3, 32, "hard")
    train.train_step(lambda image: ([theta], model.decode(theta)), D, torch.optim.SGD([theta], 0.1),
                     torch.optim.SGD(D.parameters(), 0.1), world.batch(0), world.motion(3, 0),
                     config)
    hmr.ResNet(50, width=8, num_classes=11)(torch.rand(2, 3, 64, 64))
    body(torch.zeros(2, 10), torch.zeros(2, 72))
    data.demo(folder)


@pytest.fixture(scope="module")
def watch(tmp_path_factory) -> Watch:
    watch, before, threads = Watch(), sys.gettrace(), torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)      # PyTorch 2.6 crashes in backward with 5 pictures on two threads
    sys.settrace(watch)
    try:
        run(tmp_path_factory.mktemp("shapes"))
    finally:
        sys.settrace(before)
        torch.set_num_threads(threads)
    return watch


def fits(text: str, size: int, known: dict[str, int]) -> bool:
    """Is this axis so long?  A letter that is not known yet is solved for, and then known."""
    code = re.sub(r"(\d)([A-Z])", r"\1 * \2", text)
    free = set(re.findall(r"[A-Za-z]\w*", code)) - known.keys()
    if not free:
        return eval(code, {}, known) == size
    if free != {"n"}:
        name, = free
        at_0, at_1 = (eval(code, {}, known | {name: Fraction(x)}) for x in (0, 1))
        solution = (size - at_0) / (at_1 - at_0)
        if solution.denominator > 1 or solution < 0:
            return False
        known[name] = int(solution)
    return True


def matches(text: str, shape: tuple, known: dict) -> bool:
    axes = [axis.strip() for axis in text.split(",") if axis.strip()]
    if axes[:1] == ["..."]:
        axes = axes[1:]
        lead, shape = shape[:len(shape) - len(axes)], shape[len(shape) - len(axes):]
        if known.setdefault("...", lead) != lead:
            return False
    return len(axes) == len(shape) and all(
        any(fits(one, size, known) for one in axis.split(" or "))
        for axis, size in zip(axes, shape))


def is_true(text: str, found: tuple, known: dict) -> bool:
    """Does a comment say what came about?"""
    said, end = [], 0
    while part := re.compile(f"(?:, )?{SHAPE}").match(text, end):
        said, end = [*said, part.groups()], part.end()
    if len(said) > 1 and len(found) == 1:
        found = tuple(leaves(found[0]))             # one name for several
    said *= len(found) if len(said) == 1 else 1
    pairs = [(count, axes, shape) for (count, axes), shape in zip(said, found) if shape is not None]
    for count, axes, shape in pairs:
        if count and not (is_nest(shape) and fits(count, len(shape) - 1, known)):
            return False
        for leaf in leaves(shape):                  # a dict's entries have letters of their own
            if not matches(axes, leaf, dict(known) if shape[:1] == ("dict",) else known):
                return False
    equation = re.search(r"; ([A-Z]) = ([A-Z0-9 *+]+)$", text)
    if equation and known[equation[1]] != eval(equation[2], {}, known):
        return False
    return bool(pairs) and len(said) == len(found)


def lies(texts: dict[int, str], notes: tuple) -> dict[int, tuple]:
    """What is false in one call: numbers of statements -> live shapes."""
    known, found = {0: {}}, {}
    for call, line, is_result, live, numbers in notes:
        letters = known.setdefault(call, dict(known[0]))
        letters.update(numbers)
        sides = texts[line].split(" -> ")
        if not is_true(sides[is_result and len(sides) > 1], live, letters):
            found[line] = live
    return found


def test_shape_comments_are_true(watch):
    false = {place(path, line): f"# {watch.comments[path][line]}, but live: {live}"
             for path, notes in watch.calls
             for line, live in lies(watch.comments[path], notes).items()}    # one of several
    assert not false, "\n".join(f"{where}: {what}" for where, what in sorted(false.items()))
    for path, texts in watch.comments.items():
        for line, text in texts.items():
            node = watch.nodes[path][line]
            kinds = ast.FunctionDef if "->" in text else (ast.Return, ast.AnnAssign)
            assert results(node) and "->" not in text or isinstance(node, kinds), (
                f"{place(path, line)}: # {text}: no line whose shape could be compared")


def test_lines_that_reshape_say_the_shape(watch):
    lines = {path: source.split("\n") for path, source in SOURCES.items()}
    bare = {line: live for line, live in watch.reshaped.items()
            if line[1] not in watch.comments[line[0]]
            and not re.search(CONSTRUCTOR, lines[line[0]][line[1] - 1]) and set(live) != {()}}
    compared = {(path, note[1]) for path, notes in watch.calls for note in notes}
    share = 1 - len(bare) / len(watch.reshaped)
    print(f"{len(watch.reshaped)} lines make a tensor of another shape than each operand's; "
          f"{share:.1%} of these say it; {len(compared)} comments compared")
    assert share >= 0.9, f"only {share:.1%}; no shape is said in\n" + "\n".join(
        f"{place(*line)}: {live}" for line, live in sorted(bare.items()))
    never = [(path, line) for path, texts in watch.comments.items() for line in texts
             if (path, line) not in compared]
    assert len(never) <= 5, f"the run above comes by none of {[place(*line) for line in never]}"
