"""What the scripts share: errors, options, images, checkpoints and the run folder. No losses, no networks."""

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import math
import pickle
import re
import shlex
import signal
import socket
import sys
import time
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

# torchvision, scikit-learn and matplotlib are imported where they are used, so that --help is quick.


# --- Errors ---

DIVERGED = "the training diverged; start again with a smaller --lr, or without --bf16"


class Error(Exception):
    """What a user can mend, in one line. Status 2: known from the command line; 1: anything later."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class Unavailable(Error):
    """A data set that is neither on disk nor reachable."""


class Unwritable(Error):
    """A file that cannot be written: a full disk, a folder without permission."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends at a job's time limit; treated as Ctrl-C is."""


@contextlib.contextmanager
def one_line_errors(script):
    """Around a main: what a user can mend ends in one line and an exit status; a traceback means a bug."""

    def terminate(signal_number, frame):
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
        return
    except (Error, OSError) as caught:
        error, message, status = caught, f"error: {caught}", getattr(caught, "status", 1)
    except KeyboardInterrupt as caught:
        error, message, status = caught, "interrupted", 143 if isinstance(caught, Terminated) else 130
    except RuntimeError as caught:
        if re.search("out of memory|allocate memory|not enough memory", str(caught)):
            advice = "out of memory; ask for less at a time (--batch-size, --n) or for smaller networks"
        elif re.search("between 0 and 1|device-side assert", str(caught)):
            # binary_cross_entropy refuses what is no probability, on a GPU by an assertion: it meets a nan first
            advice = f"the binary cross-entropy is nan: {DIVERGED}"
        else:
            raise
        error, message, status = caught, f"error: {advice}", 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(f"{script}: {message}{getattr(error, 'left', '')}", file=sys.stderr)
    raise SystemExit(status)


# --- Options ---


def between(kind, low, high=math.inf):
    """An argparse type: a finite int or float from low to high, both included."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < math.inf:  # nan is in no range
                return value
        name = {int: "a whole number", float: "a number"}[kind]
        limits = f"from {low} to {high}" if high < math.inf else f"of {low} or more"
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} {limits}")

    return parse


count = between(int, 1, 10**9)


def new_parser(script, docstring):
    """A parser whose --help is the script's docstring, the options, and the docstring's commands."""
    description, examples = docstring.split("\n\n    python", 1)
    return argparse.ArgumentParser(
        script,
        description=description,
        epilog="examples:\n    python" + examples.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_data_options(parser, dataset, data, out):
    """The options of all four scripts; the arguments say in words what happens without one."""
    add = parser.add_argument_group("data and device").add_argument
    add("--dataset", choices=[*TORCHVISION_SETS, "digits"], help=f"the images (default: {dataset})")
    add("--data", metavar="DIR", help=f"the folder of the data sets (default: {data})")
    add("--out", metavar="DIR", help=f"the folder to write to (default: {out})")
    seed = between(int, 0, 2**63 - 1)
    add("--seed", type=seed, default=0, metavar="N", help="of all random numbers (default: 0)")
    devices = ["auto", "cuda", "mps", "cpu"]
    add("--device", choices=devices, default="auto", help="auto is a GPU if there is one (default: auto)")


def add_training_options(parser, batch_size, lr):
    """What vae.py and dcgan.py share; the defaults are the lab's."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, default=150, metavar="N", help="passes over the images (default: 150)")
    add("--batch-size", type=count, metavar="N", help=f"images a step (default: {batch_size})")
    add("--lr", type=between(float, 1e-12), default=lr, help="Adam's learning rate (default: %(default)s)")
    add("--subset", type=count, metavar="N", help="train on the first N images (default: all)")
    add("--bf16", action="store_true", help="matrix products in bfloat16, faster where it is native (default: float32)")
    add("--resume", metavar="RUN", help="go on with a run, its folder or checkpoint (default: a new run)")
    add("--tensorboard", action="store_true", help="write for TensorBoard too (default: no)")


def parse_training_options(parser, argv, model):
    """The options, and the checkpoint to resume from or None; a resumed run brings its own options."""
    options = parser.parse_args(argv)
    unset = object()  # argparse puts its defaults only where nothing stands yet
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(options), unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    if options.resume is None:
        return options, None
    refused = sorted(given.keys() - {"resume", "epochs", "device", "data", "tensorboard"})
    if refused:
        names = ", ".join("--" + name.replace("_", "-") for name in refused)
        raise Error(f"a resumed run keeps its own options: leave out {names}", 2)
    checkpoint = load_checkpoint(options.resume, model)
    if not {"optimizers", "epoch"} <= checkpoint.keys():
        raise Error(f"{options.resume} holds weights only: there is nothing to resume", 2)
    options = argparse.Namespace(**{**vars(options), **checkpoint["config"], **given})
    if checkpoint["epoch"] >= options.epochs:
        parser.exit(0, f"{options.resume} has done its {checkpoint['epoch']} epochs; give more with --epochs\n")
    return options, checkpoint


def pick_device(name, bf16=False):
    """The torch device for --device, which must be here; a GPU must compute in bfloat16 itself if it is to."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        raise Error(f"--device {name}: there is no such device here; --device auto takes what there is", 2)
    if bf16 and (name == "mps" or name == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)):
        raise Error(f"--bf16: this {name} device does not compute in bfloat16; use another, or float32", 2)
    return torch.device(name)


def set_up(options):
    """Check what can be checked before any work is done, seed torch, and return the device."""
    device = pick_device(options.device, options.bf16)
    if options.out is not None and Path(options.out).exists():
        raise Error(f"--out {options.out} exists, and a run is never overwritten; name another folder", 2)
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise Error("--tensorboard needs a package that is not installed: pip install tensorboard", 2)
    torch.manual_seed(options.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 matrix products; convolutions use it anyway
    return device


# --- Images ---

TORCHVISION_SETS = dict(mnist="MNIST", fashion="FashionMNIST", kmnist="KMNIST", cifar10="CIFAR10", cifar100="CIFAR100")


class Dataset(NamedTuple):
    name: str
    train: torch.Tensor  # uint8 (N, C, H, W)
    test: torch.Tensor
    test_labels: torch.Tensor  # int64 (N,)
    classes: list  # their names
    warning: str = ""  # if it is not the data set that was meant


def load_dataset(name, root, size=None):
    """The data set of that name under root ("data" if None), downloaded if need be, resized to size x size if given.

    Without a name it is MNIST or, where that cannot be had, scikit-learn's digits, with a warning.
    """
    if name == "digits":
        return load_digits(size or 28)
    try:
        return load_torchvision(name or "mnist", Path(root or "data"), size)
    except Unavailable as error:
        if name is not None:
            raise
        bar = "*" * 80
        warning = (
            f"{bar}\nWARNING: {error}\n\nTRAINING ON THE 1,797 SMALL DIGITS OF SCIKIT-LEARN INSTEAD. "
            f"Its figures are not MNIST's.\n{bar}"
        )
        print(warning, file=sys.stderr)
        return load_digits(size or 28)._replace(warning=warning)


def load_digits(size):
    """The 1,797 8x8 digits inside scikit-learn, 1,500 to train on and 297 to test on: no network needed."""
    from sklearn import datasets
    from torchvision.transforms.functional import resize

    digits = datasets.load_digits()
    images = resize(torch.from_numpy(digits.images[:, None]) * (255 / 16), [size, size]).round().byte()
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1500], order[1500:]
    return Dataset("digits", images[train], images[test], labels[test], [str(digit) for digit in range(10)])


def load_torchvision(name, root, size):
    from torchvision import datasets
    from torchvision.transforms.functional import resize

    kind = TORCHVISION_SETS[name]
    if root.exists() and not root.is_dir():
        raise Error(f"--data {root} is a file; name the folder that holds, or shall hold, the data sets", 2)
    for path in root.glob(f"{kind}/raw/*-ubyte"):
        check_idx_file(path)
    silence = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)  # seconds without a byte, after which a download gives up
    try:
        splits = [getattr(datasets, kind)(root, train=train, download=True) for train in (True, False)]
    except (OSError, HTTPException, RuntimeError) as error:  # what torchvision raises on a failed download
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise Unavailable(
            f"{name} is not in {root}/ and its download failed ({reason}). Connect to a network, copy the data set "
            f"to {root}/, name another folder with --data, or use --dataset digits, which needs none."
        ) from None
    finally:
        socket.setdefaulttimeout(silence)

    images = [torch.as_tensor(split.data) for split in splits]
    # MNIST and its kin are (N, H, W), CIFAR is (N, H, W, 3)
    images = [x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2) for x in images]
    if size is not None and images[0].shape[-1] != size:
        images = [resize(x, [size, size]) for x in images]
    train, test = (x.contiguous() for x in images)
    return Dataset(name, train, test, torch.as_tensor(splits[1].targets), list(splits[1].classes))


def check_idx_file(path):
    """Refuse an IDX file whose length is not what its header says: magic 0 0 8 d, then d sizes, then bytes."""
    data = path.read_bytes()
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3] if len(data) > 3 else 0)]
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * len(sizes) + math.prod(sizes):
        raise Error(f"{path} is damaged: its length is not what its header says; delete it and run again")


def batches(images, batch_size, shuffle=False):
    """One pass over uint8 images, on their device: floats in 0..1, batch_size at a time, what is left last."""
    n = len(images)
    order = torch.randperm(n, device=images.device) if shuffle else torch.arange(n, device=images.device)
    for indices in order.split(batch_size):
        yield images[indices] / 255


def fixed_codes(n, latent_dim, seed):
    """n codes z ~ N(0, 1) from a generator of their own: pictures never shift the training's randomness."""
    return torch.randn(n, latent_dim, generator=torch.Generator().manual_seed(seed))


def pairs(images, reconstructions, columns=10):
    """Rows of images, each above its reconstructions, in the order of a grid of that many columns."""
    columns = min(columns, len(images))
    whole = len(images) - len(images) % columns
    rows = torch.stack([images[:whole], reconstructions[:whole]]).unflatten(1, (-1, columns))
    return rows.transpose(0, 1).flatten(0, 2)


# --- Files ---


def write_whole(path, data):
    """Write bytes to a file in one move: after a kill or on a full disk it is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise Unwritable(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_grid(path, images, columns=10):
    """Write images (N, C, H, W) in 0..1 as one PNG, that many to a row."""
    from torchvision.utils import save_image

    png = io.BytesIO()
    save_image(images, png, format="png", nrow=columns)
    write_whole(path, png.getvalue())


def save_figure(path, figure):
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_whole(path, png.getvalue())


def find_checkpoint(run=None, model=None):
    """The file of a run, which is its folder or a checkpoint; without a run, of the newest `model` under runs/."""
    if run is None:
        for path in sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: -path.stat().st_mtime):
            with contextlib.suppress(Error):  # a damaged one is not the one that was meant
                if model is None or load_checkpoint(path)["model"] == model:
                    return path
        raise Error(f"no {model or 'trained model'} under runs/: train one first, or name a run", 2)
    path = Path(run)
    if path.is_dir():
        path = path / "checkpoint.pt"
        if not path.exists():
            raise Error(f"{run} holds no checkpoint.pt, which a run saves first after one epoch", 2)
    return path


def is_whole(file):
    """Whether this is a zip archive, as torch.save writes, whose checksums are right; torch.load looks at none."""
    try:
        return zipfile.ZipFile(file).testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError):
        return False


def load_checkpoint(run, model=None, device="cpu"):
    """The dict in the checkpoint of a run, or in a Lightning checkpoint of the lab; nothing in it is executed.

    Raises Error if it cannot be read, or holds another kind of model than the one named ("vae" or "dcgan").
    """
    path = find_checkpoint(run)
    try:
        with path.open("rb") as file:
            if not is_whole(file):
                raise Error(f"{path} is empty, damaged or no checkpoint", 2)
            file.seek(0)
            checkpoint = torch.load(file, map_location=device, weights_only=True)
    except OSError as error:
        raise Error(f"cannot read {path}: {error.strerror}", 2) from None
    except pickle.UnpicklingError as error:
        if "lightning" in str(error):
            load = f"torch.load('{path}', weights_only=False)['state_dict']"
            convert = f"import torch; torch.save({{'state_dict': {load}}}, 'converted.pt')"
            reason = f'holds objects of an old Lightning; if you trust it, run where that is: python -c "{convert}"'
        else:
            reason = "is refused: it carries code, of which nothing was run"
        raise Error(f"{path} {reason}", 2) from None
    except RuntimeError:
        raise Error(f"{path} is damaged, or was not written by torch.save", 2) from None

    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    names = [name for name, weight in weights.items() if torch.is_tensor(weight)] if isinstance(weights, dict) else []
    kind = "vae" if "encoder.mean.weight" in names else "dcgan" if "generator.l1.0.weight" in names else None
    if kind is None:
        raise Error(f"{path} is not a checkpoint of this project or of the lab", 2)
    if checkpoint.get("version", 1) != 1:
        raise Error(f"{path} was made by a newer version of this project; update the scripts to open it", 2)
    if model not in (None, kind):
        raise Error(f"{path} holds a {kind}, not a {model}", 2)
    return {**checkpoint, "model": kind, "config": dict(checkpoint.get("config") or {})}


def picture_folder(out, checkpoint):
    """Where pictures from a checkpoint go: --out, made if need be, or the checkpoint's own folder."""
    folder = Path(out) if out else checkpoint.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Error(f"cannot make the folder {folder}: {error.strerror}", 2) from None
    return folder


def images_for(options, config):
    """The data set of the options or else of the model's own config, if its images have the model's shape."""
    shape = config["image_shape"]
    data = load_dataset(options.dataset or config["dataset"], options.data or config.get("data"), shape[-1])
    if data.train.shape[1:] != shape:
        raise Error(f"the images of {data.name} are {tuple(data.train.shape[1:])}, the model's {shape}", 2)
    return data


# --- The run folder ---


SAVE_EVERY = 30  # seconds between checkpoints


def make_folder(out, name):
    """The folder --out or, without one, the first free of runs/NAME, runs/NAME-2, runs/NAME-3, ..."""
    number = 1
    while True:
        folder = Path(out) if out else Path("runs", name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            (folder / "images").mkdir()
            return folder
        except OSError as error:
            if out or not folder.exists():  # else a run of that name: try the next
                raise Error(f"cannot make the folder {folder}: {error.strerror}", 2) from None
            number += 1


class Run:
    """A run's folder, its progress and its files: `with Run(...) as run: for epoch in run.epochs(): ...`.

    The folder is new, or the one of `checkpoint`, whose state is then restored. `curves` maps the
    title of each panel of losses.png to the columns of metrics.csv that it shows. Leaving the block
    draws them; an interruption or an Error on its way out is told what the last checkpoint holds.
    """

    def __init__(self, script, name, options, image_shape, model, optimizers, curves, checkpoint=None):
        self.script, self.options, self.curves = script, options, curves
        self.model, self.optimizers = model, optimizers
        self.device = next(model.parameters()).device
        self.rows, self.epoch = [], 0  # epochs done
        if checkpoint is None:
            self.folder = make_folder(options.out, name)
        else:
            self.folder = find_checkpoint(options.resume).parent
            self.restore(checkpoint)
        self.first, self.saved = self.epoch + 1, self.epoch
        config = {name: value for name, value in vars(options).items() if name not in ("out", "resume", "tensorboard")}
        self.header = {"version": 1, "model": Path(script).stem, "config": config, "image_shape": image_shape}
        config_json = json.dumps({"model": self.header["model"], **config}, indent=2)
        write_whole(self.folder / "config.json", config_json.encode())

    def restore(self, checkpoint):
        """Back to the end of the checkpoint's epoch: weights, moments, random states, rows of metrics.csv."""
        try:
            self.epoch = checkpoint["epoch"]
            self.model.load_state_dict(checkpoint["state_dict"])
            for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
                for parameter, moments in optimizer.state.items():  # fused Adam wants them laid out as the weights are
                    for name in ("exp_avg", "exp_avg_sq"):
                        moments[name] = torch.empty_like(parameter).copy_(moments[name])
            for kind, state in checkpoint["random_states"].items():
                if kind in ("cpu", self.device.type):
                    random_generator(kind).set_rng_state(state)
            with (self.folder / "metrics.csv").open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= self.epoch]
            self.write_metrics()  # the rows of later epochs are gone
        except FileNotFoundError:
            raise Error(f"{self.folder} has no metrics.csv: resume a run in its own folder", 2) from None
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError):
            raise Error(f"{self.options.resume} cannot be resumed: it was changed since it was written", 2) from None

    def __enter__(self):
        self.board = None
        if self.options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder, purge_step=self.first)
        sizes = {part: sum(p.numel() for p in network.parameters()) for part, network in self.model.named_children()}
        sizes = ", ".join(f"{part} {size:,}" for part, size in sizes.items())
        print(f"{self.folder}: {self.options.dataset} on {self.device}; parameters: {sizes}")
        self.bar = tqdm(total=self.options.epochs, initial=self.epoch, unit="epoch", disable=None)
        self.clock = self.saved_at = time.perf_counter()
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        if error is None:
            self.draw_curves()
            print(f"{self.folder}/ holds checkpoint.pt, metrics.csv, losses.png and images/")
            print(f"next: python sample.py {shlex.quote(str(self.folder))}")
        else:
            error.left = f"; in epoch {self.epoch + 1}, nothing was saved yet"  # said by one_line_errors
            if self.saved:
                error.left = f"; in epoch {self.epoch + 1}, {self.folder / 'checkpoint.pt'} holds epoch {self.saved}"
                if isinstance(error, (KeyboardInterrupt, OSError, Unwritable)):
                    repeated = time.perf_counter() - self.saved_at
                    command = f"python {self.script} --resume {shlex.quote(str(self.folder))}"
                    error.left += f"; {command} goes on from there and repeats {repeated:.0f} s"
                with contextlib.suppress(Error, KeyboardInterrupt):  # the error at hand says more
                    self.draw_curves()
        if self.board:
            self.board.close()

    def epochs(self):
        """The numbers of the epochs still to do."""
        return range(self.first, self.options.epochs + 1)

    def progress(self, batches, images):
        """The batches of one pass over that many images, under a bar of its own if the pass takes long."""
        total = math.ceil(images / self.options.batch_size)
        return tqdm(batches, f"epoch {self.epoch + 1}", total, leave=False, unit="batch", delay=2, disable=None)

    def save_epoch_grid(self, name, images):
        """Write images/epoch_001_NAME.png, ten images to a row."""
        images = images.cpu()
        save_grid(self.folder / "images" / f"epoch_{self.epoch + 1:03d}_{name}.png", images)
        if self.board:
            from torchvision.utils import make_grid

            self.board.add_image(name, make_grid(images, nrow=10), self.epoch + 1)

    def end_epoch(self, images_per_second, losses, text):
        """Record an epoch: its row, its line of progress and, when one is due, a checkpoint."""
        epoch, now = self.epoch + 1, time.perf_counter()
        for name, value in losses.items():
            if not math.isfinite(value):
                raise Error(f"{name} is {value} in epoch {epoch}: {DIVERGED}")
        seconds, self.clock = now - self.clock, now
        times = {"epoch": epoch, "seconds": f"{seconds:.3f}", "images_per_second": f"{images_per_second:.0f}"}
        self.rows.append({**times, **losses})
        self.write_metrics()
        if self.board:
            for name, value in losses.items():
                self.board.add_scalar(name, value, epoch)

        if epoch in (self.first, self.options.epochs) or now - self.saved_at >= SAVE_EVERY:
            self.save(epoch)
            self.saved, self.saved_at = epoch, now
        self.epoch = epoch
        self.bar.set_postfix_str(f"{text}, {images_per_second:,.0f} images/s", refresh=False)
        self.bar.update()
        if self.bar.disable:  # not a terminal
            print(f"epoch {epoch}/{self.options.epochs}: {text}, {images_per_second:,.0f} images/s", flush=True)

    def write_metrics(self):
        table = io.StringIO()
        writer = csv.DictWriter(table, self.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder / "metrics.csv", table.getvalue().encode())

    def save(self, epoch):
        """Write checkpoint.pt, all that resuming after this epoch needs."""
        weights = self.model.state_dict()
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise Error(f"the weights are no longer finite after epoch {epoch}: {DIVERGED}")
        states = {kind: random_generator(kind).get_rng_state() for kind in {"cpu", self.device.type}}
        checkpoint = {
            **self.header,
            "state_dict": weights,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "epoch": epoch,
            "random_states": states,
        }
        data = io.BytesIO()  # torch.save would report a full disk as an internal error
        torch.save(checkpoint, data)
        write_whole(self.folder / "checkpoint.pt", data.getbuffer())

    def draw_curves(self):
        """losses.png: a panel for each of self.curves, over the epochs."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.5 * len(self.curves), 3.5), layout="constrained")
        epochs = [int(row["epoch"]) for row in self.rows]
        for axes, (title, columns) in zip(figure.subplots(1, len(self.curves)), self.curves.items()):
            for column, style in zip(columns, ["-", "--", ":"]):  # told apart in a black and white print too
                axes.plot(epochs, [float(row[column]) for row in self.rows], style, label=column)
            axes.set(title=title, xlabel="epoch")
            axes.grid(alpha=0.3)
            axes.legend()
        save_figure(self.folder / "losses.png", figure)


def random_generator(kind):
    """What holds torch's random state on a kind of device."""
    return torch if kind == "cpu" else torch.get_device_module(kind)
