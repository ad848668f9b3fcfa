"""Pictures from trained models: samples, interpolations, reconstructions, and how the samples became digits.

    python sample.py                                              # of the newest run
    python sample.py runs/vae-beta10 --images 0 2                 # from the first training image to the third
    python sample.py runs/dcgan --n 64 --slerp --out pictures
    python sample.py runs/vae-beta1 runs/vae-beta10 runs/dcgan    # samples of each, side by side

They are written to the run's folder, or to --out, and replace those of an earlier call. More than one run makes only
comparison.png, in the current folder or in --out. The lab's .ckpt files and a notebook's torch.save(model.state_dict(),
...) open too. An autoencoder's weights look like a VAE's and are drawn as one's: train it with vae.py --autoencoder.
"""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

import common
import dcgan
import vae


def interpolate(z1, z2, steps):
    """Codes on the straight line from z1 to z2, each (latent_dim,): alpha = 0, ..., 1; (steps, latent_dim)."""
    alpha = torch.linspace(0, 1, steps, device=z1.device)[:, None]
    return (1 - alpha) * z1 + alpha * z2


def slerp(z1, z2, steps):
    """Codes on the arc from z1 to z2 (Shoemake, 1985): (steps, latent_dim).

    Gaussian codes of many dimensions lie near a sphere. A straight line between two of them passes
    through its inside, where the decoder saw no codes in training; the arc does not.
    """
    omega = torch.arccos(torch.cosine_similarity(z1, z2, dim=0).clamp(-1, 1))
    if omega.sin() < 1e-6:  # the same direction, or opposite ones: the arc is not defined
        return interpolate(z1, z2, steps)
    alpha = torch.linspace(0, 1, steps, device=z1.device)[:, None]
    return (torch.sin((1 - alpha) * omega) * z1 + torch.sin(alpha * omega) * z2) / torch.sin(omega)


def manifold(side=20):
    """Codes (side * side, 2) of a grid, z1 to the right and z2 upwards, each as likely as the next under N(0, 1).

    They are the quantiles (i + 0.5) / side of the normal distribution (Kingma and Welling, figure 4).
    """
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    z2, z1 = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack([z1, z2], dim=-1).flatten(0, 1)


def open_model(run, device):
    """The model of a run, its config, and the function that turns its codes z (N, latent_dim) into images."""
    if common.find_weights(common.load_checkpoint(run), "encoder.mean.weight"):
        model, config = vae.load(run, device)
        return model, config, lambda z: model.decoder(z).unflatten(1, config["image_shape"])
    model, config = dcgan.load(run, device)
    return model, config, model["generator"]


def compare(runs, device, seed):
    """A matplotlib figure with eight samples of each run in a row of its own, under the run's name."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    figure = Figure(figsize=(8, 1.3 * len(runs)), layout="constrained")
    for axes, run in zip(figure.subplots(len(runs)), runs):
        _, config, decode = open_model(run, device)
        torch.manual_seed(seed)  # the same codes for models with the same latent_dim
        samples = decode(torch.randn(8, config["latent_dim"]).to(device))
        axes.imshow(make_grid(samples.cpu(), nrow=8).permute(1, 2, 0).numpy())
        axes.set_title(run, fontsize="small")
        axes.axis("off")
    return figure


def training_frames(folder):
    """The samples of a run's epochs as Pillow's images, in 32 colours."""
    from PIL import Image

    paths = folder.glob("images/epoch_*_samples.png")
    paths = sorted(paths, key=lambda path: int(path.name.split("_")[1]))
    return [Image.open(path).quantize(32) for path in paths]


def parse_options(argv):
    parser = ArgumentParser("sample.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="runs or files with weights (default: the newest run)")
    parser.add_argument("--n", type=common.count, default=24, help="samples, in rows of 8 (default: 24)")
    parser.add_argument("--steps", type=common.count, default=11, help="images in an interpolation (default: 11)")
    parser.add_argument("--slerp", action="store_true", help="interpolate on an arc (default: on a straight line)")
    parser.add_argument("--images", type=int, nargs=2, default=[0, 2], help="VAE: the two to go between (default: 0 2)")
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="VAE: the images (default: the run's)")
    parser.add_argument("--data", help="folder of the data sets (default: the run's)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the run's, or the current one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: auto, a GPU if any)")
    options = parser.parse_args(argv)
    if not options.runs:
        newest = max(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, default=None)
        if newest is None:
            raise common.Error("there is no run in runs/: train one first, or name one")
        options.runs = [newest.parent]
    return options


@torch.inference_mode()
def main(argv=None):
    options = parse_options(argv)
    device = common.pick_device(options.device)
    if len(options.runs) > 1:
        figure = compare(options.runs, device, options.seed)
        folder = options.out or Path()
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "comparison.png", dpi=150)
        print(folder / "comparison.png")
        return

    [run] = options.runs
    model, config, decode = open_model(run, device)
    torch.manual_seed(options.seed)
    path_between = slerp if options.slerp else interpolate
    z = torch.randn(options.n + 2, config["latent_dim"]).to(device)  # from the CPU: the same on every device
    pictures = {
        "samples.png": (decode(z[2:]), 8),
        "interpolation.png": (decode(path_between(z[0], z[1], options.steps)), options.steps),
    }
    if isinstance(model, vae.VAE):
        name, root = options.dataset or config["dataset"], options.data or config["data"]
        data = common.load_dataset(name, root, size=config["image_shape"][-1])
        if data.train.shape[1:] != config["image_shape"]:
            shapes = f"{config['image_shape']}, those of {name} are {tuple(data.train.shape[1:])}"
            raise common.Error(f"{run} needs images of the shape {shapes}")
        if not all(0 <= i < len(data.train) for i in options.images):
            raise common.Error(f"--images: {name} has {len(data.train)} training images, counted from 0")
        ends = data.train[options.images].to(device) / 255
        mean, _ = model.encoder(ends.flatten(1))
        between = decode(path_between(mean[0], mean[1], options.steps))
        pictures["interpolation_digits.png"] = (torch.cat([ends[:1], between, ends[1:]]), options.steps + 2)
        x = data.test[:50].to(device) / 255
        pictures["reconstructions.png"] = (vae.reconstruction_rows(model, x), 10)
        if config["latent_dim"] == 2 and not config["autoencoder"]:
            pictures["manifold.png"] = (decode(manifold().to(device)), 20)

    run_folder = run if run.is_dir() else run.parent
    frames = training_frames(run_folder)

    # nothing above wrote a file, so that what is refused leaves the earlier pictures as they were
    folder = options.out or run_folder
    for name, (images, columns) in pictures.items():
        common.save_grid(folder / name, images, columns)
        print(folder / name)
    if frames:
        durations = [100] * (len(frames) - 1) + [2000]  # milliseconds: the last frame stays
        frames[0].save(folder / "training.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)
        print(folder / "training.gif")


if __name__ == "__main__":
    common.run_script(main)
