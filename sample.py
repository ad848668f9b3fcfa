"""Pictures from trained models: samples, interpolations, reconstructions, and how the samples became digits.

    python sample.py                                              # of the newest run
    python sample.py runs/vae-beta10 --images 0 2                 # from the first training image to the third
    python sample.py runs/dcgan --n 64 --slerp --out pictures
    python sample.py runs/vae-beta1 runs/vae-beta10 runs/dcgan    # samples of each, side by side

The pictures go to the run's folder, or to --out, and replace those of an earlier call. More than one run makes only
comparison.png, in the current folder or in --out. The lab's .ckpt files and a notebook's torch.save(model.state_dict(),
...) open too. Weights alone do not tell an autoencoder from a VAE, and are treated as a VAE's; a run of
vae.py --autoencoder is recognized.
"""

import sys
from argparse import ArgumentParser
from os.path import expanduser
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid, save_image

import common
import dcgan
import vae


def interpolate(z1, z2, steps):
    """Codes on the straight line from z1 to z2, each (latent_dim,): alpha = 0, ..., 1; (steps, latent_dim)."""
    alpha = torch.linspace(0, 1, steps, device=z1.device)[:, None]
    return (1 - alpha) * z1 + alpha * z2


def slerp(z1, z2, steps):
    """Codes on the arc from z1 to z2, each (latent_dim,) (Shoemake, 1985): (steps, latent_dim).

    Codes drawn from N(0, 1) in many dimensions lie near a sphere. A straight line between two of them passes through
    its inside, where the decoder saw hardly any codes in training; the arc does not. The means of two images lie
    inside the sphere themselves, so for them neither path is better.
    """
    omega = torch.arccos(torch.cosine_similarity(z1, z2, dim=0).clamp(-1, 1))
    if omega.sin() < 1e-6:  # the same direction, or opposite ones: the arc is not defined
        return interpolate(z1, z2, steps)
    alpha = torch.linspace(0, 1, steps, device=z1.device)[:, None]
    return (torch.sin((1 - alpha) * omega) * z1 + torch.sin(alpha * omega) * z2) / torch.sin(omega)


def manifold(side=20):
    """Codes (side * side, 2) of a grid, z1 to the right and z2 upwards, each for a cell of equal probability.

    The coordinates are the quantiles (i + 0.5) / side of N(0, 1) (Kingma and Welling, figure 4).
    """
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    z2, z1 = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack([z1, z2], dim=-1).flatten(0, 1)


def open_model(run, device):
    """The model of a run, its config, and the function that turns its codes z (N, latent_dim) into images."""
    if common.find_weights(common.load_checkpoint(run), "encoder.mean.weight"):
        model, config = vae.load(run, device)
        return model, config, lambda z: model.decoder(z).unflatten(1, config["image_shape"])
    generator, config = dcgan.load(run, device)
    return generator, config, generator


def compare(runs, device, seed):
    """A figure with eight samples of each run in a row of its own, under the run's name and epoch."""
    figure = Figure(figsize=(8, 1.3 * len(runs)), layout="constrained")
    for ax, run in zip(figure.subplots(len(runs)), runs):
        _, config, decode = open_model(run, device)
        torch.manual_seed(seed)  # the same codes for models with the same latent_dim
        samples = decode(torch.randn(8, config["latent_dim"]).to(device))
        ax.imshow(make_grid(samples.cpu(), nrow=8).permute(1, 2, 0).numpy())
        title = f"{run}, epoch {config['epoch']}" if config["epoch"] else run
        ax.set_title(title, fontsize="small")
        ax.axis("off")
    return figure


def save_animation(path, run):
    """Write the samples of a run's epochs as a GIF in 32 colors; nothing if it has none."""
    frames = sorted(run.glob("images/epoch_*_samples.png"), key=lambda path: int(path.name.split("_")[1]))
    frames = [Image.open(frame).quantize(32) for frame in frames]
    if frames:
        durations = [100] * (len(frames) - 1) + [2000]  # milliseconds: the last frame stays
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
        print(path)


def parse_options(argv):
    parser = ArgumentParser("sample.py", description=__doc__, formatter_class=common.Help)
    parser.add_argument("runs", nargs="*", help="runs or files with weights (default: the newest run)")
    parser.add_argument("--n", type=int, default=24, help="samples")
    parser.add_argument("--columns", type=int, default=8, help="samples in a row")
    parser.add_argument("--steps", type=int, default=11, help="images in an interpolation")
    parser.add_argument("--slerp", action="store_true", help="interpolate on an arc instead of a straight line")
    parser.add_argument("--images", type=int, nargs=2, default=[0, 2], help="VAE: training images to go between")
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="VAE: the images (default: the run's)")
    parser.add_argument("--data", type=expanduser, help="folder of the data sets (default: the run's)")
    parser.add_argument("--out", type=expanduser, help="folder to write to (default: the run's, or the current one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto is a GPU if there is one")
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv=None):
    options = parse_options(argv)
    device = common.pick_device(options.device)
    if len(options.runs) > 1:
        figure = compare(options.runs, device, options.seed)
        folder = Path(options.out or ".")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "comparison.png", dpi=150)
        print(folder / "comparison.png")
        return

    run = Path(options.runs[0]) if options.runs else common.newest_run("*")
    model, config, decode = open_model(run, device)
    torch.manual_seed(options.seed)
    path_between = slerp if options.slerp else interpolate
    z = torch.randn(options.n + 2, config["latent_dim"]).to(device)  # from the CPU: the same on every device
    pictures = {
        "samples.png": (decode(z[2:]), options.columns),
        "interpolation.png": (decode(path_between(z[0], z[1], options.steps)), options.steps),
    }
    if isinstance(model, vae.VAE):
        data = common.load_run_images(config, options)
        if not all(0 <= i < len(data.train) for i in options.images):
            sys.exit(f"--images: {data.name} has {len(data.train)} training images, counted from 0")
        ends = data.train[options.images].to(device) / 255
        mean, _ = model.encoder(ends.flatten(1))
        between = decode(path_between(mean[0], mean[1], options.steps))
        pictures["interpolation_digits.png"] = (torch.cat([ends[:1], between, ends[1:]]), options.steps + 2)
        x = data.test[:50].to(device) / 255
        pictures["reconstructions.png"] = (vae.reconstruction_rows(model, x), 10)
        if config["latent_dim"] == 2 and not config["autoencoder"]:
            pictures["manifold.png"] = (decode(manifold().to(device)), 20)

    # everything is computed before the first file is written
    source = run if run.is_dir() else run.parent
    folder = Path(options.out or source)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, columns) in pictures.items():
        save_image(images, folder / name, nrow=columns)
        print(folder / name)
    save_animation(folder / "training.gif", source)  # last: a damaged picture of an epoch stops only this


if __name__ == "__main__":
    main()
