"""Coursework cut from the chapters: hand it out, take it in, grade it.

    python -m appendix.exercises write DIR [--tasks 9,10,14]    # the folder that a student gets
    python -m appendix.exercises grade FOLDER ..                # points, a CSV, a table (Linux)
    python -m appendix.exercises answers                        # to the questions, for the marker
    python -m appendix.exercises check                          # is every task fair?  (Linux)

A task is one or several functions of a chapter.  `write` leaves their docstrings, signatures and
checks of the input between two lines.  `grade` puts what a student has between them into the
project's own files, one task at a time, and runs the task's tests of test_hmr.py.  It is no jail.
"""

import argparse
import ast
import csv
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from appendix.gallery import CHAPTERS, DATA, HERE, HMR, SMPL, TRAIN, Job, Result, run_apart, source
from smpl import exit_status, printable, write_atomically


class Task(NamedTuple):
    number: int
    file: str
    functions: tuple[str, ...]    # whose bodies are cut; their docstrings say what to write
    where: str                    # in the paper
    know: str                     # what of PyTorch it takes
    key: str                      # pytest -k KEY runs its tests
    tests: dict[str, int]         # test_NAME of test_hmr.py: the points that it gives
    needs: tuple[int, ...] = ()   # tasks without which its tests cannot pass
    hint: str = ""

    title = property(lambda self: ", ".join(self.functions))
    points = property(lambda self: sum(self.tests.values()))
    nodes = property(lambda self: [f"test_hmr.py::test_{name}" for name in self.tests])


def of_each_loss(name: str) -> dict[str, int]:
    return {f"{test}[{name}]": 1 for test in (
        "what_a_mask_hides_may_be_anything", "the_losses_are_the_official_codes",
        "nothing_labelled_costs_nothing_and_gives_no_nan")}


TASKS = (
    Task(1, SMPL, ("batch_rodrigues",), "Sec. 3.1", "broadcasting, where", "rodrigues",
         {"rodrigues_agrees_with_scipy_and_the_exponential_map": 2,
          "rodrigues_turns_columns_and_keeps_leading_shapes": 2,
          "rodrigues_has_the_right_gradient_even_at_zero": 2,
          "rodrigues_is_accurate_in_float32_at_small_and_large_angles": 2}),
    Task(2, SMPL, ("blend_shapes",), "Sec. 3.1", "matrix product, flatten", "blend_shapes_are",
         {"blend_shapes_are_a_sum_of_directions[float64]": 2,
          "blend_shapes_are_a_sum_of_directions[float32]": 1}),
    Task(3, SMPL, ("batch_rigid_transform",), "Sec. 3.1", "cat, pad", "kinematics or tall_person",
         {"kinematics_equal_a_loop_over_the_23_joints": 6,
          "a_tall_person_has_long_bones_and_bones_do_not_stretch": 3}),
    Task(4, SMPL, ("lbs",), "Sec. 3.1", "einsum, matrix product", "lbs or zero_input or on_betas",
         {"zero_input_returns_the_template_and_the_root_turns_about_joint_0": 2,
          "joints_depend_on_betas_but_not_on_pose_blend_shapes": 2,
          "lbs_equals_a_slow_loop": 4, "lbs_gradients": 2}, (2, 3)),
    Task(5, HMR, ("Block.forward", "shortcut"), "He et al., Eqs. (1), (2)", "nn.Module",
         "residual_block", {"a_residual_block_with_zero_weights_is_the_identity": 2,
                            "a_residual_block_equals_torchvisions": 3}, (),
         "`residual` computes F(x). The shortcut is nn.Identity(), or an nn.Sequential of a 1x1 "
         "convolution without bias and a BatchNorm2d."),
    Task(6, HMR, ("resnet_stages",), "He et al., Table 1", "nn.Sequential",
         "resnet_equals or multiply_adds",
         {"resnet_equals_torchvisions[18]": 2, "resnet_equals_torchvisions[34]": 1,
          "resnet_equals_torchvisions[50]": 2, "multiply_adds_are_the_slides": 1}, (5,)),
    Task(7, HMR, ("mean_theta",), "Sec. 3.2", "cat, clone", "theta_bar",
         {"theta_bar_is_upright_average_and_fixed": 3, "theta_bar_in_6d_is_the_same_body": 1}),
    Task(8, HMR, ("Regressor.forward",), "Sec. 3.2, 3.4", "relu, dropout, cat",
         "hand_written or dropout_follows or all_iterations or three_thetas",
         {"the_regressor_equals_a_hand_written_loop": 2, "gradients_run_through_all_iterations": 2,
          "dropout_follows_both_hidden_layers_with_fresh_masks": 2,
          "the_three_thetas_are_the_official_codes": 2}),
    Task(9, HMR, ("project",), "Eq. (2)", "broadcasting", "test_projection",
         {"projection_is_the_official_codes": 4}),
    Task(10, HMR, ("masked_mean", "keypoint_loss"), "Eq. (3)", "where, expand",
         "L_kp or reprojection", {"reprojection_loss": 3} | of_each_loss("L_kp")),
    Task(11, HMR, ("hip_midpoint", "joints3d_loss"), "Eq. (5)", "slices", "L_joints or 3d_joint",
         {"3d_joint_loss": 2} | of_each_loss("L_joints"), (10,)),
    Task(12, HMR, ("smpl_loss",), "Eq. (6)", "flatten, cat", "L_smpl or smpl_parameter",
         {"smpl_parameter_loss": 1} | of_each_loss("L_smpl"), (10,)),
    Task(13, HMR, ("Discriminator.forward",), "Sec. 3.3, 3.4", "relu, flatten", "heads or ds_25",
         {"the_23_joint_heads_are_23_separate_linears": 4,
          "ds_25_outputs_are_the_official_codes": 3}),
    Task(14, HMR, ("sum_heads", "encoder_adversarial_loss", "discriminator_loss"),
         "Eqs. (7), (8)", "sums and means", "adversarial_losses or real_is_pulled",
         {"adversarial_losses": 3, "real_is_pulled_to_1_and_fake_to_0": 3}),
    Task(15, DATA, ("mirror_pose",), "Sec. 4", "indices", "mirrored_pose",
         {"a_mirrored_pose_is_the_mirrored_body": 3}),
    Task(16, TRAIN, ("train_step",), "Eqs. (1), (4)", "optimisers, detach",
         "a_step_moves or do_not_leak or without_an_adversary",
         {"a_step_moves_d_by_eq_8": 2, "a_step_moves_e_by_eq_1": 2,
          "gradients_do_not_leak_between_encoder_and_discriminators": 2,
          "without_an_adversary_d_is_left_alone": 1}, (),
         "(1) Update D by Eq. (8), (2) update E by Eq. (1). Theta_T has the full loss, the others "
         "L_adv alone. D's step leaves nothing in E's gradients, nor E's step in D's. The class "
         "Losses says what is returned, detached."),
    Task(17, TRAIN, ("compute_similarity_transform",), "Sec. 4.1", "svd, det", "procrustes",
         {"procrustes_undoes_any_similarity": 3, "procrustes_does_not_reflect_and_is_the_best": 2}),
)


# TASKS.md begins with the rules and ends with the questions, both in Markdown.
RULES = """\
# Coursework: Human Mesh Recovery

{n} pieces of `smpl.py`, `hmr.py`, `data.py` and `train.py` are missing.  Each stands between two
lines, `# >>> Task 9: project` and `# <<< Task 9: project`, and raises NotImplementedError.

To read: Kanazawa et al., "End-to-end Recovery of Human Shape and Pose", CVPR 2018 (arXiv
1712.06584), which Sec. and Eq. refer to; for ResNet He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016 (arXiv 1512.03385).  Nobody needs the slides that comments name.

To install, with Python 3.10 or later; the first line is for a laptop without a GPU and saves 5 GB:

    pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
    pip install -r requirements.txt

- Each task's command runs its tests, and grading runs the same tests.  They look at the task's
  functions alone, so you may work in any order, but for what the table says.
- Hand in the four files, in UTF-8.  Only what stands between a function's two lines is graded,
  with all other tasks solved.  Put helpers and imports there, too, and leave the two lines alone.
- Results have the precision of the inputs, and inputs are not changed in place.
"""
ANSWER = "1 point: "          # so begin the lines of the questions that a student does not get
QUESTIONS = """\
## Questions, to answer in words (3 points each)

**Question 1.** `figures/elbow.png` shows an elbow bent by 115 degrees, seen from above.  On the
left each vertex follows one bone alone, its largest weight.  In the middle are the blended weights
of `lbs`.  Where does each of the two fail, and why?
1 point: one bone alone: the mesh tears where neighbours follow two different motions
1 point: blended: it is smooth, but the elbow loses volume
1 point: a mean of two rotations is no rotation: it shrinks along the plane of the turn

**Question 2.** The right elbow of `figures/elbow.png` has pose blend shapes, too.  Why do they
depend on R - I and not on R, and why not on the root's rotation?
1 point: they are offsets that are learnt, linear in R - I, and add what blending loses
1 point: at rest R - I is 0 and the template stays; R would add a constant to every body
1 point: the root bends nothing; a correction by it would dent a body for the way it faces

**Question 3.** The paper's Eq. (2) reads s X + t, the official code computes s (X + t).  Which of
these numbers would change?  Which unit has t in each form?  When does it matter?  (Needs task 9.)

    python -c "import torch, hmr; X = torch.tensor([[[0.3, 0.4, 9.0]]])
    print([hmr.project(X, torch.tensor([[s, 0.1, -0.2]])).tolist() for s in (1.0, 2.0)])"
1 point: for s = 1 both forms agree; for s = 2 the paper's gives (0.7, 0.6), not (0.8, 0.4)
1 point: in the code t is in metres, in the paper in units of the crop: t_paper = s t
1 point: a mean camera or weights of one form are wrong in the other wherever t is not 0

**Question 4.** Do the gradients at the first layer of a plain network vanish with depth?  Explain
the four numbers.  What makes deep plain networks train badly?  (Needs tasks 5 and 6.)

    python -c "import torch, hmr
    for depth, plain in ((18, True), (34, True), (18, False), (34, False)):
        torch.manual_seed(0)
        net = hmr.ResNet(depth, width=16, plain=plain)
        net(torch.randn(16, 3, 64, 64)).square().mean().backward()
        print(depth, plain, net.conv1.weight.grad.norm().item())"
1 point: they grow with depth, most in the plain network: 1.8 to 23.8; else 2.2 to 7.2
1 point: batch normalisation keeps them from vanishing, as He et al. argue
1 point: a deep plain network has to learn the identity, which is hard; a block has it at F = 0

**Question 5.** Half of the pictures have 3D labels.  Which losses teach the network anything about
the other half, and which mistakes do they not see?  (Needs tasks 1 to 4, 9 and 15.)

    python data.py
1 point: L_reproj and L_adv; the masks keep it out of L_joints and L_smpl altogether
1 point: L_reproj sees no depth, nor a limb turned about its own axis
1 point: L_adv knows human rotations, not which of them the picture shows, nor the root

**Question 6.** What does this number say about Eq. (3)?  Which two bodies look alike to it, and
what in the rest of the method can tell them apart?  (The command needs task 9.)

    python -c "import torch, hmr; X, cam = torch.randn(1, 19, 3), torch.tensor([[0.9, 0, 0]])
    M = torch.tensor([1, 1, -1])
    print((hmr.project(X, cam) - hmr.project(X * M, cam)).abs().max().item())"
1 point: it is 0: weak perspective drops z
1 point: a body and its mirror image in depth, a limb towards the camera or away from it
1 point: two of: discriminators (joints bend the wrong way), 3D labels, shading, occlusion

**Question 7.** Fig. 5's monsters: look at runs/monsters/picture.png (`assets/ablation.png` has a
longer run's).  The 2D error is fine.  Why are the bodies not?  (Needs all tasks.)

    python train.py --small --no-paired --no-adv --steps 500 --out runs/monsters
1 point: only L_reproj is left: any body whose 19 keypoints fall in the right places will do
1 point: limbs twist about their own axis and bend the wrong way; depth and betas are free
1 point: the adversary restores plausible bodies (Fig. 4), paired 3D the right ones

**Question 8.** Why do D_real and D_fake stay between 0 and 1, a little apart?  What would 1 and 0
mean for the encoder?  Which of the 25 outputs come near it, and why?  (Needs all tasks.)

    python train.py --small --steps 300 --out runs/adversary
1 point: least squares pulls linear outputs to 1 and 0; they are 0.5 where D cannot tell
1 point: at 1 and 0 D has won: it says little about the way to a human body
1 point: all joints together and the shape: they see more than one joint's 9 numbers
"""


# --------------------------------------------------------------------------------------------
# A task's functions: by name in a chapter, between two lines in a student's file

BEGIN, END = "# >>> Task {}: {}", "# <<< Task {}: {}"


def functions(text: str) -> dict[str, tuple[int, int, int, str]]:
    """A chapter's functions by name: the lines where each begins with its decorators, where its
    body begins after docstring and checks of the input, where it ends; its or its class's docs."""
    found = {}
    for outer in ast.parse(text).body:
        for f in (outer, *getattr(outer, "body", ())):
            if isinstance(f, ast.FunctionDef):
                begin = f.body[0].lineno - 1
                for part in f.body:
                    if not isinstance(part, ast.Expr) and not (
                            isinstance(part, ast.If) and isinstance(part.body[0], ast.Raise)):
                        break
                    begin = part.end_lineno
                found[f.name if f is outer else f"{outer.name}.{f.name}"] = (
                    min(part.lineno for part in (f, *f.decorator_list)) - 1, begin,
                    f.end_lineno, ast.get_docstring(f) or ast.get_docstring(outer))
    return found


def chapter(file: str) -> tuple[dict[str, tuple[int, int, int, str]], list[str]]:
    """The project's own file: its `functions` and its lines."""
    text = source(file)
    return functions(text), text.split("\n")


def answer(task: Task) -> list[str]:
    """The lines of code that a student has to find, without comments."""
    known, lines = chapter(task.file)
    code = [line.strip().partition("  # ")[0].rstrip() for name in task.functions
            for line in lines[known[name][1]:known[name][2]]]
    return [line for line in code if line and not line.startswith("#")]


def blank(file: str, tasks: tuple[Task, ...]) -> str:
    """A chapter as it is handed out: these tasks are blank, all others are solved."""
    known, lines = chapter(file)
    cut = [(known[name], task, name) for task in tasks if task.file == file
           for name in task.functions]
    for (first, body, end, _), task, name in sorted(cut, reverse=True):
        outer = re.match(" *", lines[first])[0]
        lines[first:end] = [
            outer + BEGIN.format(task.number, name), *lines[first:body],
            f'{outer}    raise NotImplementedError("Task {task.number}, {task.where}: {name}")',
            outer + END.format(task.number, name)]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------
# write: the folder that a student gets

def tasks_md(tasks: tuple[Task, ...]) -> str:
    rows = [f"| {t.number} | {t.title} | `{t.file}` | {t.where} | {t.know} | "
            f"{', '.join(map(str, t.needs))} | {len(answer(t))} | {t.points} |\n" for t in tasks]
    parts = [RULES.format(n=len(tasks)),
             "| task | | file | to read | of PyTorch | needs task | lines in ours | points |\n"
             "|---|---|---|---|---|---|---|---|\n" + "".join(rows)]
    for t in tasks:
        known, _ = chapter(t.file)
        text = " ".join(known[name][3].split("\n\n")[0] for name in t.functions) + " " + t.hint
        tests = "".join(f"- {n}: {name.replace('_', ' ')}\n" for name, n in t.tests.items())
        parts.append(f"## Task {t.number}: {t.title}\n\n{paragraph(text)}\n\n"
                     f'    pytest test_hmr.py -k "{t.key}"\n\n{tests}')
    return "\n".join(parts) + "\n" + re.sub(f"{ANSWER}.*\n", "", QUESTIONS)


def paragraph(text: str, **indents: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100, break_long_words=False,
                         break_on_hyphens=False, **indents)


def write(folder: Path, tasks: tuple[Task, ...] = TASKS) -> None:
    """Write a new folder.  Raises ValueError if there is one, or if it lies in the project."""
    if HERE in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"{folder}: inside the project; name a folder outside of it")
    if folder.exists():
        raise ValueError(f"{folder}: exists already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / "new"
        shutil.copytree(HERE / "assets", new / "assets",
                        ignore=shutil.ignore_patterns("make_assets.py", "__pycache__"))
        for name in ("test_hmr.py", "requirements.txt", "LICENSE"):
            shutil.copyfile(HERE / name, new / name)
        for file in CHAPTERS:
            (new / file).write_text(blank(file, tasks), encoding="utf-8")
        (new / "TASKS.md").write_text(tasks_md(tasks), encoding="utf-8")
        figures(new / "figures")
        new.rename(folder)
    print(f"wrote {folder}: {len(tasks)} tasks, {sum(t.points for t in tasks)} points; "
          f"begin with TASKS.md")


def figures(folder: Path) -> None:
    """elbow.png: an elbow by one bone alone | blended | with pose blend shapes."""
    import data, smpl as chapter                                      # noqa: E401
    body, elbow = chapter.SMPL(), chapter.JOINT_NAMES.index("left_elbow")
    bones = torch.nn.functional.one_hot(body.weights.argmax(1), 24).float()       # (V, 24)
    pose, ways = torch.zeros(1, 24, 3), []
    pose[0, 0, 0], pose[0, elbow, 1] = torch.pi / 2, -115 / 180 * torch.pi        # from above
    to_camera, none = torch.tensor([1.0, -1, -1]), 0 * body.posedirs  # (3,) Rx(pi), (V, 3, 207)
    for posedirs, weights in ((none, bones), (none, body.weights), (body.posedirs, body.weights)):
        body.posedirs, body.weights = posedirs, weights
        out = body(torch.zeros(1, 10), pose)
        x, y, _ = out.joints[0, elbow] * to_camera
        cam = torch.tensor([[2 / 0.5, -x, -y]])                       # half a metre is seen
        ways.append(data.draw_mesh(out.vertices * to_camera, body.faces, cam, 320)[0])
    data.save_png(folder / "elbow.png", torch.cat(ways, 2))


# --------------------------------------------------------------------------------------------
# grade

class Grade(NamedTuple):
    task: Task
    points: int
    message: str                  # why points are lost, a line each; "" if none are


def graft(task: Task, path: Path) -> tuple[str, str]:
    """The chapter with a student's lines of one task; the student's text.  Raises ValueError."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 2 ** 20:
        raise ValueError(f"{path.name}: not handed in, or no plain file of at most 1 MiB")
    try:
        theirs = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[:error.start].count(b"\n") + 1
        raise ValueError(f"{path.name}, line {line}: in Latin-1 or the like; save it as UTF-8"
                         ) from None
    known, lines = chapter(task.file)
    for name in sorted(task.functions, key=known.get, reverse=True):
        marks = [mark.format(task.number, name) for mark in (BEGIN, END)]
        found = re.search(r"^[ \t]*{}[ \t]*\n(.*)^[ \t]*{}[ \t]*$".format(*map(re.escape, marks)),
                          theirs, re.M | re.S)
        if not found:
            raise ValueError(f"{task.file}: the line '{marks[0]}' or '{marks[1]}' is missing")
        first, _, end, _ = known[name]
        lines[first:end] = found[1].split("\n")[:-1]
        try:
            ast.parse("\n".join(lines))
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            line = (getattr(error, "lineno", None) or first) - first
            line += theirs.count("\n", 0, found.start(1))
            raise ValueError(f"{task.file}, line {line}: {type(error).__name__}: "
                             f"{getattr(error, 'msg', error)}") from None
    return "\n".join(lines), theirs


def judge(task: Task, result: Result, theirs: str) -> Grade:
    """The points of the tests that passed; of a test with several cases all must pass."""
    points, lost = 0, {}
    for name, worth in task.tests.items():
        cases = [message for test, message in result.outcomes.items()
                 if test == f"test_{name}" or test.startswith(f"test_{name}[")]
        why = next(filter(None, cases), "") or (result.ending or "not run") * (not cases)
        points += worth * (not why)
        missing = re.search(r"(?:name|attribute) '(\w+)'", why)
        if missing and re.search(rf"^\s*(def|class) {missing[1]}\b|^(import|from)\b.*\b"
                                 rf"{missing[1]}\b|^{missing[1]}\b.*=", theirs, re.M):
            why = f"'{missing[1]}' stands outside the task's lines; put it between them"
        if "NotImplementedError: Task " in why:
            why = "not attempted"
        if why:
            lost.setdefault(why, name.replace("_", " "))
    return Grade(task, points, "\n".join(
        why if points == 0 and len(lost) == 1 else f"{name}: {why}" for why, name in lost.items()))


def obstacle(folder: Path) -> str:
    """Why a student's folder cannot be graded; "" if there are files in it."""
    if not os.path.isdir(folder):
        return "a file, not a folder; unpack it" if os.path.exists(folder) else "no such folder"
    found = [path.parent for depth in ("", "*/", "*/*/") for file in CHAPTERS
             for path in folder.glob(depth + file)]
    if found:
        deeper = printable(found[0].relative_to(folder))
        return "" if found[0] == folder else f"the files stand deeper, in {deeper}; grade that"
    others = printable(", ".join(sorted(path.name for path in folder.glob("*"))[:3]))
    return f"none of the four files but {others}" if others else "an empty folder"


def grade_one(folder: Path, tasks: tuple[Task, ...], args: argparse.Namespace) -> list[Grade]:
    grades, jobs = {}, []
    for task in tasks:
        try:
            text, theirs = graft(task, folder / task.file)
            jobs.append(Job((task, theirs), {task.file: text}, task.nodes, args.seconds))
        except (ValueError, OSError) as error:
            grades[task.number] = Grade(task, 0, printable(error)[:600])
    for job, result in run_apart(jobs, args.processes):
        grades[job.key[0].number] = judge(job.key[0], result, job.key[1])
    return [grades[task.number] for task in tasks]


def report(name: str, grades: list[Grade], remark: str) -> None:
    print(f"{name}: {remark or f'{sum(g.points for g in grades)} points'}", flush=True)
    for task, points, message in grades if not remark else ():
        print(f"  {task.number:2d} {task.title:37.37s} {points:2d} of {task.points:2d}")
        for line in filter(None, message.split("\n")):
            print(paragraph(line, initial_indent="     ", subsequent_indent="       "))


def statistics(of_class: list[list[Grade]]) -> str:
    """What the class got wrong: one line a task."""
    lines = [f"{'':40s}  all some none  most frequent loss"]
    for grades in zip(*of_class):
        task, points = grades[0].task, [g.points for g in grades]
        losses = Counter(line.partition(" (expected")[0] for g in grades
                         for line in g.message.split("\n") if line)
        lines.append(f"{task.number:2d} {task.title:37.37s} {points.count(task.points):4d} "
                     f"{sum(0 < x < task.points for x in points):4d} {points.count(0):4d}" +
                     "".join(f"  {n} x {text:.60s}" for text, n in losses.most_common(1)))
    return "\n".join(lines)


def grade(args: argparse.Namespace) -> bool:
    """Grade folders, print and write the results -> has everyone got all points?"""
    if not (args.seconds > 0 and args.processes >= 0):
        raise ValueError("--seconds, --processes: expected more than 0")
    tasks, of_class = chosen(args.tasks), []
    folders = list(dict.fromkeys(folder.resolve() for folder in args.folders))
    rows = [["student", *(f"{t.number} {t.title}" for t in tasks), "points", "remark"]]
    for folder in folders:
        # folders of one name are told apart by the folders that they are in
        n = next(n for n in itertools.count(1)
                 if [other.parts[-n:] for other in folders].count(folder.parts[-n:]) == 1)
        name, remark = printable("_".join(folder.parts[-n:])), obstacle(folder)
        grades = ([Grade(task, 0, "") for task in tasks] if remark else
                  grade_one(folder, tasks, args))
        points = [g.points for g in grades]
        report(name, grades, remark)
        of_class.append(grades)
        rows.append([name, *points, sum(points), remark])
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        results = {"score": sum(points), "tests": [                  # as Gradescope reads it
            {"name": f"Task {g.task.number}: {g.task.title}", "max_score": g.task.points,
             "score": g.points, "output": g.message} for g in grades]}
        write_atomically(args.out / f"{name}.json", json.dumps(results, indent=1).encode())
        write_atomically(args.out / "class.csv", text.getvalue().encode())
    print(f"{statistics(of_class)}\nwrote {args.out / 'class.csv'} and a .json for each folder")
    return all(g.points == g.task.points for grades in of_class for g in grades)


# --------------------------------------------------------------------------------------------
# check: is every task fair?

def check(processes: int) -> None:
    """A task that alone is blank gets no point and says so; where all are blank but this one and
    those that it needs, its tests pass.  Else raises ValueError."""
    jobs = []
    for task in TASKS:
        others = tuple(t for t in TASKS if t.number not in (task.number, *task.needs))
        jobs += [Job((task, cut), {file: blank(file, cut) for file in CHAPTERS}, task.nodes)
                 for cut in ((task,), others)]
    for job, result in run_apart(jobs, processes):
        (task, cut), got = job.key, judge(job.key[0], result, "")
        right = (0, "not attempted") if task in cut else (task.points, "")
        text = (f"task {task.number:2d}, {len(cut)} tasks blank: {got.points} of {task.points} "
                f"points, {got.message or task.title}")
        if got[1:] != right:
            raise ValueError(text)
        print(text, flush=True)


# --------------------------------------------------------------------------------------------
# The command line

def chosen(wanted: str) -> tuple[Task, ...]:
    """--tasks such as 9,10,14; "" means all.  Raises ValueError."""
    known, numbers = {str(task.number): task for task in TASKS}, wanted.split(",")
    if wanted and not known.keys() >= set(numbers):
        raise ValueError(f"--tasks {wanted}: expected numbers of 1 to {len(TASKS)} such as 3,7")
    return tuple(task for number, task in known.items() if not wanted or number in numbers)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Coursework cut from the chapters, and graded.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("write", help="folder that a student gets")
    one.add_argument("folder", type=Path, metavar="DIR")
    two = commands.add_parser(
        "grade", help="points of students' folders (Linux)", description="A student's code has "
        "your rights: grade strangers' work in a container. The status is 1 if points are lost.")
    two.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    two.add_argument("--seconds", type=int, default=60, help="processor time for a task [60]")
    two.add_argument("--out", type=Path, default=Path("out/grade"), metavar="DIR",
                     help="folder for class.csv and a .json for each student [out/grade]")
    three = commands.add_parser("check", help="fairness of each task: blank, and solved alone")
    commands.add_parser("answers", help="model answers to the questions in words")
    for command in (two, three):
        command.add_argument("--processes", type=int, default=0, help="number of processes [cores]")
    for command in (one, two):
        command.add_argument("--tasks", default="", help="numbers such as 3,7 (default: all)")
    args, right = parser.parse_args(argv), []
    run = {"write": lambda: write(args.folder, chosen(args.tasks)), "grade": lambda: grade(args),
           "check": lambda: check(args.processes), "answers": lambda: print(QUESTIONS)}
    torch.set_num_threads(1)              # no threads, so that the process may be forked
    status = exit_status("exercises", lambda: right.append(run[args.command]()))
    return status or int(right == [False])


if __name__ == "__main__":
    sys.exit(main())
