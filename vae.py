"""Variational Autoencoder (Kingma and Welling, 2013) on MNIST, in plain PyTorch.

The encoder maps an image x to a Gaussian N(mean, std^2), the decoder turns a sample z from that
Gaussian into an image x_pred, and both are trained to minimize

    BCE(x_pred, x) + beta * KL(N(mean, std^2) || N(0, 1))     with  z = mean + std * epsilon

    python vae.py --beta 10                    # the lab's run: 150 epochs, fully connected
    python vae.py --arch conv --beta 1         # convolutions, and the loss of Kingma and Welling
    python vae.py --autoencoder --epochs 30    # a plain autoencoder, to compare with

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
    """Codes z (N, latent_dim) -> x_pred (N, output_dim), pixel values in 0..1."""

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
    """x (N, input_dim) -> x_pred (N, input_dim), mean and log_var (N, latent_dim).

    x -> encoder -> (mean, log_var) -> z = mean + std * epsilon -> decoder -> x_pred
    """

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
    """Binary cross-entropy of x_pred and x, both (N, input_dim) in 0..1, in nats, summed over pixels and batch.

    Each pixel costs -[x log(x_pred) + (1 - x) log(1 - x_pred)], with the natural logarithm. This is linear in x, so
    with gray targets, at beta 1, the negative loss is a lower bound on the log-likelihood of the image binarized at
    random: each pixel is 1 with a probability equal to its gray value. Raises RuntimeError if a value is not in 0..1.
    """
    return F.binary_cross_entropy(x_pred, x, reduction="sum")


def kl_divergence(mean, log_var):
    """KL(N(mean, var) || N(0, 1)) in nats, summed over dimensions and batch (Kingma and Welling, appendix B).

    mean and log_var are (N, latent_dim); per dimension it is -1/2 (1 + log var - mean^2 - var).
    """
    return -0.5 * torch.sum(1 + log_var - mean**2 - log_var.exp())


def train_vae(model, optimizer, batches, beta):
    """Train the model for one epoch, with an update on each batch: minimize reconstruction + beta * KL.

    A batch is a pair, as a DataLoader gives it: images in 0..1, (N, C, H, W) or (N, input_dim), and labels, which
    are not used. Returns the means over the images of reconstruction, KL and loss, in nats per image.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, device=device)  # reconstruction and KL: no CPU-GPU synchronization before the last line
    num_images = 0

    model.train()
    for images, _ in batches:
        x = images.to(device).flatten(1)

        x_pred, mean, log_var = model(x)
        reconstruction = reconstruction_loss(x_pred, x)
        kl = kl_divergence(mean, log_var)
        loss = reconstruction + beta * kl

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        sums += torch.stack([reconstruction, kl]).detach()
        num_images += len(x)

    mean_reconstruction, mean_kl = (sums / num_images).tolist()  # the only synchronization of this epoch
    return mean_reconstruction, mean_kl, mean_reconstruction + beta * mean_kl


@torch.no_grad()
def evaluate_vae(model, batches, beta):
    """The means that train_vae returns, in eval mode and without updates; z is sampled as in training."""
    device = next(model.parameters()).device
    sums = torch.zeros(2, device=device)
    num_images = 0

    model.eval()
    for images, _ in batches:
        x = images.to(device).flatten(1)
        x_pred, mean, log_var = model(x)
        sums += torch.stack([reconstruction_loss(x_pred, x), kl_divergence(mean, log_var)])
        num_images += len(x)

    mean_reconstruction, mean_kl = (sums / num_images).tolist()
    return mean_reconstruction, mean_kl, mean_reconstruction + beta * mean_kl


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
    """Roughly mirrors ConvEncoder: z (N, latent_dim) -> x_pred (N, C * H * W), in 0..1."""

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
    """A plain autoencoder: nothing is sampled, and the code of x is model.encoder(x)[0].

    In place of mean and log_var forward returns zeros, so the KL is 0 and the loss is the reconstruction loss alone.
    """

    def forward(self, x):
        z, _ = self.encoder(x)
        x_pred = self.decoder(z)
        return x_pred, torch.zeros_like(z), torch.zeros_like(z)


# === Script ===
# Options, images, pictures and files. None of it is needed in a notebook.

import math
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from datetime import timedelta
from os.path import expanduser
from pathlib import Path

import common

SCRIPT = Path(__file__).name  # a copy, my_vae.py, names its runs after itself
MAY_CHANGE = {"epochs", "lr", "data", "device", "bf16", "tensorboard", "out", "resume"}  # of a resumed run


def parse_args(argv):
    """The options and, with --resume, the checkpoint of that run, whose options are then the defaults."""
    parser = ArgumentParser(SCRIPT, description=__doc__, formatter_class=common.Help)
    # the network and its training
    parser.add_argument("--beta", type=float, default=10.0, help="weight of the KL divergence")
    parser.add_argument("--arch", choices=["fc", "conv"], default="fc", help="fully connected or convolutional")
    parser.add_argument("--autoencoder", action="store_true", help="train a plain autoencoder")
    parser.add_argument("--hidden-dim", type=common.positive, default=512, help="units per layer")
    parser.add_argument("--latent-dim", type=common.positive, default=128, help="dimensions of z")
    parser.add_argument("--epochs", type=common.positive, default=150, help="passes over the images")
    parser.add_argument("--batch-size", type=common.positive, help="images per step (default: 1024; 64 on digits)")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    # the images
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="mnist; digits if it cannot be downloaded")
    parser.add_argument("--data", type=expanduser, default="data", help="folder of the data sets")
    parser.add_argument("--subset", metavar="N", type=common.positive, help="train on the first N images")
    # the device
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto is a GPU if there is one")
    parser.add_argument("--bf16", action="store_true", help="bfloat16; slow on CPUs without bfloat16 instructions")
    # the run's files
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", type=expanduser, help="folder of the run (default: one in runs/)")
    folder.add_argument("--resume", metavar="RUN", type=expanduser, help="continue the run in this folder")
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too")

    args = parser.parse_args(argv)
    if args.resume is None:
        return args, None
    checkpoint = common.load_checkpoint(Path(args.resume, "checkpoint.pt"))
    if checkpoint["script"] != SCRIPT:
        sys.exit(f"{args.resume} was trained by {checkpoint['script']}, not by {SCRIPT}")
    parser.set_defaults(**checkpoint["config"])
    args = parser.parse_args(argv)  # again: an option that was not typed is now the run's
    for name, value in checkpoint["config"].items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            option = "--" + name.replace("_", "-")
            sys.exit(f"{option} cannot change: {args.resume} was trained with {value}")
    if checkpoint["epoch"] >= args.epochs:
        sys.exit(f"{args.resume} has all its {checkpoint['epoch']} epochs; to train longer, give a larger --epochs")
    return args, checkpoint


def run_name(args):
    """The script, the model and beta; data set, latent dimension, subset and seed if they are not the defaults."""
    name = Path(__file__).stem
    if args.arch == "conv":
        name += "-conv"
    if args.autoencoder:
        name += "-autoencoder"
    else:
        name += f"-beta{args.beta:g}"
    if args.dataset != "mnist":
        name += f"-{args.dataset}"
    if args.latent_dim != 128:
        name += f"-z{args.latent_dim}"
    if args.subset:
        name += f"-subset{args.subset}"
    if args.seed:
        name += f"-seed{args.seed}"
    return name


def build(config):
    """The network of a run's options, for flat images of config.image_shape, (C, H, W)."""
    if config.arch == "conv":
        encoder = ConvEncoder(config.image_shape, config.hidden_dim, config.latent_dim)
        decoder = ConvDecoder(config.latent_dim, config.hidden_dim, config.image_shape)
    else:
        input_dim = math.prod(config.image_shape)
        encoder = Encoder(input_dim, config.hidden_dim, config.latent_dim)
        decoder = Decoder(config.latent_dim, config.hidden_dim, input_dim)
    return Autoencoder(encoder, decoder) if config.autoencoder else VAE(encoder, decoder)


def load(checkpoint, device):
    """The VAE of a checkpoint in eval mode, its function from codes z (N, latent_dim) to images, and its config."""
    config = Namespace(**checkpoint["config"], epoch=checkpoint["epoch"])
    model = build(config).to(device)
    model.load_state_dict(checkpoint["state_dict"])

    def decode(z):
        return model.decoder(z).unflatten(1, config.image_shape)

    return model.eval(), decode, config


@torch.no_grad()
def reconstruction_rows(model, x):
    """Images x (N, C, H, W) in rows, each followed by a row of its reconstructions, as they are saved.

    N is a multiple of common.COLUMNS, the images in a row.
    """
    x_pred, _, _ = model(x.flatten(1))
    originals = x.unflatten(0, (-1, common.COLUMNS))  # (rows, COLUMNS, C, H, W)
    reconstructions = x_pred.view_as(x).unflatten(0, (-1, common.COLUMNS))
    return torch.stack([originals, reconstructions], dim=1).flatten(0, 2)


CURVES = {
    "reconstruction, nats per image": {"training": "train/reconstruction_loss", "test": "test/reconstruction_loss"},
    "KL divergence, nats per image": {"training": "train/kl_loss", "test": "test/kl_loss"},
    "loss, nats per image": {"training": "train/loss", "test": "test/loss"},
}


def main(argv=None):
    args, checkpoint = parse_args(argv)
    device = common.pick_device(args.device)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.set_flush_denormal(True)  # Adam's moments of unused weights become denormal numbers, which are slow on a CPU
    torch.manual_seed(args.seed)

    # the images and their labels, on the device once
    images = common.load_images(args.dataset, args.data)
    x_train = images.train[: args.subset].to(device)
    y_train = images.train_labels[: args.subset].to(device)
    x_test = images.test.to(device)
    y_test = images.test_labels.to(device)
    args.dataset = images.name
    args.image_shape = tuple(images.train.shape[1:])
    if args.batch_size is None:
        args.batch_size = 64 if images.name == "digits" else 1024

    # the network, its optimizer, and the codes that are decoded after every epoch
    model = build(args)
    # Channels last is faster for convolutions on a CPU. On MPS it gives wrong gradients of batch norm (pytorch 175189).
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    model.to(device, memory_format=layout)
    fixed_z = torch.randn(50, args.latent_dim).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    if args.bf16:  # the codes and the logits before the sigmoid stay float32
        common.use_bf16(model, [model.encoder.mean, model.encoder.log_var, model.decoder.backbone])

    # a new run, or one to continue
    if checkpoint:
        run_dir = Path(args.resume)
        rows = checkpoint["metrics"]
        model.load_state_dict(checkpoint["state_dict"])
        common.load_adam(optimizer, checkpoint["optimizer"])
    else:
        run_dir = common.new_folder(args.out, run_name(args))
        rows = []
    writer = common.open_writer(run_dir, rows) if args.tensorboard else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{run_dir}: {len(x_train):,} images of {images.name}, {parameters:,} parameters on {device}", flush=True)

    try:
        for epoch in range(len(rows) + 1, args.epochs + 1):
            start = time.perf_counter()
            torch.manual_seed(10_000 * args.seed + epoch)  # a resumed run draws the same numbers

            train_batches = common.batches(x_train, y_train, args.batch_size, shuffle=True)
            test_batches = common.batches(x_test, y_test, args.batch_size)
            train_reconstruction, train_kl, train_loss = train_vae(model, optimizer, train_batches, args.beta)
            test_reconstruction, test_kl, test_loss = evaluate_vae(model, test_batches, args.beta)

            model.eval()
            with torch.no_grad():
                samples = model.decoder(fixed_z).unflatten(1, args.image_shape)
            grids = {"samples": samples, "reconstructions": reconstruction_rows(model, x_test[:50])}

            seconds = time.perf_counter() - start
            row = {
                "epoch": epoch,
                "seconds": round(seconds, 3),
                "train/reconstruction_loss": train_reconstruction,
                "train/kl_loss": train_kl,
                "train/loss": train_loss,
                "test/reconstruction_loss": test_reconstruction,
                "test/kl_loss": test_kl,
                "test/loss": test_loss,
            }
            saved = {
                "script": SCRIPT,
                "config": vars(args),
                "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            common.save_epoch(run_dir, [*rows, row], grids, writer, saved)
            rows.append(row)

            left = timedelta(seconds=round(seconds * (args.epochs - epoch)))
            equation = f"{test_loss:.2f} = {test_reconstruction:.2f} + {args.beta:g} * {test_kl:.3f}"
            line = f"{epoch:>3}/{args.epochs}: train {train_loss:.2f}, test {equation}"
            print(f"{line}, {seconds:.1f} s, {left} left", flush=True)
    except KeyboardInterrupt:
        if not rows:
            sys.exit("interrupted; nothing is saved yet")
        sys.exit(f"interrupted; to continue: python {SCRIPT} --resume {shlex.quote(run_dir.as_posix())}")
    finally:
        if rows:
            common.save_curves(run_dir / "losses.png", rows, CURVES)
    print(f"next: python sample.py {shlex.quote(run_dir.as_posix())}")


if __name__ == "__main__":
    main()
