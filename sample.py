"""Pictures from trained models: samples, interpolations, reconstructions, and the samples of all epochs as a GIF.

    python sample.py runs/vae-beta10
    python sample.py runs/vae-beta10 --images 0 2                 # from the first training image to the third
    python sample.py runs/dcgan --n 64 --out pictures
    python sample.py runs/vae-beta1 runs/vae-beta10 runs/dcgan    # samples of each, in a row of its own

The pictures go to the run's folder, or to --out, and replace those of an earlier call. More than one run makes only
comparison.png, in the current folder or in --out.
"""

import math
import sys
from argparse import ArgumentParser
from os.path import expanduser
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid, save_image

import common
import vae


def interpolate(z1, z2, n):
    """n codes on the straight line from z1 to z2, each (latent_dim,): alpha = 0, ..., 1; (n, latent_dim)."""
    alpha = torch.linspace(0, 1, n, device=z1.device)[:, None]
    return (1 - alpha) * z1 + alpha * z2


def manifold(side=20):
    """Codes (side * side, 2) of a grid, z1 to the right and z2 upwards, each for a cell of equal probability.

    The coordinates are the quantiles (i + 0.5) / side of N(0, 1) (Kingma and Welling, figure 4).
    """
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    z2, z1 = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack([z1, z2], dim=-1).flatten(0, 1)


def save_grid(path, images, columns):
    """Write images (N, C, H, W) in 0..1 as a grid, each pixel as 3x3, and print the path."""
    save_image(F.interpolate(images, scale_factor=3), path, nrow=columns, padding=6)
    print(path)


def save_animation(path, frames):
    """Write image files as a GIF in 32 colors, and print the path."""
    frames = [Image.open(frame).quantize(32) for frame in frames]
    durations = [100] * (len(frames) - 1) + [2000]  # milliseconds: the last frame stays
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    print(path)


def compare(runs, device, seed):
    """A figure with eight samples of each run in a row of its own, under the run's name and epoch."""
    figure = Figure(figsize=(8, 1.3 * len(runs)), layout="constrained")
    for ax, run in zip(figure.subplots(len(runs)), runs):
        _, decode, config = common.open_run(run, device)
        torch.manual_seed(seed)  # the same codes for models with the same latent_dim
        samples = decode(torch.randn(8, config.latent_dim).to(device))
        ax.imshow(make_grid(samples.cpu(), nrow=8).permute(1, 2, 0).numpy())
        ax.set_title(f"{run}, epoch {config.epoch}", fontsize="small", parse_math=False)
        ax.axis("off")
    return figure


def parse_args(argv):
    parser = ArgumentParser("sample.py", description=__doc__, formatter_class=common.Help)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or a file like its checkpoint.pt")
    parser.add_argument("--n", type=common.positive, default=24, help="samples")
    parser.add_argument("--interpolation", metavar="N", type=common.positive, default=11, help="images from end to end")
    parser.add_argument("--images", type=int, nargs=2, default=[0, 2], help="VAE: training images to go between")
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="VAE: the images (default: the run's)")
    parser.add_argument("--data", type=expanduser, help="folder of the data sets (default: the run's)")
    parser.add_argument("--out", type=expanduser, help="folder to write to (default: the run's, or the current one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto is a GPU if there is one")
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    device = common.pick_device(args.device)
    if len(args.runs) > 1:
        figure = compare(args.runs, device, args.seed)
        folder = Path(args.out or ".")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "comparison.png", dpi=150)
        print(folder / "comparison.png")
        return

    # what needs only the model
    run = args.runs[0]
    model, decode, config = common.open_run(run, device)
    folder = common.output_folder(args.out, run)
    torch.manual_seed(args.seed)
    # two codes to go between, then those of the samples; drawn on the CPU, so that they are the same on every device
    z = torch.randn(2 + args.n, config.latent_dim).to(device)
    columns = max(8, math.ceil(math.sqrt(args.n)))
    save_grid(folder / "samples.png", decode(z[2:]), columns)
    save_grid(folder / "interpolation.png", decode(interpolate(z[0], z[1], args.interpolation)), args.interpolation)
    run_dir = Path(run) if Path(run).is_dir() else Path(run).parent
    frames = sorted(run_dir.glob("images/epoch_*_samples.png"), key=lambda path: int(path.name.split("_")[1]))
    if frames:
        save_animation(folder / "training.gif", frames)
    if not hasattr(model, "encoder"):
        return
    if config.latent_dim == 2 and not config.autoencoder:
        save_grid(folder / "manifold.png", decode(manifold().to(device)), 20)

    # what needs images too
    data = common.load_run_images(config, args)
    if not all(0 <= i < len(data.train) for i in args.images):
        sys.exit(f"--images: {data.name} has {len(data.train)} training images, counted from 0")
    x = data.test[:50].to(device)
    save_grid(folder / "reconstructions.png", vae.reconstruction_rows(model, x), common.COLUMNS)
    ends = data.train[args.images].to(device)
    mean, _ = model.encoder(ends.flatten(1))
    between = decode(interpolate(mean[0], mean[1], args.interpolation))
    save_grid(folder / "interpolation_digits.png", torch.cat([ends[:1], between, ends[1:]]), args.interpolation + 2)


if __name__ == "__main__":
    main()
