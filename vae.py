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
    """x (N, input_dim) -> x_pred (N, input_dim), mean and log_var (N, latent_dim).

    x -> encoder -> (mean, log_var) -> z = mean + std * epsilon -> decoder -> x_pred
    Gradients flow back along this path, through mean and std; epsilon depends on no weight.
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

    Each pixel costs -[x log(x_pred) + (1 - x) log(1 - x_pred)]. Raises RuntimeError if a value is not in 0..1.
    It is linear in x, so with gray targets, at beta 1, the negative loss is a lower bound on the log-likelihood
    of the image binarized at random: each pixel is 1 with a probability equal to its gray level.
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
    sums = torch.zeros(2, device=device)  # reconstruction and KL; kept on the device, so that nothing waits for it
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

    mean_reconstruction, mean_kl = (sums / num_images).tolist()  # the first wait for the GPU in this epoch
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
from argparse import ArgumentParser
from datetime import timedelta
from os.path import expanduser
from pathlib import Path

import common

SCRIPT = Path(__file__).name  # a copy, my_vae.py, names its runs after itself


def parse_options(argv):
    """The options and, with --resume, the checkpoint of that run: its options, overridden by those typed now."""
    parser = ArgumentParser(SCRIPT, description=__doc__, formatter_class=common.Help)
    # the network and its training
    parser.add_argument("--beta", type=float, default=10.0, help="weight of the KL divergence")
    parser.add_argument("--arch", choices=["fc", "conv"], default="fc", help="fully connected or convolutional")
    parser.add_argument("--autoencoder", action="store_true", help="train a plain autoencoder")
    parser.add_argument("--hidden-dim", type=int, default=512, help="units per layer")
    parser.add_argument("--latent-dim", type=int, default=128, help="dimensions of z")
    parser.add_argument("--epochs", type=int, default=150, help="passes over the images")
    parser.add_argument("--batch-size", type=int, help="images per step (default: 1024; 64 on digits)")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    # the images
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="mnist; digits if it cannot be downloaded")
    parser.add_argument("--data", type=expanduser, default="data", help="folder of the data sets")
    parser.add_argument("--subset", metavar="N", type=int, help="train on the first N images")
    # the device
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto is a GPU if there is one")
    parser.add_argument("--bf16", action="store_true", help="bfloat16; slow on CPUs without bfloat16 instructions")
    # the run's files
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", type=expanduser, help="a new folder for the run (default: one in runs/)")
    folder.add_argument("--resume", metavar="RUN", type=common.run_folder, help="continue a run")
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too")

    options = parser.parse_args(argv)
    checkpoint = None
    if options.resume:
        checkpoint = common.load_checkpoint(options.resume)
        if checkpoint.get("script") != SCRIPT:
            sys.exit(f"{options.resume} is not a run of {SCRIPT} but of {checkpoint.get('script')}")
        parser.set_defaults(**checkpoint["config"])
        options = parser.parse_args(argv)
    return options, checkpoint


def run_name(options):
    """The script, the model and beta; data set, latent dimension and subset if not the default: vae-beta1-digits-z2."""
    name = Path(__file__).stem
    if options.arch == "conv":
        name += "-conv"
    name += "-autoencoder" if options.autoencoder else f"-beta{options.beta:g}"
    if options.dataset != "mnist":
        name += f"-{options.dataset}"
    if options.latent_dim != 128:
        name += f"-z{options.latent_dim}"
    if options.subset:
        name += f"-subset{options.subset}"
    return name


def build(config):
    """The network of a run's options, for flat images of config["image_shape"], (C, H, W)."""
    image_shape = config["image_shape"]
    hidden_dim = config["hidden_dim"]
    latent_dim = config["latent_dim"]
    if config["arch"] == "conv":
        encoder = ConvEncoder(image_shape, hidden_dim, latent_dim)
        decoder = ConvDecoder(latent_dim, hidden_dim, image_shape)
    else:
        encoder = Encoder(math.prod(image_shape), hidden_dim, latent_dim)
        decoder = Decoder(latent_dim, hidden_dim, math.prod(image_shape))
    return Autoencoder(encoder, decoder) if config["autoencoder"] else VAE(encoder, decoder)


IMAGE_SHAPES = {784: (1, 28, 28), 1024: (1, 32, 32), 3072: (3, 32, 32)}  # by input_dim, for weights without options


def load(path, device="cpu"):
    """The VAE of a run or of a file with weights, in eval mode, and its config, with latent_dim and image_shape.

    Weights without a config must be of the fully connected VAE: its sizes are read off them. Exits if there is no VAE.
    """
    checkpoint = common.load_checkpoint(path)
    weights = common.find_weights(checkpoint, "encoder.mean.weight")
    if not weights:
        sys.exit(f"{path} holds {common.contents(checkpoint)}, not a VAE, whose codes tsne.py maps")
    if checkpoint.get("script", SCRIPT) != SCRIPT:
        print(f"warning: {path} is of {checkpoint['script']}, opened with the layers of {SCRIPT}", file=sys.stderr)
    if checkpoint.get("model") == "vae":
        config = {**checkpoint["config"], "epoch": checkpoint["epoch"]}
    elif "encoder.backbone.0.weight" in weights:
        hidden_dim, input_dim = weights["encoder.backbone.0.weight"].shape
        config = {
            "arch": "fc",
            "autoencoder": False,
            "hidden_dim": hidden_dim,
            "latent_dim": len(weights["encoder.mean.weight"]),
            "image_shape": IMAGE_SHAPES[input_dim],
            "dataset": "mnist",
            "data": "data",
            "epoch": checkpoint.get("epoch"),
        }
    else:
        sys.exit(f"{path} holds a VAE with other layers than vae.Encoder: its sizes are known only to its run")
    model = build(config).to(device)
    model.load_state_dict(weights)
    return model.eval(), config


@torch.no_grad()
def reconstruction_rows(model, x):
    """Images x (N, C, H, W) in rows of ten, each followed by a row of its reconstructions; N is a multiple of ten."""
    x_pred, _, _ = model(x.flatten(1))
    originals = x.unflatten(0, (-1, 10))  # (N / 10, 10, C, H, W)
    reconstructions = x_pred.view_as(x).unflatten(0, (-1, 10))
    return torch.stack([originals, reconstructions], dim=1).flatten(0, 2)


CURVES = {
    "reconstruction, nats per image": {"training": "train/reconstruction_loss", "test": "val/reconstruction_loss"},
    "KL divergence, nats per image": {"training": "train/kl_loss", "test": "val/kl_loss"},
    "loss, nats per image": {"training": "train/loss", "test": "val/loss"},
}


def main(argv=None):
    options, checkpoint = parse_options(argv)
    device = common.pick_device(options.device)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.set_flush_denormal(True)  # very small moments become denormal numbers, which are slow on a CPU
    torch.manual_seed(options.seed)

    # the images and their labels, on the device once
    data = common.load_dataset(options.dataset, options.data)
    train_images = data.train[: options.subset].to(device)
    train_labels = data.train_labels[: options.subset].to(device)
    test_images = data.test.to(device)
    test_labels = data.test_labels.to(device)
    options.dataset = data.name
    options.image_shape = tuple(data.train.shape[1:])
    options.batch_size = options.batch_size or (64 if data.name == "digits" else 1024)

    # the network, its optimizer, and the codes and images that are drawn after every epoch
    model = build(vars(options))
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format  # faster convolutions on a CPU
    model.to(device, memory_format=layout)
    fixed_z = torch.randn(50, options.latent_dim).to(device)
    fixed_x = test_images[:50] / 255
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    if options.bf16:  # the codes and the logits before the sigmoid stay float32
        common.use_bf16(model, [model.encoder.mean, model.encoder.log_var, model.decoder.backbone])

    # a new run, or one to continue
    if checkpoint:
        folder = Path(options.resume)
        rows = checkpoint["metrics"]
        model.load_state_dict(checkpoint["state_dict"])
        common.load_adam(optimizer, checkpoint["optimizer"])
    else:
        folder = common.new_folder(options.out, run_name(options))
        rows = []
    board = common.open_board(folder, rows) if options.tensorboard else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {len(train_images):,} images of {data.name}, {parameters:,} parameters on {device}", flush=True)

    try:
        for epoch in range(len(rows) + 1, options.epochs + 1):
            start = time.perf_counter()
            torch.manual_seed(10_000 * options.seed + epoch)  # a resumed run draws the same numbers

            train_batches = common.batches(train_images, train_labels, options.batch_size, shuffle=True)
            test_batches = common.batches(test_images, test_labels, options.batch_size)
            train_reconstruction, train_kl, train_loss = train_vae(model, optimizer, train_batches, options.beta)
            val_reconstruction, val_kl, val_loss = evaluate_vae(model, test_batches, options.beta)

            model.eval()
            with torch.no_grad():
                samples = model.decoder(fixed_z).unflatten(1, options.image_shape)
                pictures = {"samples": samples, "reconstructions": reconstruction_rows(model, fixed_x)}

            seconds = time.perf_counter() - start
            row = {
                "epoch": epoch, "seconds": round(seconds, 3),
                "train/reconstruction_loss": train_reconstruction, "train/kl_loss": train_kl, "train/loss": train_loss,
                "val/reconstruction_loss": val_reconstruction, "val/kl_loss": val_kl, "val/loss": val_loss,
            }
            common.save_epoch(folder, [*rows, row], pictures, board, {
                "model": "vae", "script": SCRIPT, "config": vars(options),
                "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
            })
            rows.append(row)  # after save_epoch: an epoch counts when it is saved

            left = timedelta(seconds=round(seconds * (options.epochs - epoch)))
            equation = f"{val_loss:.2f} = {val_reconstruction:.2f} + {options.beta:g} * {val_kl:.3f}"
            line = f"{epoch:>3}/{options.epochs}: train {train_loss:.2f}, test {equation}"
            print(f"{line}, {seconds:.3g} s, {left} left", flush=True)
    except KeyboardInterrupt:
        if not rows:
            sys.exit("interrupted before the first epoch was saved")
        sys.exit(f"interrupted; to continue: python {SCRIPT} --resume {shlex.quote(folder.as_posix())}")
    finally:
        if rows:
            common.save_curves(folder / "losses.png", rows, CURVES)
    print(f"next: python sample.py {shlex.quote(folder.as_posix())}")


if __name__ == "__main__":
    main()
