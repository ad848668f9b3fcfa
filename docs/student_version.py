"""The lab for a class: the notebook without its answers, and the same as the source of an nbgrader assignment.

    python -m docs.student_version class/

writes class/lab.ipynb, for students, and for nbgrader class/source/lab/lab.ipynb, from which it makes the students'
notebook and grades what comes back, and nbgrader_config.py. docs/answers.md says how to hand the lab out.
"""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
TASKS = {  # points, difficulty, minutes, and what is given
    "reparameterize": (2, "*", 10, "the equation, and the derivatives that z must have"),
    "reconstruction_loss": (2, "*", 10, "the equation for one image"),
    "kl_divergence": (2, "*", 10, "the equation for one image"),
    "train_vae": (4, "***", 40, "the steps in words; `evaluate_vae`, below it, shows how the losses are averaged"),
    "generator_loss": (2, "*", 5, "the equation"),
    "discriminator_loss": (2, "*", 10, "the equation"),
    "train_dcgan": (4, "***", 50, "the steps in words"),
}
QUESTION_POINTS = 2
OURS = {  # what stands in for the student's when a loop is tested, so that a mistake costs its points only once
    "train_vae": ["reparameterize", "reconstruction_loss", "kl_divergence"],
    "train_dcgan": ["generator_loss", "discriminator_loss"],
}

INTRODUCTION = """\
## What you do

Write seven functions, each from its docstring and the text above it, in place of `raise NotImplementedError`. Run the
check below each: it says "right", or what yours gives and what is right. Further tests are run when the lab is graded;
there the loops are run with correct losses, so that a mistake costs its points only once. Keep the functions' names and
arguments; imports, helpers and cells of your own are welcome. Then train the models, and answer the six questions, each
in a few sentences that say what your own curves and pictures show.

| to write | given | difficulty | time | points |
| --- | --- | :---: | ---: | ---: |
{rows}
| six answers | the curves and pictures of your training | ** | 10 min each | {question_points} each |

The times are estimates, for somebody who has trained a network in PyTorch before: three hours and a quarter in all. The
models train meanwhile: start the VAEs before you read part 2, and the GAN before you write the answers.
"""
ANSWER = "*Your answer:*"
BEGIN = "### BEGIN HIDDEN TESTS"
END = "### END HIDDEN TESTS"
STDERR = "import sys\n\nsys.stderr = sys.stdout  # nbgrader takes a warning or a progress bar there for an error"


def parse(cell):
    """The statements of a code cell. IPython's own lines (%pip, !ls, show?) count as pass; text and errors are none."""
    source = cell["source"] if cell["cell_type"] == "code" else ""
    python = re.sub(r"^([ \t]*)([%!].*|.*\?)$", r"\1pass", source, flags=re.MULTILINE)
    for text in (source, python):
        try:
            return ast.parse(text).body
        except SyntaxError:
            continue
    return []


def find_tasks(cells):
    """{name: (index of its cell, its node, index of its check)} for TASKS; exits if one is not there exactly once."""
    asserts = [index for index, cell in enumerate(cells) if re.search(r"^ *assert ", cell["source"], re.MULTILINE)]
    tasks = {}
    functions = []  # with the index of the cell that each is in
    for index, cell in enumerate(cells):
        functions += [(index, node) for node in parse(cell) if isinstance(node, ast.FunctionDef)]
    for name in TASKS:
        found = [(index, node) for index, node in functions if node.name == name and ast.get_docstring(node)]
        if len(found) != 1:
            sys.exit(f"lab.ipynb must define {name} exactly once, with a docstring; found: {len(found)}")
        index, node = found[0]
        check = min((other for other in asserts if other > index), default=None)
        if check is None or check in [other for _, _, other in tasks.values()]:
            sys.exit(f"lab.ipynb has no check, a cell with an assert, after {name}")
        tasks[name] = (index, node, check)
    return tasks


def with_marks(source, node):
    """The source with nbgrader's marks around the body of a function, below its docstring."""
    lines = source.splitlines()
    lines.insert(node.end_lineno, "    ### END SOLUTION")
    lines.insert(node.body[0].end_lineno, "    ### BEGIN SOLUTION")
    return "\n".join(lines)


def with_hidden_test(name, check, ours):
    """The check of a function with its test of hidden_tests.py; of that file it takes all that is no other test."""
    source = (DOCS / "hidden_tests.py").read_text(encoding="utf-8")
    before = [BEGIN, STDERR, *ours, END]
    after = [BEGIN]
    for node in ast.parse(source).body:
        of_the_scripts = isinstance(node, ast.ImportFrom) and node.module in ("vae", "dcgan")
        of_the_notebook = isinstance(node, (ast.Expr, ast.Assign))  # the docstring and the device
        of_another = getattr(node, "name", "").startswith("test_") and node.name != f"test_{name}"
        if not (of_the_scripts or of_the_notebook or of_another):
            after.append(ast.get_source_segment(source, node))
    after += [f"test_{name}()", END]
    return "\n".join(["\n\n".join(before), check, "\n\n".join(after)])


def metadata(grade_id, points=None, solution=False):
    """nbgrader's: a cell with points is graded, a solution is the student's; all others are put back as they were."""
    content = {
        "grade_id": grade_id,
        "grade": points is not None,
        "solution": solution,
        "locked": not solution,
        "task": False,
        "schema_version": 3,
    }
    if points is not None:
        content["points"] = points
    return {"nbgrader": content}


def text_cell(name, source, metadata):
    return {"cell_type": "markdown", "id": name.replace("_", "-"), "metadata": metadata, "source": source}


def assignment(cells):
    """The cells of nbgrader's source: those of the notebook with its marks and metadata, and cells for the answers."""
    tasks = find_tasks(cells)
    functions = {name: ast.get_source_segment(cells[i]["source"], node) for name, (i, node, _) in tasks.items()}
    for number, cell in enumerate(cells):
        # text, imports and definitions are given; all other cells train or draw
        kinds = {type(node) for node in parse(cell)}
        if ast.Import in kinds or kinds <= {ast.ImportFrom, ast.ClassDef, ast.FunctionDef}:
            cell["metadata"] = metadata(f"given_{number}")
        else:
            cell["metadata"] = {"tags": ["skip-execution"]}
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    for name, (index, node, check) in tasks.items():
        cells[index]["source"] = with_marks(cells[index]["source"], node)
        cells[index]["metadata"] = metadata(name, solution=True)
        ours = [functions[other] for other in OURS.get(name, [])]
        cells[check]["source"] = with_hidden_test(name, cells[check]["source"], ours)
        cells[check]["metadata"] = metadata(f"test_{name}", TASKS[name][0])

    rows = "\n".join(
        f"| `{name}` | {given} | {difficulty} | {minutes} min | {points} |"
        for name, (points, difficulty, minutes, given) in TASKS.items()
    )
    introduction = INTRODUCTION.format(rows=rows, question_points=QUESTION_POINTS)
    result = [cells[0], text_cell("introduction", introduction, metadata("introduction"))]
    for cell in cells[1:]:
        result.append(cell)
        if question := re.match(r"> \*\*Question (\d)", cell["source"]):
            name = f"answer_{question[1]}"
            result.append(text_cell(name, ANSWER, metadata(name, QUESTION_POINTS, solution=True)))
    return result


def write(path, notebook, cells):
    cells = [{**cell, "source": cell["source"].splitlines(keepends=True)} for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**notebook, "cells": cells}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(folder):
    notebook = json.loads((DOCS / "lab.ipynb").read_text(encoding="utf-8"))
    cells = assignment([{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"]])
    folder.mkdir(parents=True)
    write(folder / "source/lab/lab.ipynb", notebook, cells)
    for cell in cells:
        cell["source"] = re.sub(rf"\n?{BEGIN}.*?{END}\n?", "", cell["source"], flags=re.DOTALL)
        cell["source"] = re.sub(
            r"### BEGIN SOLUTION.*?### END SOLUTION", "raise NotImplementedError", cell["source"], flags=re.DOTALL
        )
        cell["metadata"] = {}
    write(folder / "lab.ipynb", notebook, cells)
    shutil.copy(DOCS / "nbgrader_config.py", folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m docs.student_version FOLDER")
    if Path(sys.argv[1]).exists():
        sys.exit(f"{sys.argv[1]} exists: name a folder that does not")
    main(Path(sys.argv[1]))
