"""What the scripts share: small helpers for devices, images, pictures and files. No losses, no networks."""

import argparse
import contextlib
import io
import math
import os
import signal
import socket
import sys
import textwrap
import timeit
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch  # other packages are imported where they are used, so that --help is quick

SETS = dict(mnist="MNIST", fashion="FashionMNIST", kmnist="KMNIST", cifar10="CIFAR10", cifar100="CIFAR100")
DEVICES = ["auto", "cuda", "mps", "cpu"]
SAVE_EVERY = 30  # seconds between checkpoints
NO_BAR = not (sys.stderr.isatty() or "ipykernel" in sys.modules)  # a bar would stay in a file


class Error(Exception):
    """An error that the user can mend; its text is one line that says how."""


def run_script(main):
    """Call main; an Error, Ctrl-C or SIGTERM ends in one line, anything else in Python's traceback."""
    script = Path(sys.argv[0]).name
    os.environ["MPLBACKEND"] = "agg"  # a notebook passes on its own, which may not be installed here
    socket.setdefaulttimeout(30)  # seconds of silence after which a download gives up
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except Error as error:
        sys.exit(f"{script}: error: {error}")
    except KeyboardInterrupt as interruption:
        print(f"{script}: {str(interruption) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


def between(kind, low, high=math.inf):
    """An argparse type: an int or a float with low <= number < high."""

    def number(text):
        if not low <= kind(text) < high:  # nan is in no range
            raise argparse.ArgumentTypeError(f"{text} is not in the range {low} <= number < {high}")
        return kind(text)

    return number


def pick_device(name):
    """The torch device for --device; "auto" is a GPU if there is one. Raises Error if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        raise Error(f"there is no {name} device here; use --device auto")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    return torch.device(name)


def bf16_pays(device):
    """Whether a matrix product is faster in bfloat16 than in float32, by a trial; says so if it is not."""
    x = torch.ones(2 * [256 if device.type == "cpu" else 2048], device=device)

    def seconds(x):
        return min(timeit.repeat(lambda: (x @ x)[0, 0].item(), number=1, repeat=6))  # item() waits for the device

    try:
        pays = seconds(x.bfloat16()) < seconds(x)
    except (RuntimeError, TypeError):  # a device without bfloat16
        pays = False
    if not pays:
        print(f"--bf16 is no faster on this {device.type} device: training in float32")
    return pays


class Dataset(NamedTuple):
    name: str
    train: torch.Tensor  # uint8 (N, C, H, W)
    test: torch.Tensor
    test_labels: torch.Tensor  # int64 (N,)
    classes: list  # their names


def load_dataset(name, root, size=None):
    """Load the named data set from the folder root, or download it there. Without a name: MNIST, or else the digits.

    Its images are resized to size x size if a size is given. Raises Error if it cannot be had.
    """
    from torchvision import datasets
    from torchvision.transforms.functional import resize

    if name == "digits":
        return load_digits(size or 28)
    kind = SETS[name or "mnist"]
    try:
        splits = [getattr(datasets, kind)(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # a failed download and a damaged file raise errors of many kinds
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        if len(list(Path(root, kind, "raw").glob("*-ubyte"))) == 4:
            raise Error(f"{root}/{kind} is damaged: delete it and run again ({reason})") from None
        problem = f"{kind} is not in {root}/ and cannot be downloaded ({reason})"
        if name is not None:
            advice = "connect to a network, name another folder with --data, or use --dataset digits"
            raise Error(f"{problem}; {advice}") from None
        print(f"*** WARNING: {problem}.\n*** TRAINING ON THE DIGITS OF SCIKIT-LEARN INSTEAD.", file=sys.stderr)
        return load_digits(size or 28)

    images = [torch.as_tensor(split.data) for split in splits]  # (N, H, W), or of CIFAR (N, H, W, 3)
    images = [x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2) for x in images]
    train, test = (resize(x, [size or x.shape[-1]] * 2).contiguous() for x in images)
    return Dataset(name or "mnist", train, test, torch.as_tensor(splits[1].targets), splits[1].classes)


def load_digits(size):
    """The 1,797 8x8 digits inside scikit-learn, 1,500 to train on and 297 to test on: no network needed."""
    from sklearn import datasets
    from torchvision.transforms.functional import resize

    digits = datasets.load_digits()
    images = resize(torch.from_numpy(digits.images[:, None]) * (255 / 16), [size, size]).round().byte()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.from_numpy(digits.target)[order]
    return Dataset("digits", images[:1500], images[1500:], labels[1500:], digits.target_names)


def batches(images, batch_size, shuffle=False):
    """One pass over uint8 images, on their device: floats in 0..1; the last batch may be smaller."""
    order = torch.randperm if shuffle else torch.arange
    for indices in order(len(images), device=images.device).split(batch_size):
        yield images[indices] / 255


def save_grid(path, images, columns=10):
    """Write images (N, C, H, W) in 0..1 as one PNG, `columns` to a row; returns the grid (C, H, W)."""
    from torchvision.utils import make_grid, save_image

    grid = make_grid(images.cpu(), nrow=columns)
    with whole_file(path) as file:
        save_image(grid, file, format="png")
    return grid


def save_curves(path, rows, panels, steps=None):
    """Plot columns of the rows, one per epoch, over the epochs; panels is {title: its columns}.

    steps, {column: array of its values in every step}, is drawn faintly behind, evenly over the epochs.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels.items()):
        for column in columns:
            style = "-" if len(rows) > 1 else "o"
            (line,) = axes.plot(epochs, [row[column] for row in rows], style, label=column)
            if steps and column in steps:
                x = torch.linspace(0, epochs[-1], len(steps[column])).numpy()
                axes.plot(x, steps[column], color=line.get_color(), linewidth=0.5, alpha=0.3, zorder=1)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    with whole_file(path) as file, rc_context({"agg.path.chunksize": 1000}):  # long curves in pieces: much faster
        figure.savefig(file, dpi=150)


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, moved to its place when complete: after a kill it is the old one or the new one."""
    path, temporary, buffer = Path(path), Path(f"{path}.tmp"), io.BytesIO()
    yield buffer
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    except OSError as error:
        raise Error(f"cannot write {path}: {error.strerror}; what was saved before is as it was") from None
    finally:
        with contextlib.suppress(OSError):  # after a success it is no longer there
            temporary.unlink()


def new_folder(out, name):
    """Make the folder of a new run: out, which must not exist, or the first free of runs/NAME, runs/NAME-2, ..."""
    folder, n = Path(out or f"runs/{name}"), 1
    while folder.exists() and not out:
        n += 1
        folder = Path(f"runs/{name}-{n}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise Error(f"cannot make a new folder {folder}: {error.strerror}; give another one with --out") from None
    return folder


def save_metrics(path, rows):
    """Write the rows, dicts with the same keys, as a CSV file."""
    with whole_file(path) as file:
        for line in [rows[0].keys(), *(row.values() for row in rows)]:
            file.write((",".join(map(str, line)) + "\n").encode())


def check_finite(values):
    """Raise Error if a number or tensor in {name: value} is not finite; it names the first."""
    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            raise Error(f"{name} is not finite: the training diverged; use a smaller --lr, anew or with --resume")


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values, so that weights_only=True can load it."""
    with whole_file(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(run, device="cpu"):
    """The dict in a run's checkpoint, or {"state_dict": ...} of bare weights; no code in it is run. Raises Error."""
    path = Path(run, "checkpoint.pt") if Path(run).is_dir() else Path(run)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum in it is wrong")  # torch.load does not look at them
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        return checkpoint if "state_dict" in checkpoint else {"state_dict": checkpoint}
    except Exception as error:  # a damaged file raises errors of many kinds
        reason = str(error).split("WeightsUnpickler error: ")[-1]  # what comes before it is general advice
        raise Error(f"cannot open {path} as a checkpoint: {textwrap.shorten(reason, 300)}") from None


def restore(run, checkpoint, model, optimizers=()):
    """Load the weights and Adam's moments, but not its learning rate. Raises Error with torch's own reason."""
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise Error(f"{run} does not fit the network: {textwrap.shorten(str(error), 300)}") from None
    for optimizer, saved in zip(optimizers, checkpoint.get("optimizers", ())):
        optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
        for parameter, moments in optimizer.state.items():  # fused Adam needs both laid out alike in memory
            moments |= {name: torch.empty_like(parameter).copy_(moments[name]) for name in ("exp_avg", "exp_avg_sq")}
