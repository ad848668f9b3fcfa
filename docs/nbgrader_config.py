"""nbgrader's options for the lab; student_version.py puts this file into the folder of the class."""

from nbgrader.preprocessors import CheckCellMetadata, DeduplicateIds, OverwriteCells, OverwriteKernelspec


class RepairCells(DeduplicateIds):
    """What students' notebooks have that would stop the series, or skip a test."""

    def preprocess_cell(self, cell, resources, cell_index):
        cell, resources = super().preprocess_cell(cell, resources, cell_index)
        if cell.metadata.get("nbgrader") == {}:
            del cell.metadata["nbgrader"]  # a copied cell has this, which nbgrader takes for an old format, and stops
        elif "nbgrader" in cell.metadata:
            cell.metadata.pop("tags", None)  # with skip-execution a test that is not run would count as passed
        return cell, resources


c = get_config()  # noqa: F821
c.Execute.timeout = 60  # seconds for a cell; an endless loop is interrupted then, and the next cell is run
c.Execute.raise_on_iopub_timeout = False  # a cell that prints without end does not stop the others
# nbgrader's list, without ClearOutput: whoever grades the answers needs the student's own curves and pictures
c.Autograde.sanitize_preprocessors = [RepairCells, OverwriteKernelspec, OverwriteCells, CheckCellMetadata]
