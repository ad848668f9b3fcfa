"""Variational Autoencoder (Kingma and Welling, 2013) on MNIST, in plain PyTorch.

The encoder maps an image x to a Gaussian N(mean, std^2), the decoder turns a sample z from that
Gaussian into an image x_pred, and both are trained to minimise

    BCE(x_pred, x) + beta * KL(N(mean, std^2) || N(0, 1))     with  z = mean + std * epsilon

    python vae.py --beta 10                    # the lab's run: 150 epochs, fully connected
    python vae.py --arch conv --beta 1         # convolutions, and the loss of the paper
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
    """A plain autoencoder: nothing is sampled, and the code of x is model.encoder(x)[0].

    In place of mean and log_var forward returns zeros, so the KL is 0 and the loss is the reconstruction loss alone.
    """

    def forward(self, x):
        z, _ = self.encoder(x)
        x_pred = self.decoder(z)
        return x_pred, torch.zeros_like(z), torch.zeros_like(z)


# === Script ===
# Options, images, speed and files. None of it is needed in a notebook.

import math
import shlex
import shutil
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import timedelta
from pathlib import Path

import common


def parse_options(argv):
    """The options and, with --resume, the checkpoint of that run, whose options become the defaults."""
    parser = ArgumentParser("vae.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    # the network and its training
    parser.add_argument("--beta", type=float, default=10.0, help="weight of the KL divergence (default: 10)")
    parser.add_argument("--arch", choices=["fc", "conv"], default="fc", help="linear or convolutional (default: fc)")
    parser.add_argument("--autoencoder", action="store_true", help="no sampling, and a KL of 0 (default: a VAE)")
    parser.add_argument("--hidden-dim", type=common.count, default=512, help="units per layer (default: 512)")
    parser.add_argument("--latent-dim", type=common.count, default=128, help="dimensions of z (default: 128)")
    parser.add_argument("--epochs", type=common.count, default=150, help="passes over the images (default: 150)")
    parser.add_argument("--batch-size", type=common.count, help="images per step (default: 1024; 64 on digits)")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    # the images
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="images (default: mnist, or else digits)")
    parser.add_argument("--data", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--subset", type=common.count, help="train on the first SUBSET images (default: all)")
    # the device
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: auto, a GPU if any)")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="matrix products in bfloat16; a CPU without instructions for it emulates it and is many times slower"
        " (default: float32, with TF32 products on CUDA)",
    )
    # the files
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", help="a new folder for the run (default: one under runs/)")
    folder.add_argument("--resume", metavar="RUN", type=common.run_folder, help="go on with a run (default: a new one)")
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too (default: no)")

    options = parser.parse_args(argv)
    checkpoint = None
    if options.resume:
        checkpoint = common.load_checkpoint(options.resume)
        if checkpoint.get("model") != "vae" or "optimizer" not in checkpoint:
            raise common.Error(f"{options.resume} is not a run of vae.py that can be resumed")
        parser.set_defaults(**checkpoint["config"])
        options = parser.parse_args(argv)  # the run's own, but for what was typed
    if not options.beta >= 0:  # or nan
        parser.error("--beta must be 0 or more")
    return options, checkpoint


def run_name(options):
    """vae-beta10, vae-conv-beta1, vae-autoencoder, ..., then what is not the default: -digits, -z2."""
    name = "vae-conv" if options.arch == "conv" else "vae"
    name += "-autoencoder" if options.autoencoder else f"-beta{options.beta:g}"
    if options.dataset != "mnist":
        name += f"-{options.dataset}"
    if options.latent_dim != 128:
        name += f"-z{options.latent_dim}"
    return name


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

    Weights without a config must be of the fully connected VAE, whose sizes are read off them. Raises common.Error.
    """
    checkpoint = common.load_checkpoint(path)
    weights = common.find_weights(checkpoint, "encoder.mean.weight")
    if checkpoint.get("model") == "vae":
        config = {**checkpoint["config"], "image_shape": tuple(checkpoint["image_shape"])}
    elif "encoder.backbone.0.weight" in weights and weights["encoder.backbone.0.weight"].ndim == 2:
        hidden_dim, input_dim = weights["encoder.backbone.0.weight"].shape
        latent_dim = len(weights["encoder.mean.weight"])
        channels = 1 if math.isqrt(input_dim) ** 2 == input_dim else 3
        side = math.isqrt(input_dim // channels)
        config = {"arch": "fc", "autoencoder": False, "hidden_dim": hidden_dim, "latent_dim": latent_dim}
        config |= {"image_shape": (channels, side, side), "dataset": "mnist", "data": "data"}
    else:
        names = list(common.tensors(checkpoint))[:10]
        raise common.Error(f"the weights in {path} are not recognised: {names}")
    model = build(config["image_shape"], config).to(device)
    common.load_weights(model, weights, path)
    return model.eval(), config


@torch.no_grad()
def reconstruction_rows(model, x):
    """Images x (N, C, H, W) in rows of ten, each row above that of their reconstructions; N is a multiple of ten."""
    x_pred, _, _ = model(x.flatten(1))
    x_pred = x_pred.view_as(x)
    rows = torch.stack([x.unflatten(0, (-1, 10)), x_pred.unflatten(0, (-1, 10))], dim=1)  # (N / 10, 2, 10, C, H, W)
    return rows.flatten(0, 2)


CURVES = {
    "reconstruction, nats per image": ["train/reconstruction_loss", "val/reconstruction_loss"],
    "KL divergence, nats per image": ["train/kl_loss", "val/kl_loss"],
    "loss, nats per image": ["train/loss", "val/loss"],
}


def main(argv=None):
    options, checkpoint = parse_options(argv)
    device = common.pick_device(options.device)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.set_flush_denormal(True)  # Adam's moments of dead units fade to denormal numbers, which slow a CPU down
    torch.manual_seed(options.seed)

    # the images, on the device once: uint8 (N, C, H, W)
    data = common.load_dataset(options.dataset, options.data)
    train_images = data.train[: options.subset].to(device)
    test_images = data.test.to(device)
    image_shape = tuple(test_images.shape[1:])
    options.dataset = data.name  # known only now, and kept in the checkpoint
    options.batch_size = options.batch_size or (64 if data.name == "digits" else 1024)

    # the network, its optimizer, and the codes and images that are drawn after every epoch
    model = build(image_shape, vars(options))
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format  # faster convolutions on a CPU
    model.to(device, memory_format=layout)
    fixed_z = torch.randn(50, options.latent_dim).to(device)
    fixed_x = test_images[:50] / 255
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    if options.bf16:  # the codes and the logits before the sigmoid stay float32
        common.use_bf16(model, [model.encoder.mean, model.encoder.log_var, model.decoder.backbone])

    # a new run, or one to go on with
    if checkpoint:
        folder = Path(options.resume)
        rows = checkpoint["metrics"]
        common.load_weights(model, checkpoint["state_dict"], folder)
        common.load_adam(optimizer, checkpoint["optimizer"])
        resume_command = "run this command again"
    else:
        folder = common.new_folder(options.out, run_name(options))
        rows = []
        resume_command = f"python vae.py --resume {shlex.quote(folder.as_posix())}"

    try:
        board = common.open_board(folder, rows) if options.tensorboard else None
        parameters = sum(parameter.numel() for parameter in model.parameters())
        precision = "bfloat16" if options.bf16 else "float32"
        print(f"{folder}: {len(rows)} of {options.epochs} epochs are done")
        print(f"{len(train_images):,} images of {data.name}; {parameters:,} parameters on {device}, in {precision}")
        print(f"if interrupted: {resume_command}")
        print("    epoch   seconds  time left     train      test = BCE + beta * KL", flush=True)

        for epoch in range(len(rows) + 1, options.epochs + 1):
            start = time.perf_counter()
            torch.manual_seed(10_000 * options.seed + epoch)  # a resumed run draws the same numbers

            # one pass over the training images
            model.train()
            sums = torch.zeros(2, device=device)
            for x in common.batches(train_images, options.batch_size, shuffle=True):  # floats in 0..1
                losses = vae_step(model, optimizer, x.flatten(1), options.beta)
                sums += torch.stack(losses)
            reconstruction, kl = (sums / len(train_images)).tolist()  # until here Python did not wait for the device
            loss = reconstruction + options.beta * kl
            speed = len(train_images) / (time.perf_counter() - start)  # images per second

            # the same losses on the test images
            test_batches = common.batches(test_images, options.batch_size)
            val_reconstruction, val_kl, val_loss = evaluate(model, test_batches, options.beta)

            # pictures from the same codes and images after every epoch; evaluate left the model in eval mode
            with torch.no_grad():
                samples = model.decoder(fixed_z).unflatten(1, image_shape)
                pictures = {"samples": samples, "reconstructions": reconstruction_rows(model, fixed_x)}

            # the row of metrics
            row = {
                "epoch": epoch, "seconds": round(time.perf_counter() - start, 3), "images_per_second": round(speed),
                "train/reconstruction_loss": reconstruction, "train/kl_loss": kl, "train/loss": loss,
                "val/reconstruction_loss": val_reconstruction, "val/kl_loss": val_kl, "val/loss": val_loss,
            }
            common.check_finite({**row, **pictures})
            new_rows = [*rows, row]

            # the files of this epoch, and then the checkpoint
            common.save_epoch(folder, new_rows, pictures, board)
            common.save_checkpoint(folder / "checkpoint.pt", {
                "model": "vae", "config": vars(options), "image_shape": image_shape,
                "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
                "epoch": epoch, "metrics": new_rows,
            })
            rows = new_rows

            # one line on the console, with the time of the whole epoch
            seconds = time.perf_counter() - start
            left = timedelta(seconds=round(seconds * (options.epochs - epoch)))
            equation = f"{val_loss:9.2f} = {val_reconstruction:.2f} + {options.beta:g} * {val_kl:.3f}"
            print(f"{epoch:>5}/{options.epochs:<3} {seconds:9.1f} {left!s:>10} {loss:9.2f} {equation}", flush=True)
    finally:  # after the last epoch, Ctrl-C or an error
        if rows:
            common.save_curves(folder / "losses.png", rows, CURVES)
        elif not options.resume:  # a new run that finished no epoch: its name is free again
            shutil.rmtree(folder, ignore_errors=True)
    print(f"next: python sample.py {shlex.quote(folder.as_posix())}")


if __name__ == "__main__":
    common.run_script(main)
