"""The lab as an instructor hands it out: the notebook and the scripts without the answers.

    python -m docs.student_version class/

The functions in TO_WRITE keep their docstrings and raise NotImplementedError; the classes of the exercises are gone.
"""

import ast
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXERCISES = {"ConvEncoder", "ConvDecoder", "Autoencoder"}
TO_WRITE = {
    "reparameterize", "reconstruction_loss", "kl_divergence", "train_vae",
    "generator_loss", "discriminator_loss", "train_dcgan",
}


def without_answers(source):
    """The Python source with the bodies of TO_WRITE taken out, and without the EXERCISES."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):  # from the last one, so that earlier line numbers stay valid
        name = getattr(node, "name", None)
        if name in EXERCISES:
            del lines[node.lineno - 1 : node.end_lineno + 2]  # and two empty lines
        if name in TO_WRITE:
            docstring = node.body[0]
            lines[docstring.end_lineno : node.end_lineno] = ["    raise NotImplementedError\n"]
    return "".join(lines)


def main(folder):
    folder.mkdir(parents=True)
    for name in ("vae.py", "dcgan.py"):
        source = (ROOT / name).read_text(encoding="utf-8")
        (folder / name).write_text(without_answers(source), encoding="utf-8")
    for name in ("common.py", "sample.py", "tsne.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)

    notebook = json.loads((ROOT / "docs/lab.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = without_answers("".join(cell["source"]))
            cell |= {"source": source.splitlines(keepends=True), "outputs": [], "execution_count": None}
    (folder / "lab.ipynb").write_text(json.dumps(notebook, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
