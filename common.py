"""What the scripts share: images, pictures, and the files of a run. No losses, no networks."""

import argparse
import contextlib
import csv
import os
import pickle
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

SETS = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


class Error(Exception):
    """A problem that the scripts expect, such as a missing file; its text is one line for the user."""


def run_script(main):
    """Call main; an Error or Ctrl-C ends the script in one line, anything else in Python's traceback."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except Error as error:
        sys.exit(f"{script}: error: {error}")
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)


def count(text):
    """An argparse type: a whole number that is not below 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def one_line(error):
    """The name of an exception and all of its text, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def pick_device(name):
    """The torch.device of that name; "auto" is the accelerator (CUDA, ROCm, MPS, XPU) if there is one, or the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def use_bf16(network, float32_layers):
    """Compute matrix products and convolutions in network.forward in bfloat16; float32_layers still return float32."""
    device = next(network.parameters()).device
    network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
    for layer in float32_layers:
        layer.register_forward_hook(lambda module, inputs, output: output.float())


# --- Images ---


class Dataset(NamedTuple):
    name: str
    train: torch.Tensor  # uint8 (N, C, H, W)
    test: torch.Tensor
    test_labels: torch.Tensor  # int64 (N,)
    classes: list  # their names


def load_dataset(name, root, size=None):
    """Load a data set from the folder root, or download it there. Without a name: MNIST, or else the digits.

    Its images are resized to size x size if a size is given. Raises Error with the reason if it is not available.
    """
    from torchvision import datasets
    from torchvision.transforms.functional import resize

    if name == "digits":
        return load_digits(size)
    kind = SETS[name or "mnist"]
    try:
        splits = [getattr(datasets, kind)(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # a failed download and a damaged file raise errors of many kinds
        problem = f"{kind} is not available in {root}/ ({one_line(error)})"
        if name:
            raise Error(problem) from None
        print(f"*** WARNING: {problem}\n*** TRAINING ON THE DIGITS OF SCIKIT-LEARN INSTEAD", file=sys.stderr)
        return load_digits(size)

    images = []
    for split in splits:
        x = torch.as_tensor(split.data)
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)  # from (N, H, W), or of CIFAR (N, H, W, 3)
        images.append(resize(x, [size or x.shape[-1]] * 2).contiguous())
    return Dataset(name or "mnist", *images, torch.as_tensor(splits[1].targets), splits[1].classes)


def load_digits(size=None):
    """The 1,797 8x8 digits inside scikit-learn, 1,500 to train on and 297 to test on: no download needed."""
    from sklearn import datasets
    from torchvision.transforms.functional import resize

    digits = datasets.load_digits()
    images = resize(torch.from_numpy(digits.images[:, None]) * (255 / 16), [size or 28] * 2).round().byte()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.from_numpy(digits.target)[order]
    return Dataset("digits", images[:1500], images[1500:], labels[1500:], digits.target_names.tolist())


def batches(images, batch_size, shuffle=False):
    """Yield uint8 images as batches of floats in 0..1, on their device, with a bar; the last batch may be smaller."""
    indices = torch.arange(len(images), device=images.device)
    if shuffle:
        indices = torch.randperm(len(images), device=images.device)
    for batch in tqdm(indices.split(batch_size), leave=False, disable=None):  # None: no bar in a file
        yield images[batch] / 255


# --- Pictures ---


def save_grid(path, images, columns=10):
    """Write images (N, C, H, W) in 0..1 as one PNG, `columns` to a row."""
    from torchvision.utils import save_image

    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images, path, nrow=columns)


def save_curves(path, rows, panels, steps=None):
    """Plot columns of the rows over the epochs; panels is {title: its columns}.

    The last 200 values of steps, {column: its value at every step}, get a panel of their own.
    """
    from matplotlib.figure import Figure

    width = len(panels) + bool(steps)
    figure = Figure(figsize=(4.5 * width, 3.5), layout="constrained")
    axes = figure.subplots(1, width)
    epochs = [row["epoch"] for row in rows]
    for ax, (title, columns) in zip(axes, panels.items()):
        for column in columns:
            ax.plot(epochs, [row[column] for row in rows], marker=".", label=column)
        ax.set(title=title, xlabel="epoch")
    if steps:
        for column, values in steps.items():
            axes[-1].plot(range(len(values))[-200:], values[-200:], label=column)
        axes[-1].set(title="the last 200 steps", xlabel="step")
        axes[-1].locator_params("x", nbins=4)  # room for six digits
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend()
    with warn_if_unwritable(path):
        figure.savefig(path, dpi=150)


# --- The files of a run ---


def new_folder(out, name):
    """Make the folder of a new run: out, which must not exist, or the first free of runs/NAME, runs/NAME-2, ..."""
    folder = Path("runs", name) if out is None else Path(out)
    number = 1
    while True:
        try:
            folder.mkdir(parents=True)  # by making it, so that two runs that start at the same moment get two
            return folder
        except FileExistsError:
            if out is not None:
                raise Error(f"{out!r} exists, and no run is overwritten: name another folder") from None
            number += 1
            folder = Path("runs", f"{name}-{number}")


def run_folder(text):
    """An argparse type: the folder of a run, given by its own name or by that of the checkpoint.pt in it."""
    path = Path(text)
    folder = path.parent if path.name == "checkpoint.pt" else path
    if not text or not Path(folder, "checkpoint.pt").is_file():
        raise Error(f"{text!r} is not a run: name its folder or the checkpoint.pt in it")
    return str(folder)


@contextlib.contextmanager
def warn_if_unwritable(path):
    """A file that cannot be written, such as one that is open in Excel on Windows, costs a warning and not the run."""
    try:
        yield
    except OSError as error:
        print(f"warning: {path} was not written ({one_line(error)})", file=sys.stderr)


def open_board(folder, rows):
    """A TensorBoard writer that goes on after the rows that are done."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=len(rows) + 1)


def save_epoch(folder, rows, pictures, board=None):
    """Write metrics.csv with all rows, the last one's pictures {name: (N, C, H, W)}, and both to TensorBoard."""
    from torchvision.utils import make_grid

    epoch = rows[-1]["epoch"]
    for name, images in pictures.items():
        path = folder / f"images/epoch_{epoch:03d}_{name}.png"
        with warn_if_unwritable(path):
            save_grid(path, images)
    path = folder / "metrics.csv"
    with warn_if_unwritable(path), path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    if board:
        for name, value in rows[-1].items():
            if name != "epoch":
                board.add_scalar(name, value, epoch)
        for name, images in pictures.items():
            board.add_image(name, make_grid(images, nrow=10), epoch)
        board.flush()


def check_finite(values):
    """Raise Error if a number or a tensor of {name: value} is not finite; it names the first."""
    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            raise Error(f"{name} is not finite: the training diverged; try a smaller --lr")


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values beside its place, then move it: a kill leaves the old or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")  # two processes do not write to the same file
    try:
        torch.save(checkpoint, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # it is there only after Ctrl-C, or on a full disk


def load_checkpoint(run):
    """The dict in a run's checkpoint.pt or another file of torch.save, on the CPU; no code in it runs. Raises Error."""
    path = Path(run, "checkpoint.pt") if Path(run).is_dir() else Path(run)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Error(f"there is no file {path}") from None
    except pickle.UnpicklingError:
        raise Error(f"{path} is not a file of tensors and plain values alone: save model.state_dict()") from None
    except Exception as error:  # a damaged file raises errors of many kinds
        raise Error(f"{path} cannot be opened ({one_line(error)})") from None
    if not isinstance(checkpoint, dict):
        raise Error(f"{path} holds a {type(checkpoint).__name__}, not a dict: save model.state_dict()")
    return checkpoint


def tensors(tree, prefix=""):
    """The tensors in nested dicts, each under its full name, such as "state_dict.encoder.mean.weight"."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= tensors(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
    return found


def find_weights(checkpoint, name):
    """The state_dict of the network that has a weight called `name`, wherever in a checkpoint it lies, or {}.

    What stands before the name is left out: "state_dict.", "model_state_dict.", "generator.", or what
    DistributedDataParallel and torch.compile put there, "module." and "_orig_mod.".
    """
    found = tensors(checkpoint)
    for key in found:
        if key.endswith(name):
            prefix = key.removesuffix(name)
            return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    return {}


def load_weights(network, weights, path):
    """network.load_state_dict(weights); raises Error with torch's own reason if those of path do not fit."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise Error(f"the weights in {path} do not fit ({one_line(error)})") from None


def load_adam(optimizer, saved):
    """Load Adam's moments, and leave its options (lr, betas) as they are."""
    optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.empty_like(parameter)  # in the parameter's memory layout, or fused Adam is silently wrong
            state[name] = moment.copy_(state[name])
