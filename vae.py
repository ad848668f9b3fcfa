"""Variational Autoencoder (Kingma and Welling, 2013) on MNIST, in plain PyTorch.

The encoder maps an image x to a Gaussian N(mean, std^2), the decoder turns a sample z from that
Gaussian into an image x_pred, and both are trained to minimise

    BCE(x_pred, x) + beta * KL(N(mean, std^2) || N(0, 1))     with  z = mean + std * epsilon

    python vae.py --beta 10                    # the lab's run: 150 epochs, fully connected
    python vae.py --arch conv --beta 1         # convolutions, and the loss of the paper
    python vae.py --autoencoder --epochs 20    # a plain autoencoder, to compare with

Everything above the line "=== Script" needs only torch and can be pasted into a notebook.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Encoder(nn.Module):
    """Images x (N, input_dim) -> mean and log_var of q(z|x), each (N, latent_dim)."""

    def __init__(self, input_dim, hidden_dim, latent_dim):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
        )
        self.mean = nn.Linear(hidden_dim, latent_dim)
        self.log_var = nn.Linear(hidden_dim, latent_dim)  # no activation: a log variance may be negative

    def forward(self, x):
        h = self.backbone(x)
        return self.mean(h), self.log_var(h)


class Decoder(nn.Module):
    """Codes z (N, latent_dim) -> x_pred (N, output_dim), gray levels in 0..1."""

    def __init__(self, latent_dim, hidden_dim, output_dim):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, output_dim),
        )

    def forward(self, z):
        return torch.sigmoid(self.backbone(z))


def reparameterize(mean, std):
    """Sample z ~ N(mean, std^2), all (N, latent_dim), as mean + std * epsilon with epsilon ~ N(0, 1).

    The noise does not depend on the parameters, so gradients reach mean and std.
    """
    epsilon = torch.randn_like(std)
    return mean + std * epsilon


class VAE(nn.Module):
    """x (N, input_dim) -> x_pred (N, input_dim), mean and log_var (N, latent_dim)."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x):
        mean, log_var = self.encoder(x)
        std = torch.exp(0.5 * log_var)
        z = reparameterize(mean, std)
        x_pred = self.decoder(z)
        return x_pred, mean, log_var


def reconstruction_loss(x_pred, x):
    """Binary cross-entropy of x_pred and x, both (N, input_dim) in 0..1, in nats, summed over the batch.

    With gray levels as targets this is not a true log-likelihood, and the "ELBO" not a true bound;
    it is the convention of the lab and of most VAE code on MNIST.
    """
    return F.binary_cross_entropy(x_pred, x, reduction="sum")


def kl_divergence(mean, log_var):
    """KL(N(mean, var) || N(0, 1)) in nats, summed over the batch (Kingma and Welling, appendix B)."""
    return -0.5 * torch.sum(1 + log_var - mean**2 - log_var.exp())


def vae_step(model, optimizer, x, beta):
    """One update on x (N, input_dim); returns the reconstruction and KL sums, detached, on the device."""
    x_pred, mean, log_var = model(x)
    reconstruction = reconstruction_loss(x_pred, x)
    kl = kl_divergence(mean, log_var)
    loss = reconstruction + beta * kl

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return reconstruction.detach(), kl.detach()


@torch.no_grad()
def evaluate(model, batches, beta):
    """Mean reconstruction, KL and loss, in nats per image, with z sampled as in training.

    A batch is a tensor of images (N, ...) in 0..1 or an (images, labels) pair. Leaves the model in eval mode.
    """
    device = next(model.parameters()).device
    sums, images = torch.zeros(2, device=device), 0
    model.eval()
    for batch in batches:
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        x = x.to(device).flatten(1)
        x_pred, mean, log_var = model(x)
        sums += torch.stack([reconstruction_loss(x_pred, x), kl_divergence(mean, log_var)])
        images += len(x)
    reconstruction, kl = (sums / images).tolist()
    return reconstruction, kl, reconstruction + beta * kl


# --- The lab's exercises: other parts for the same VAE ---


class ConvEncoder(nn.Module):
    """Encoder with convolutions: x (N, C * H * W), H and W multiples of 4 -> mean, log_var (N, latent_dim)."""

    def __init__(self, img_shape, hidden_dim, latent_dim):
        super().__init__()
        channels, height, width = img_shape
        self.backbone = nn.Sequential(
            nn.Unflatten(1, img_shape),
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),  # 28x28 -> 14x14
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),  # 14x14 -> 7x7
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), hidden_dim),
            nn.LeakyReLU(0.2),
        )
        self.mean = nn.Linear(hidden_dim, latent_dim)
        self.log_var = nn.Linear(hidden_dim, latent_dim)

    def forward(self, x):
        h = self.backbone(x)
        return self.mean(h), self.log_var(h)


class ConvDecoder(nn.Module):
    """The mirror of ConvEncoder: z (N, latent_dim) -> x_pred (N, C * H * W), in 0..1."""

    def __init__(self, latent_dim, hidden_dim, img_shape):
        super().__init__()
        channels, height, width = img_shape
        self.backbone = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden_dim, 32 * (height // 4) * (width // 4)),
            nn.Unflatten(1, (32, height // 4, width // 4)),
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1),  # 7x7 -> 14x14
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),  # 14x14 -> 28x28
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, channels, 3, padding=1),
            nn.Flatten(),
        )

    def forward(self, z):
        return torch.sigmoid(self.backbone(z))


class Autoencoder(VAE):
    """A plain autoencoder: z is the mean, and nothing is sampled.

    The encoder's log_var layer is not used. In its place forward returns zeros, for which the KL divergence
    means nothing: train it with beta = 0.
    """

    def forward(self, x):
        mean, _ = self.encoder(x)
        x_pred = self.decoder(mean)
        return x_pred, mean, torch.zeros_like(mean)


# === Script ===
# Options, data, speed and files. None of it is needed in a notebook.

import importlib.util
import json
import math
import shlex
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

import common
from common import between

CURVES = {
    "reconstruction, nats per image": ["train/reconstruction_loss", "val/reconstruction_loss"],
    "KL divergence, nats per image": ["train/kl_loss", "val/kl_loss"],
    "loss, nats per image": ["train/loss", "val/loss"],
}


def parse_options(argv):
    """The options and, with --resume, the checkpoint of that run, whose options are then the defaults."""
    parser = ArgumentParser("vae.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    loss, folder = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    loss.add_argument("--beta", type=between(float, 0), default=10.0, help="weight of the KL divergence (default: 10)")
    loss.add_argument("--autoencoder", action="store_true", help="no sampling, no KL divergence (default: a VAE)")
    parser.add_argument("--arch", choices=["fc", "conv"], default="fc", help="linear or convolutional (default: fc)")
    parser.add_argument("--hidden-dim", type=between(int, 1), default=512, help="units per layer (default: 512)")
    parser.add_argument("--latent-dim", type=between(int, 1), default=128, help="dimensions of z (default: 128)")
    parser.add_argument("--epochs", type=between(int, 1), default=150, help="passes over the images (default: 150)")
    parser.add_argument("--batch-size", type=between(int, 1), help="images per step (default: 1024; 64 on digits)")
    parser.add_argument("--lr", type=between(float, 1e-12), default=1e-3, help="Adam's learning rate (default: 0.001)")
    parser.add_argument("--seed", type=between(int, 0, 2**63), default=0, help="of all random numbers (default: 0)")
    parser.add_argument("--device", choices=common.DEVICES, default="auto", help="auto: a GPU if any (default: auto)")
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="images (default: mnist, or else digits)")
    parser.add_argument("--data", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--subset", type=between(int, 1), help="train on the first SUBSET images (default: all)")
    folder.add_argument("--out", help="a new folder for the run (default: one under runs/)")
    folder.add_argument("--resume", metavar="RUN", help="the folder of a run to go on with (default: none)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16, if faster (default: float32, TF32 on CUDA)")
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too (default: no)")
    options, checkpoint = parser.parse_args(argv), None
    if options.resume:
        checkpoint = common.load_checkpoint(Path(options.resume, "checkpoint.pt"))
        if checkpoint.get("model") != "vae" or not checkpoint.keys() >= {"config", "metrics"}:
            raise common.Error(f"{options.resume} is not a run of vae.py that could be resumed")
        parser.set_defaults(**checkpoint["config"])
        options = parser.parse_args(argv)
        if options.autoencoder and (options.beta or not checkpoint["config"]["autoencoder"]):
            parser.error("a VAE cannot go on as an autoencoder, and an autoencoder has no --beta")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs a package that is not installed: pip install tensorboard")
    return options, checkpoint


def build(image_shape, config):
    """The network that the options in config ask for, on flat images of that shape (C, H, W)."""
    hidden_dim, latent_dim = config["hidden_dim"], config["latent_dim"]
    if config["arch"] == "conv":
        encoder = ConvEncoder(image_shape, hidden_dim, latent_dim)
        decoder = ConvDecoder(latent_dim, hidden_dim, image_shape)
    else:
        encoder = Encoder(math.prod(image_shape), hidden_dim, latent_dim)
        decoder = Decoder(latent_dim, hidden_dim, math.prod(image_shape))
    return Autoencoder(encoder, decoder) if config["autoencoder"] else VAE(encoder, decoder)


def load(path, device="cpu"):
    """The model of a run or a checkpoint, in eval mode, and its config, with "image_shape" in it.

    Weights without a config, such as the lab's, must be of the fully connected VAE. Raises common.Error.
    """
    checkpoint = common.load_checkpoint(path, device)
    weights = checkpoint["state_dict"]
    if checkpoint.get("model") == "vae" and "config" in checkpoint:
        config = {**checkpoint["config"], "image_shape": tuple(checkpoint["image_shape"])}
    elif "encoder.mean.weight" in weights and "encoder.backbone.0.weight" in weights:
        latent_dim, hidden_dim = weights["encoder.mean.weight"].shape
        input_dim = weights["encoder.backbone.0.weight"].shape[1]
        channels = 1 if math.isqrt(input_dim) ** 2 == input_dim else 3
        side = math.isqrt(input_dim // channels)
        config = {"arch": "fc", "autoencoder": False, "hidden_dim": hidden_dim, "latent_dim": latent_dim}
        config |= {"image_shape": (channels, side, side), "dataset": "mnist", "data": "data"}
    else:
        raise common.Error(f"{path} is neither a run of vae.py nor weights of the lab's VAE")
    model = build(config["image_shape"], config).to(device)
    common.restore(path, checkpoint, model)
    return model.eval(), config


def speed_up(model, device, bf16):
    """Store convolution weights channels last, which is faster on a CPU; if bf16, multiply matrices in bfloat16."""
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)
    if bf16:
        for network in (model.encoder, model.decoder):
            network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
        for layer in (model.encoder.mean, model.encoder.log_var, model.decoder.backbone):
            layer.register_forward_hook(lambda layer, inputs, output: output.float())  # the losses need float32


def reconstruct(model, x, epsilon):
    """Rows of ten images x (N, C, H, W), each row above its reconstructions from z = mean + std * epsilon."""
    mean, log_var = model.encoder(x.flatten(1))
    z = mean if isinstance(model, Autoencoder) else mean + torch.exp(0.5 * log_var) * epsilon
    x_pred = model.decoder(z).view_as(x)
    return torch.cat([row for pair in zip(x.split(10), x_pred.split(10)) for row in pair])


def main(argv=None):
    options, checkpoint = parse_options(argv)
    device = common.pick_device(options.device)
    options.bf16 = options.bf16 and common.bf16_pays(device)
    options.beta = 0.0 if options.autoencoder else options.beta
    torch.manual_seed(options.seed)

    data = common.load_dataset(options.dataset, options.data)
    train_images, test_images = data.train[: options.subset].to(device), data.test.to(device)
    n, image_shape = len(train_images), tuple(train_images.shape[1:])
    options.dataset = data.name
    options.batch_size = options.batch_size or (64 if data.name == "digits" else 1024)

    model = build(image_shape, vars(options)).to(device)
    speed_up(model, device, options.bf16)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    # Binary cross-entropy aborts on nan, on CUDA with the whole process. check_finite names the cause instead.
    model.decoder.register_forward_hook(lambda decoder, inputs, x_pred: x_pred.nan_to_num(0.5))

    rng = torch if device.type == "cpu" else torch.get_device_module(device)  # holds the state of randn and the like
    if checkpoint:
        folder, rows = Path(options.resume), checkpoint["metrics"]
        common.restore(folder, checkpoint, model, [optimizer])
        if options.seed == checkpoint["config"]["seed"] and device.type in checkpoint["random_states"]:
            rng.set_rng_state(checkpoint["random_states"][device.type])
    else:
        name = "vae-conv" if options.arch == "conv" else "vae"
        name += "-autoencoder" if options.autoencoder else f"-beta{options.beta:g}"
        name += f"-{data.name}" if data.name != "mnist" else ""
        folder, rows = common.new_folder(options.out, name), []
    with common.whole_file(folder / "config.json") as file:
        file.write(json.dumps({"model": "vae", **vars(options)}, indent=2).encode())
    if options.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(folder, purge_step=len(rows) + 1)

    # Fixed noise for the pictures, from a generator of its own: drawing them does not change the training.
    fixed_x = test_images[:50] / 255
    generator = torch.Generator().manual_seed(options.seed)
    fixed_z, fixed_epsilon = torch.randn(2, len(fixed_x), options.latent_dim, generator=generator).to(device)

    print(f"{folder}: {n:,} images of {data.name} on {device}, {len(rows)} of {options.epochs} epochs done")
    equation = "" if options.autoencoder else " = BCE + beta * KL"
    print(f"    epoch  images/s  time left     train      test{equation}")
    saved_at = -math.inf
    try:
        for epoch in range(len(rows) + 1, options.epochs + 1):
            start = time.perf_counter()
            model.train()
            sums = torch.zeros(2, device=device)
            batches = common.batches(train_images, options.batch_size, shuffle=True)
            steps = math.ceil(n / options.batch_size)
            for x in tqdm(batches, f"epoch {epoch}", steps, leave=False, delay=2, disable=common.NO_BAR):
                sums += torch.stack(vae_step(model, optimizer, x.flatten(1), options.beta))
            reconstruction, kl = (sums / n).tolist()  # the training pass's only wait
            loss = reconstruction + options.beta * kl
            speed = n / (time.perf_counter() - start)

            test_batches = common.batches(test_images, options.batch_size)
            val_reconstruction, val_kl, val_loss = evaluate(model, test_batches, options.beta)

            with torch.no_grad():
                samples = model.decoder(fixed_z).unflatten(1, image_shape)
                pictures = {"reconstructions": reconstruct(model, fixed_x, fixed_epsilon), "samples": samples}
            for name, images in pictures.items():
                pictures[name] = common.save_grid(folder / f"images/epoch_{epoch:03d}_{name}.png", images)

            seconds = time.perf_counter() - start
            row = {"epoch": epoch, "seconds": round(seconds, 3), "images_per_second": round(speed)}
            row |= {"train/reconstruction_loss": reconstruction, "train/kl_loss": kl, "train/loss": loss}
            row |= {"val/reconstruction_loss": val_reconstruction, "val/kl_loss": val_kl, "val/loss": val_loss}
            if options.autoencoder:
                del row["train/kl_loss"], row["val/kl_loss"]
            common.check_finite(model.state_dict() | row)
            rows.append(row)
            common.save_metrics(folder / "metrics.csv", rows)
            if options.tensorboard:
                for name, value in row.items():
                    board.add_scalar(name, value, epoch)
                for name, grid in pictures.items():
                    board.add_image(name, grid, epoch)
                board.flush()
            if epoch == options.epochs or time.perf_counter() - saved_at > common.SAVE_EVERY:
                checkpoint = {
                    "model": "vae",
                    "config": vars(options),
                    "image_shape": image_shape,
                    "state_dict": model.state_dict(),
                    "optimizers": [optimizer.state_dict()],
                    "epoch": epoch,
                    "metrics": rows,
                    "random_states": {device.type: rng.get_rng_state()},
                }
                common.save_checkpoint(folder / "checkpoint.pt", checkpoint)
                saved_at = time.perf_counter()

            left = timedelta(seconds=round(seconds * (options.epochs - epoch)))
            equation = "" if options.autoencoder else f" = {val_reconstruction:.2f} + {options.beta:g} * {val_kl:.3f}"
            line = f"{epoch:>5}/{options.epochs:<3} {speed:9,.0f} {left!s:>10} {loss:9.2f} {val_loss:9.2f}{equation}"
            print(line, flush=True)
    except KeyboardInterrupt:
        saved = (folder / "checkpoint.pt").exists()
        way_back = f"go on with: python vae.py --resume {shlex.quote(folder.as_posix())}"
        raise KeyboardInterrupt(f"interrupted; {way_back if saved else 'nothing was saved yet'}") from None
    finally:
        if rows:
            curves = {title: columns for title, columns in CURVES.items() if columns[0] in rows[0]}
            common.save_curves(folder / "losses.png", rows, curves)
    print(f"{folder}/: checkpoint.pt, metrics.csv, losses.png, images/")
    print(f"next: python sample.py {shlex.quote(folder.as_posix())}")


if __name__ == "__main__":
    common.run_script(main)
