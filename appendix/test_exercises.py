"""Exercises and gallery: the markers, the hand-out, the grading, the table of mistakes.

Fast: the round trip and the whole gallery are commands, run by .ci/run.
"""

import ast
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from appendix import datasets, exercises, gallery
from appendix.exercises import TASKS
from appendix.gallery import CHAPTERS, HERE, MISTAKES
from test_hmr import same_numbers_every_time  # noqa: F401 (a fixture)


def source(file: str) -> str:
    return (HERE / file).read_text(encoding="utf-8")


def names_of_tests(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", source(file), re.M))


# ============================================================================================
# The table of mistakes

def test_beyond_the_picture_its_edge_is_repeated():
    keypoints = 50 * torch.rand(19, 2)
    crop, _ = datasets.crop_person(torch.ones(3, 50, 50), keypoints, torch.ones(19), 64, zoom=0.8)
    assert crop.min() > 0.99, f"black ({crop.min():.2f}) beyond the edge: SPIN's zeros, not hmr's"


EDITS = gallery.edits()


@pytest.mark.parametrize("edit", [e for _, e in EDITS], ids=[
    f"{m.number}{'abcdefghij'[m.edits.index(e)]}" for m, e in EDITS])
def test_every_edit_applies_to_one_line_and_names_a_test(edit):
    text = source(edit.file)
    edited = gallery.apply(edit, text)                    # raises if the line has changed
    assert edited != text and "\n" not in edit.old.rstrip("\n"), "an edit of one line"
    ast.parse(edited)
    file, _, name = edit.test.rpartition("::")
    assert name.partition("[")[0] in names_of_tests(file or "test_hmr.py"), f"no test {edit.test}"
    assert edit.tell and not edit.tell.endswith("."), "one sentence for the student"
    if edit.task:
        (task,) = (task for task in TASKS if task.number == edit.task)
        spans = [exercises.span(exercises.functions(text)[name]) for name in task.functions]
        line = text[:text.index(edit.old)].count("\n")
        assert task.file == edit.file and any(begin <= line < end for begin, end in spans), \
            "not among the task's lines"
        tests = {test.partition("[")[0] for test in task.tests}
        assert name.partition("[")[0] in tests, f"task {edit.task} is not graded by {name}"


def test_the_table_is_complete():
    assert [m.number for m in MISTAKES] == list(range(1, len(MISTAKES) + 1))
    assert len(EDITS) >= 50 and len({(e.file, e.old, e.new) for _, e in EDITS}) == len(EDITS)
    for mistake in MISTAKES:
        assert bool(mistake.edits) != bool(mistake.elsewhere), f"{mistake.number}: or why not"
    graded = {edit.task for _, edit in EDITS}
    assert graded >= {task.number for task in TASKS}, "a task without a known mistake"
    with pytest.raises(ValueError, match="mend this edit"):
        gallery.apply(EDITS[0][1], "another text")


def test_the_gallery_runs_and_tells(tmp_path):
    run = subprocess.run([sys.executable, "-m", "appendix.gallery", "1", "35", "--processes", "1"],
                         cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "3 of 3 edits caught" in run.stdout and "cannot be made here" in run.stdout
    assert re.search(r"expected [-\d.]+, got [-\d.]+", run.stdout), "the message has numbers"
    assert gallery.main(["99"]) == 2


# ============================================================================================
# The hand-out

def test_the_table_of_tasks_is_whole():
    for task in TASKS:
        assert set(task.functions) <= exercises.functions(source(task.file)).keys(), task.title
    assert [t.number for t in TASKS] == list(range(1, len(TASKS) + 1)) and len(TASKS) >= 14
    assert sum(t.points for t in TASKS) == 100
    assert set(exercises.PROBES) == {t.number for t in TASKS}
    for task in TASKS:
        missing = {test.partition("[")[0] for test in task.tests} - names_of_tests("test_hmr.py")
        assert not missing, f"task {task.number} names tests that do not exist: {missing}"


@pytest.mark.parametrize("text, wrong", [
    ("# Task 1: a\nx\n", {(1, "a"): "no '# end of task'"}),
    ("# Task 1: a\nx\n# Task 2: b\ny\n# end of task", {(1, "a"): "no '# end of task'"}),
    ("# Task 1: a\nx\n# end of task\n# Task 1: a\n# end of task", {(1, "a"): "stands twice"}),
    ("# task one\nx\n# end of task\n  # Task 2: b\n  y\n  # end of task", {})])
def test_a_broken_marker_costs_its_own_task(text, wrong):
    spans, found = exercises.regions(text.split("\n"))
    assert set(found) == set(wrong) and all(wrong[k] in found[k] for k in wrong)
    assert set(spans) == ({(2, "b")} if "Task 2" in text else set())


def test_a_handout_keeps_what_states_the_task_and_gives_no_answer(tmp_path):
    texts = exercises.handout()
    assert set(texts) == {*CHAPTERS, "test_hmr.py", "requirements.txt", "LICENSE", "TASKS.md"}
    assert texts["test_hmr.py"] == source("test_hmr.py")
    for file in CHAPTERS:
        ours, theirs = (exercises.functions(text) for text in (source(file), texts[file]))
        assert ours.keys() == theirs.keys()
        for name, function in ours.items():
            other = theirs[name]
            assert ast.unparse(function.args) == ast.unparse(other.args)
            assert ast.get_docstring(function) == ast.get_docstring(other), name
    for task in TASKS:
        for name in task.functions:
            assert f'"Task {task.number}, {task.where}: ' in texts[task.file]
            cut = ast.unparse(exercises.functions(texts[task.file])[name])
            assert "raise NotImplementedError" in cut, name
    assert "# 4. Kinematic chain." in texts["smpl.py"] and "elements of R" not in texts["smpl.py"]
    assert "# ---- (1) update D:" in texts["train.py"]


def test_an_answer_that_stands_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr(exercises, "tasks_md", lambda: "v_shaped = v_template + "
                        "blend_shapes(betas, shapedirs)")
    with pytest.raises(ValueError, match="smpl.py: a task's line stands in the hand-out's TASKS"):
        exercises.handout()


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("course") / "student"
    exercises.write(folder)
    return folder


def test_the_folder_is_whole(student, capsys):
    assert not list(student.parent.glob(".*")), "temporary files left behind"
    names = {path.name for path in student.iterdir()}
    assert names >= {"TASKS.md", "assets", "figures", "LICENSE"} and "appendix" not in names
    assert (student / "figures/elbow.png").stat().st_size > 10_000
    assert not (student / "assets/make_assets.py").exists()
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "test_hmr.py"], cwd=student,
                         capture_output=True, text=True)
    assert "NotImplementedError: Task 1, Sec. 3.1: batch_rodrigues" in run.stdout, run.stdout[-999:]
    run = subprocess.run([sys.executable, "-c", "import smpl; smpl.SMPL('smpl.py')"], cwd=student,
                         capture_output=True, text=True)
    assert "appendix/body_file.py, which is missing here" in run.stderr, run.stderr
    for folder, sentence in ((student, "exists already"), (HERE / "hand", "inside the project")):
        assert exercises.main(["write", str(folder)]) == 2
        assert sentence in capsys.readouterr().err


def test_the_questions_commands_print_what_the_answers_say(capsys):
    for question in exercises.QUESTIONS:
        assert question.file in CHAPTERS and question.command.startswith("    python ")
        assert len(question.answer) > 200
    code = [re.search(r'-c "(.*)"', q.command) for q in exercises.QUESTIONS]
    first, second = (match[1] for match in code if match)
    exec(first, {})
    shown = capsys.readouterr().out
    assert "[0.800" in shown and "0.4000" in shown, shown
    exec(second, {})
    assert float(capsys.readouterr().out) == 0
    exercises.answers()
    assert capsys.readouterr().out.count("Answer: ") == len(exercises.QUESTIONS) == 8


# ============================================================================================
# Grading

def test_differences_are_found_whatever_comes():
    expected = {"a": ([2], [1.0, float("nan")])}
    assert exercises.difference({"a": [[2], [1.0 + 1e-12, float("nan")]]}, expected) == ""
    assert exercises.difference({"a": [[2], [2.0, 0.0]]}, {"a": ([2], [1.0, 0.0])}) == \
        "a is 2 where 1 is expected (number 1 of 2)"
    assert "number 2 of 2" in exercises.difference({"a": [[2], [1.0, 3.0]]}, expected)
    assert "the shape (1,), expected (2,)" in exercises.difference({"a": [[1], [1.0]]}, expected)
    for junk in (None, {}, [], {"a": 3}, {"a": [[2], [1.0]]}, {"a": [[2], ["x", "y"]]}):
        assert "docstring" in exercises.difference(junk, expected)


SUBMISSIONS = {    # of Task 9; what stands in place of its line, and what the grader says
    "right": ("return cam[:, None, :1] * (points[..., :2] + cam[:, None, 1:])", None),
    "paper": ("return cam[:, None, :1] * points[..., :2] + cam[:, None, 1:]",
              "yours is the paper's s X + t"),
    "leaves": ("import os\n    os._exit(0)", "without a report"),
    "exits": ("raise SystemExit(0)", "SystemExit"),
    "hangs": ("while True:\n        pass", "did not end within 4 seconds"),
    "hungry": ("return points.new_zeros(2 ** 40)", "memory"),
    "prints": ('print("PASSED test_projection_is_the_official_codes")', "TypeError"),
    "cheats": ('import sys\n    sys.modules["_pytest.python"].Function.runtest = lambda _: None\n'
               '    return points[..., :2]', "inputs of the grader's own"),
    "overfits": ("s, t = cam[:, None, :1], cam[:, None, 1:]\n    return s * (points[..., :2] + t) "
                 "if points.shape[1] in (1, 4, 19) else s * points[..., :2] + t",
                 "inputs of the grader's own: result 1 is"),
    "imports": ("import pandas", "imports pandas"),
    "broken": ("return (cam", "hmr.py, line"),
    "unmarked": ("\n# end of tusk\n", "no '# end of task'")}


@pytest.fixture(scope="module")
def graded(student, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    classroom, out = tmp_path_factory.mktemp("class"), tmp_path_factory.mktemp("out")
    blank = (student / "hmr.py").read_text(encoding="utf-8")
    line = re.search(r"raise NotImplementedError\(\"Task 9.*\n", blank)[0]
    for name, (text, _) in SUBMISSIONS.items():
        (classroom / name).mkdir()
        text = blank.replace(line, f"{text}\n")
        if name == "unmarked":
            begin = text.index("# Task 9")
            text = text[:begin] + text[begin:].replace("# end of task", "", 1)
        (classroom / name / "hmr.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "appendix.exercises", "grade", "--tasks", "9", "--seconds",
               "4", "--out", str(out), "--processes", "2",
               *(str(classroom / name) for name in SUBMISSIONS)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True), out


def test_no_submission_stops_the_grading(graded):
    run, out = graded
    assert run.returncode == 1 and not run.stderr, run.stderr
    with open(out / "class.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["folder"] for row in rows] == list(SUBMISSIONS)
    assert [row["points"] for row in rows] == ["4"] + ["0"] * (len(rows) - 1), run.stdout


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_a_submission_is_told_what_is_wrong(graded, name):
    content = json.loads((graded[1] / f"{name}.json").read_text(encoding="utf-8"))
    (test,) = content["tests"]
    says = SUBMISSIONS[name][1]
    assert test["max_score"] == 4 and test["score"] == content["score"] == 4 * (says is None)
    assert test["status"] == ("failed" if says else "passed")
    assert (says or "") in test["output"], test["output"]


def test_bad_folders_and_options_end_in_a_sentence(tmp_path, capsys, student):
    shutil.copytree(student, tmp_path / "a" / "same", ignore=shutil.ignore_patterns("assets"))
    shutil.copytree(student, tmp_path / "b" / "same", ignore=shutil.ignore_patterns("assets"))
    for arguments, sentence in ((["gone"], "expected a student's folder"),
                                ([str(tmp_path)], "expected a student's folder"),
                                ([str(student), "--tasks", "99"], "99 is no task"),
                                ([str(student), "--tasks", "a"], "expected numbers such as 3,7"),
                                ([str(student), "--seconds", "0"], "expected more than 0"),
                                ([str(tmp_path / "a/same"), str(tmp_path / "b/same")],
                                 "two folders of this name")):
        assert exercises.main(["grade", *arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


# ============================================================================================
# The equations

SLIDES = {"y = F(x, {W_i}) + x", "F(x) := H(x) - x", "y = F(x) + W_s x",
          '"if t = T the full L, else L_adv"'}


def test_readmes_map_of_the_equations_is_the_codes():
    """Tag, function and test of each row; the gallery shows that the test looks at the function."""
    rows = re.findall(r"^\| ((?:Eq\.|slides:)[^|]*) \| `(\w+\.py):(\w+)` \| `(\w+)` \|$",
                      source("README.md"), re.M)
    rows = [(re.match(r"Eq\. \(\d\)|slides: .*", tag)[0], *rest) for tag, *rest in rows]
    assert {tag for tag, *_ in rows if tag.startswith("Eq")} == {f"Eq. ({n})" for n in range(1, 9)}
    assert {tag.removeprefix("slides: ") for tag, *_ in rows if "slides" in tag} == SLIDES
    for tag, file, name, test in rows:
        lines = source(file).split("\n")
        kind, _, formula = tag.partition(": ")
        tagged = [i for i, line in enumerate(lines, 1) if (
            line.endswith(f"# {tag}") if not formula else kind + ":" in line and formula in line)]
        (node,) = (n for n in ast.parse(source(file)).body if getattr(n, "name", "") == name)
        assert len(tagged) == 1 and node.lineno <= tagged[0] <= node.end_lineno, \
            f"README: {tag} is not (once) in {file}:{name}, but in lines {tagged}"
        caught = [edit for _, edit in EDITS if edit.test.partition("[")[0] == test
                  and edit.file == file and node.lineno <= source(file)[:source(file).index(
                      edit.old)].count("\n") + 1 <= node.end_lineno]
        assert caught, f"README: no mistake in {file}:{name} is caught by {test}"
