"""What the scripts share: options, images, and the files of a run, its curves among them."""

import csv
import importlib
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torchvision import datasets
from torchvision.transforms.functional import resize
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

SETS = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
COLUMNS = 10  # images in a row of every epoch's grids


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """--help with the description as it stands, and the default of every option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def positive(text):
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError  # argparse says which option it is
    return number


def pick_device(name):
    """The torch.device of that name; "auto" is the accelerator (CUDA, ROCm, MPS, XPU) if there is one, or the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def use_bf16(network, float32_layers):
    """Compute matrix products and convolutions of the network in bfloat16; float32_layers return float32."""
    device = next(network.parameters()).device
    forward = torch.autocast(device.type, torch.bfloat16)(type(network).forward)
    network.forward = MethodType(forward, network)  # a method, so that a deepcopy computes with its own weights
    for layer in float32_layers:
        layer.register_forward_hook(lambda module, inputs, output: output.float())  # the output is replaced by it


# --- Images ---


class Images(NamedTuple):
    name: str
    train: torch.Tensor  # float32 (N, C, H, W), in 0..1
    train_labels: torch.Tensor  # int64 (N,), indices of classes
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list  # their names


def load_images(name, root, size=None):
    """Load a data set from the folder root, or download it there; name None is MNIST, or the digits if it fails.

    Returns Images, resized to size x size if a size is given. Exits if a named set is not available, or if images and
    labels do not belong together.
    """
    if name == "digits":
        return load_digits(size or 28)
    kind = SETS[name or "mnist"]
    torchvision_class = getattr(datasets, kind)
    folder = Path(root, getattr(torchvision_class, "base_folder", f"{kind}/raw"))  # CIFAR's have a base_folder
    try:
        train_set = torchvision_class(root, train=True, download=True)
        test_set = torchvision_class(root, train=False, download=True)
    except Exception as error:  # a failed download and a damaged file raise errors of many kinds
        reason = " ".join(str(error).split())
        problem = f"{kind} is not available ({reason}); its files belong in {folder}, see README.md"
        if name:
            sys.exit(problem)
        print(f"*** WARNING: {problem}\n*** TRAINING ON THE DIGITS OF SCIKIT-LEARN INSTEAD", file=sys.stderr)
        return load_digits(size or 28)

    tensors = []
    for split in (train_set, test_set):
        images = torch.as_tensor(split.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)  # CIFAR's are (N, H, W, 3)
        labels = torch.as_tensor(split.targets)
        if len(images) != len(labels) or labels.min() < 0 or labels.max() >= len(split.classes):
            sys.exit(f"{kind} in {folder}: images and labels do not belong together")
        tensors += [to_float(images, size), labels]
    return Images(name or "mnist", *tensors, train_set.classes)


def load_digits(size):
    """The 1,797 digits inside scikit-learn, 8x8 resized to size x size: 1,500 to train on and 297 to test on."""
    import sklearn.datasets  # here, since it takes a second

    digits = sklearn.datasets.load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().byte()
    images = to_float(images[:, None], size)
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order.split([1500, 297])
    classes = [str(name) for name in digits.target_names]
    return Images("digits", images[train], labels[train], images[test], labels[test], classes)


def to_float(images, size=None):
    """Bytes (N, C, H, W) -> float32 in 0..1, resized to size x size as bytes, as PIL does it."""
    if size:
        images = resize(images, [size, size])
    return images.contiguous() / 255


def batches(images, labels, batch_size, shuffle=False):
    """Yield (images, labels) of each batch of one epoch, and draw a bar; the last batch may be smaller."""
    indices = torch.arange(len(images), device=images.device)
    if shuffle:
        indices = torch.randperm(len(images), device=images.device)
    for batch in tqdm(indices.split(batch_size), leave=False, disable=None):  # None: no bar in a file
        yield images[batch], labels[batch]


# --- The files of a run ---


def new_folder(out, name):
    """Make the folder of a new run, out or runs/NAME. Exits if it holds a run."""
    run_dir = Path("runs", name) if out is None else Path(out)
    if (run_dir / "checkpoint.pt").exists():
        name = shlex.quote(run_dir.as_posix())
        sys.exit(f"{run_dir} holds a run: go on with --resume {name}, or name another folder with --out")
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def open_writer(run_dir, rows):
    """A TensorBoard writer that continues after the epochs in rows."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run_dir, purge_step=len(rows) + 1)


def save_epoch(run_dir, rows, grids, writer, checkpoint):
    """Write what an epoch leaves: its grids {name: images (N, C, H, W)}, TensorBoard, metrics.csv and checkpoint.pt.

    rows are those of all epochs so far. If a number or an image of the last one is not finite, it exits and writes
    nothing.
    """
    epoch = rows[-1]["epoch"]
    for name, value in {**rows[-1], **grids}.items():
        if not torch.as_tensor(value).isfinite().all():
            sys.exit(f"epoch {epoch}: {name} is not finite: the training diverged; try a smaller --lr")

    (run_dir / "images").mkdir(exist_ok=True)
    for name, images in grids.items():
        save_image(images, run_dir / f"images/epoch_{epoch:03d}_{name}.png", nrow=COLUMNS)
    if writer:
        for name, value in rows[-1].items():
            writer.add_scalar(name, value, epoch)
        for name, images in grids.items():
            writer.add_image(name, make_grid(images, nrow=COLUMNS), epoch)
        writer.flush()

    try:
        with (run_dir / "metrics.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
    except PermissionError as error:  # on Windows, if Excel holds the file open
        print(f"warning: {error}; metrics.csv lacks this epoch until the next is saved", file=sys.stderr)

    temporary = run_dir / "checkpoint.tmp"
    torch.save({**checkpoint, "epoch": epoch, "metrics": rows}, temporary)
    temporary.replace(run_dir / "checkpoint.pt")  # a kill leaves the old file or the new one


def save_curves(path, rows, curves, steps=None, levels=None):
    """Plot curves {title: {legend: column of rows}} over the epochs, and the last 200 of steps {legend: values}.

    levels are dashed lines, {legend: a height for each panel}.
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
        axes[-1].set(title="the last steps (at most 200)", xlabel="step")
    for legend, heights in (levels or {}).items():
        for ax, height in zip(axes, heights):
            ax.axhline(height, color="gray", linestyle="--", label=legend)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path, dpi=150)


def load_adam(optimizer, saved):
    """Load Adam's moments from an optimizer.state_dict(), and leave its options (lr, betas) as they are."""
    optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.empty_like(parameter)  # in the parameter's memory layout, or fused Adam is silently wrong
            state[name] = moment.copy_(state[name])


def load_checkpoint(path):
    """The dict that save_epoch wrote to a file, on the CPU; exits if there is none. Pickled code is never executed."""
    if not Path(path).exists():
        sys.exit(f"there is no file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file raises errors of many kinds
        sys.exit(f"{path} cannot be read ({type(error).__name__}): it is damaged, or was not saved by these scripts")
    if not isinstance(checkpoint, dict) or "script" not in checkpoint:
        sys.exit(f'{path} was not saved by these scripts: see "Your own weights" in README.md')
    return checkpoint


def open_run(run, device):
    """Open a run's folder, or a file like its checkpoint.pt, with the script that trained it.

    Returns what load of that script does: the model in eval mode, the function from codes z (N, latent_dim) to images
    (N, C, H, W), and the config, a Namespace. Exits if the file or the script is not there.
    """
    checkpoint = load_checkpoint(Path(run, "checkpoint.pt") if Path(run).is_dir() else run)
    script = Path(__file__).with_name(checkpoint["script"])
    if not script.exists():
        sys.exit(f"{run} was trained by {script.name}, which is not in {script.parent}")
    return importlib.import_module(script.stem).load(checkpoint, device)


def output_folder(out, run):
    """Make the folder for a run's pictures: out, or the run's own; for a file, docs/dcgan.pt, docs/dcgan."""
    path = Path(run)
    if path.name == "checkpoint.pt":
        path = path.parent
    elif path.is_file():
        path = path.with_suffix("")
    folder = path if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_run_images(config, args):
    """The Images of a VAE's run, or those that args name; exits if they do not fit the model."""
    name = args.dataset or config.dataset
    images = load_images(name, args.data or config.data)
    shape = tuple(images.test.shape[1:])
    if shape != config.image_shape:
        sys.exit(f"the model takes images of shape {config.image_shape}, those of {name} have {shape}")
    return images
