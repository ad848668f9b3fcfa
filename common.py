"""What the scripts share: images, curves, and the files of a run. No losses, no networks."""

import atexit
import contextlib
import csv
import os
import shutil
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

if "IPython" not in sys.modules:  # a notebook's !python inherits a backend that this Python may not have
    os.environ["MPLBACKEND"] = "agg"

import torch
from matplotlib.figure import Figure
from torchvision import datasets
from torchvision.transforms.functional import resize
from torchvision.utils import make_grid, save_image
from tqdm.auto import tqdm

SETS = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """--help with the description as it stands, and the default of every option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def pick_device(name):
    """The torch.device of that name; "auto" is the accelerator (CUDA, ROCm, MPS, XPU) if there is one, or the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def use_bf16(network, float32_layers):
    """Compute matrix products and convolutions of the network in bfloat16, and convert what float32_layers return."""
    device = next(network.parameters()).device
    network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
    for layer in float32_layers:
        layer.register_forward_hook(lambda module, inputs, output: output.float())  # the output is replaced by it


# --- Images ---


class Dataset(NamedTuple):
    name: str
    train: torch.Tensor  # uint8 (N, C, H, W)
    train_labels: torch.Tensor  # int64 (N,), indices of classes
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list  # their names


def load_dataset(name, root, size=None):
    """Load a data set from the folder root, or download it there; name None is MNIST, or the digits if it fails.

    Returns a Dataset, its images resized to size x size if a size is given. Exits if a named set is not available, or
    if images and labels do not belong together.
    """
    if name == "digits":
        return load_digits(size or 28)
    kind = SETS[name or "mnist"]
    torchvision_class = getattr(datasets, kind)
    folder = Path(root, getattr(torchvision_class, "base_folder", f"{kind}/raw"))  # CIFAR's have a base_folder
    try:
        splits = [torchvision_class(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # a failed download and a damaged file raise errors of many kinds
        reason = " ".join(str(error).split())
        problem = f"{kind} is not available ({reason}); its files belong in {folder}, see README.md"
        if name:
            sys.exit(problem)
        print(f"*** WARNING: {problem}\n*** TRAINING ON THE DIGITS OF SCIKIT-LEARN INSTEAD", file=sys.stderr)
        return load_digits(size or 28)

    pairs = []
    for split in splits:
        images = torch.as_tensor(split.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)  # CIFAR's are (N, H, W, 3)
        labels = torch.as_tensor(split.targets)
        if len(images) != len(labels) or labels.min() < 0 or labels.max() >= len(split.classes):
            sys.exit(f"{kind} in {folder}: images and labels do not belong together")
        if size:
            images = resize(images, [size, size])
        pairs.append((images.contiguous(), labels))
    (train, train_labels), (test, test_labels) = pairs
    return Dataset(name or "mnist", train, train_labels, test, test_labels, splits[0].classes)


def load_digits(size):
    """The 1,797 digits inside scikit-learn, 8x8 resized to size x size: 1,500 to train on and 297 to test on."""
    import sklearn.datasets  # here, since it takes a second

    digits = sklearn.datasets.load_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)
    images = resize(images, [size, size]).round().byte()
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order.split([1500, 297])
    return Dataset("digits", images[train], labels[train], images[test], labels[test], digits.target_names.tolist())


def batches(images, labels, batch_size, shuffle=False):
    """Yield (images, labels) of each batch, uint8 images as floats in 0..1, and draw a bar; the last may be smaller.

    A generator gives its batches once: call this again for every epoch.
    """
    indices = torch.arange(len(images), device=images.device)
    if shuffle:
        indices = torch.randperm(len(images), device=images.device)
    for batch in tqdm(indices.split(batch_size), leave=False, disable=None):  # None: no bar in a file
        yield images[batch] / 255, labels[batch]


# --- The files of a run ---


def new_folder(out, name):
    """Make the folder of a new run: out, which must not exist, or the first free of runs/NAME, runs/NAME-2, ...

    Exits if out exists. If the folder holds no checkpoint when the script ends, it is removed.
    """
    folder = Path("runs", name) if out is None else Path(out)
    number = 1
    while True:
        try:
            folder.mkdir(parents=True)  # mkdir is atomic: two simultaneous runs get two folders
            break
        except FileExistsError:
            if out is not None:
                sys.exit(f"{out!r} exists, and no run is overwritten: name another folder")
        number += 1
        folder = Path("runs", f"{name}-{number}")
    checkpoint = folder.resolve() / "checkpoint.pt"
    atexit.register(lambda: checkpoint.exists() or shutil.rmtree(checkpoint.parent, ignore_errors=True))
    return folder


def run_folder(text):
    """An argparse type: the folder of a run, given by its own name or by that of the checkpoint.pt in it."""
    path = Path(text).expanduser()
    folder = path.parent if path.name == "checkpoint.pt" else path
    if not text or not Path(folder, "checkpoint.pt").is_file():
        sys.exit(f"{text!r} is not a run: name its folder or the checkpoint.pt in it")
    return str(folder)


def newest_run(pattern):
    """The folder with the newest checkpoint among those in runs/ whose names match the pattern; exits if none is."""
    checkpoints = Path("runs").glob(f"{pattern}/checkpoint.pt")
    newest = max(checkpoints, key=os.path.getmtime, default=None)
    if newest is None:
        sys.exit(f"there is no run runs/{pattern}: train one first, or name one")
    return newest.parent


def load_run_images(config, options):
    """The Dataset of a run, or that of the options, in the image size of the model; exits if it does not fit."""
    name = options.dataset or config["dataset"]
    shape = config["image_shape"]
    data = load_dataset(name, options.data or config["data"], size=shape[-1])
    if data.test.shape[1:] != shape:
        sys.exit(f"the model takes images of shape {shape}, those of {name} have {tuple(data.test.shape[1:])}")
    return data


def open_board(folder, rows):
    """A TensorBoard writer that continues after the epochs in rows."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=len(rows) + 1)


def save_epoch(folder, rows, pictures, board, checkpoint):
    """Write what an epoch leaves: pictures {name: (N, C, H, W)} in 0..1, TensorBoard, metrics.csv and checkpoint.pt.

    rows are those of all epochs so far. If a number or a picture of the last one is not finite, it exits and writes
    nothing.
    """
    epoch = rows[-1]["epoch"]
    for name, value in {**rows[-1], **pictures}.items():
        if not torch.as_tensor(value).isfinite().all():
            sys.exit(f"epoch {epoch}: {name} is not finite: the training diverged; try a smaller --lr")

    (folder / "images").mkdir(exist_ok=True)
    for name, images in pictures.items():
        save_image(images, folder / f"images/epoch_{epoch:03d}_{name}.png", nrow=10)
    if board:
        for name, value in rows[-1].items():
            board.add_scalar(name, value, epoch)
        for name, images in pictures.items():
            board.add_image(name, make_grid(images, nrow=10), epoch)
        board.flush()

    try:
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    except PermissionError as error:  # on Windows, if Excel holds the file open
        print(f"warning: {error}; metrics.csv lacks this epoch until the next is saved", file=sys.stderr)

    temporary = folder / f"checkpoint.pt.{os.getpid()}"  # two processes that resume one run do not share it
    try:
        torch.save({**checkpoint, "epoch": epoch, "metrics": rows}, temporary)
        temporary.replace(folder / "checkpoint.pt")  # a kill leaves the old file or the new one
    except PermissionError as error:  # on Windows, if a virus scanner holds the file open
        if not (folder / "checkpoint.pt").exists():
            raise  # there is no earlier one to fall back on
        print(f"warning: {error}; checkpoint.pt is that of an earlier epoch", file=sys.stderr)
    finally:
        with contextlib.suppress(PermissionError):
            temporary.unlink(missing_ok=True)


def save_curves(path, rows, curves, steps=None, levels=()):
    """Plot curves {title: {legend: column of rows}} over the epochs, and the last 200 of steps {legend: values}.

    levels are the heights of dashed lines, one for each panel.
    """
    width = len(curves) + (steps is not None)
    figure = Figure(figsize=(4.5 * width, 3.5), layout="constrained")
    axes = figure.subplots(1, width)
    epochs = [row["epoch"] for row in rows]
    for ax, (title, columns) in zip(axes, curves.items()):
        for legend, column in columns.items():
            ax.plot(epochs, [row[column] for row in rows], marker=".", label=legend)
        ax.set(title=title, xlabel="epoch")
    if steps is not None:
        for legend, values in steps.items():
            axes[-1].plot(values[-200:], label=legend)
        axes[-1].set(title=f"the last {len(values[-200:])} steps", xlabel="step, from the first one shown")
    for ax, level in zip(axes, levels):
        ax.axhline(level, color="gray", linestyle="--", label=f"{level:.3g}")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path, dpi=150)


def load_checkpoint(run):
    """The dict in a run's checkpoint.pt or another file of torch.save, on the CPU; exits if it cannot be read.

    Pickled code is never executed.
    """
    path = Path(run, "checkpoint.pt") if Path(run).is_dir() else Path(run)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        reason = f"a {type(content).__name__}, not a dict"
    except Exception as error:  # a missing, damaged or foreign file raises errors of many kinds
        content = None
        reason = type(error).__name__
    if not isinstance(content, dict):
        sys.exit(f"{path} cannot be read ({reason}); weights are saved with torch.save(model.state_dict(), ...)")
    return content


def find_weights(tree, name):
    """The state_dict of the network that has a weight called `name`, at any depth of nested dicts, or {}.

    What stands before the name is left out: "encoder." or "generator." of a larger model, or what
    DistributedDataParallel and torch.compile put there, "module." and "_orig_mod.".
    """
    for key, value in tree.items():
        if isinstance(value, dict):
            if weights := find_weights(value, name):
                return weights
        elif str(key).endswith(name):
            prefix = key.removesuffix(name)
            weights = {other: weight for other, weight in tree.items() if isinstance(weight, torch.Tensor)}
            return {other.removeprefix(prefix): weights[other] for other in weights if other.startswith(prefix)}
    return {}


def contents(checkpoint):
    """What a checkpoint holds, in a few words, for the message that refuses it."""
    if isinstance(checkpoint.get("model"), str):
        return f"a {checkpoint['model'].upper()}"
    return f"a dict of {', '.join(map(str, list(checkpoint)[:3]))}, ..."


def load_adam(optimizer, saved):
    """Load Adam's moments from an optimizer.state_dict(), and leave its options (lr, betas) as they are."""
    optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.empty_like(parameter)  # in the parameter's memory layout, or fused Adam is silently wrong
            state[name] = moment.copy_(state[name])
