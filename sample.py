"""Pictures from a trained VAE or DCGAN: samples, interpolations, reconstructions.

They are written to the run's folder, or to --out, over those of an earlier call. Without a run it takes the
newest under runs/. The lab's own checkpoints and a notebook's torch.save(model.state_dict(), ...) open too.

    python sample.py                                     # of the newest run
    python sample.py runs/vae-beta10 --images 0 2        # from the first training image to the third
    python sample.py runs/dcgan --n 64 --slerp --out pictures
"""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

import common
import dcgan
import vae
from common import between


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


def parse_options(argv):
    parser = ArgumentParser("sample.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    newest = max(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, default=None)
    parser.add_argument("run", nargs="?", type=Path, default=newest, help="run or checkpoint (default: newest run)")
    parser.add_argument("--n", type=between(int, 1), default=24, help="samples, in rows of 8 (default: 24)")
    parser.add_argument("--steps", type=between(int, 1), default=11, help="images in an interpolation (default: 11)")
    parser.add_argument("--slerp", action="store_true", help="interpolate on an arc (default: on a straight line)")
    parser.add_argument(
        "--images", type=between(int, 0), nargs=2, default=[0, 2], help="VAE: between which images (default: 0 2)"
    )
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="VAE: the images (default: the run's)")
    parser.add_argument("--data", help="folder of the data sets (default: the run's)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the run's)")
    parser.add_argument("--seed", type=between(int, 0, 2**63), default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--device", choices=common.DEVICES, default="auto", help="auto: a GPU if any (default: auto)")
    options = parser.parse_args(argv)
    if options.run is None:
        parser.error("there is no run in runs/: train one first, or name one")
    return options


@torch.inference_mode()
def main(argv=None):
    options = parse_options(argv)
    device = common.pick_device(options.device)
    folder = options.out or (options.run if options.run.is_dir() else options.run.parent)
    path_between = slerp if options.slerp else interpolate
    is_vae = any(key.startswith("encoder.") for key in common.load_checkpoint(options.run)["state_dict"])
    model, config = (vae if is_vae else dcgan).load(options.run, device)
    latent_dim, image_shape = config["latent_dim"], config["image_shape"]

    def decode(z):
        return model.decoder(z).unflatten(1, image_shape) if is_vae else model["generator"](z)

    def save(name, images, columns):
        common.save_grid(folder / name, images, columns)
        print(folder / name)

    noise = torch.Generator().manual_seed(options.seed)  # on the CPU: the same for every device
    z = torch.randn(options.n + 2, latent_dim, generator=noise).to(device)
    save("samples.png", decode(z[2:]), 8)
    save("interpolation.png", decode(path_between(z[0], z[1], options.steps)), options.steps)

    if is_vae:
        name, root = options.dataset or config["dataset"], options.data or config["data"]
        data = common.load_dataset(name, root, size=image_shape[-1])
        if data.train.shape[1:] != image_shape:
            raise common.Error(f"the images of {name} are {tuple(data.train.shape[1:])}, the model's {image_shape}")
        if max(options.images) >= len(data.train):
            raise common.Error(f"--images: {data.name} has {len(data.train)} training images, counted from 0")
        ends = data.train[options.images].to(device) / 255
        mean, _ = model.encoder(ends.flatten(1))
        row = torch.cat([ends[:1], decode(path_between(mean[0], mean[1], options.steps)), ends[1:]])
        save("interpolation_digits.png", row, len(row))

        x = data.test[:50].to(device) / 255
        epsilon = torch.randn(len(x), latent_dim, generator=noise).to(device)
        save("reconstructions.png", vae.reconstruct(model, x, epsilon), 10)


if __name__ == "__main__":
    common.run_script(main)
