"""Variational Autoencoder (Kingma and Welling, 2013) on MNIST, in plain PyTorch.

The encoder maps an image x to a Gaussian, the decoder maps a sample z of it back to an image,
and both are trained to minimise

    BCE(x_pred, x) + beta * KL(N(mean, std^2) || N(0, 1))     with  z = mean + std * epsilon

    python vae.py --beta 10                    # the lab's run: 150 epochs, fully connected
    python vae.py --arch conv --beta 1         # convolutions, and the loss of the paper
    python vae.py --autoencoder --epochs 20    # what a VAE is without the V

Everything above the line "=== Script" needs only torch: paste it into a notebook cell, and train
with a DataLoader of your own.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Encoder(nn.Module):
    """x (N, input_dim) -> mean and log_var of q(z|x), each (N, latent_dim)."""

    def __init__(self, input_dim, hidden_dim, latent_dim):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
        )
        self.mean = nn.Linear(hidden_dim, latent_dim)
        self.log_var = nn.Linear(hidden_dim, latent_dim)  # a logarithm may take any sign

    def forward(self, x):
        h = self.backbone(x)
        # under autocast, back from bf16 to the precision that the losses need
        return self.mean(h).to(x.dtype), self.log_var(h).to(x.dtype)


class Decoder(nn.Module):
    """z (N, latent_dim) -> x_pred (N, output_dim), gray levels in 0..1."""

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
        logits = self.backbone(z).to(z.dtype)  # a sigmoid in bf16 would be 1 from a logit of 6 on
        return torch.sigmoid(logits)


def reparameterize(mean, std):
    """Sample z ~ N(mean, std^2) so that gradients reach mean and std: the reparameterization trick."""
    epsilon = torch.randn_like(std)  # all the randomness, and nothing to learn
    return mean + std * epsilon


class VAE(nn.Module):
    """x (N, input_dim) -> x_pred (N, output_dim), mean and log_var (N, latent_dim)."""

    def __init__(self, input_dim, hidden_dim, latent_dim, output_dim):
        super().__init__()
        self.encoder = Encoder(input_dim, hidden_dim, latent_dim)
        self.decoder = Decoder(latent_dim, hidden_dim, output_dim)

    def forward(self, x):
        mean, log_var = self.encoder(x)
        std = torch.exp(0.5 * log_var)
        z = reparameterize(mean, std)
        x_pred = self.decoder(z)
        return x_pred, mean, log_var


class ConvEncoder(nn.Module):
    """The encoder over convolutions: x is still flat, (N, C * H * W); H and W are multiples of 4."""

    def __init__(self, img_shape, hidden_dim, latent_dim):
        super().__init__()
        channels, height, width = img_shape
        self.backbone = nn.Sequential(
            nn.Unflatten(1, img_shape),
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),  # halves the map: 28x28 -> 14x14
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

    forward = Encoder.forward  # word for word the same, over other layers


class ConvDecoder(nn.Module):
    """The encoder's mirror, in the manner of the DCGAN's generator; x_pred is flat, (N, C * H * W)."""

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
            # each upsamples and convolves at once, as UpsampleConv2d in dcgan.py, with a 4x4 kernel of its own
            nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1),  # doubles the map: 7x7 -> 14x14
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),  # 14x14 -> 28x28
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, channels, 3, padding=1),  # strokes are finished at full size
            nn.Flatten(),
        )

    forward = Decoder.forward


class ConvVAE(nn.Module):
    """The VAE with convolutional networks; takes and returns the same flat rows."""

    def __init__(self, img_shape, hidden_dim, latent_dim):
        super().__init__()
        self.encoder = ConvEncoder(img_shape, hidden_dim, latent_dim)
        self.decoder = ConvDecoder(latent_dim, hidden_dim, img_shape)

    forward = VAE.forward


class Autoencoder(VAE):
    """A plain autoencoder: z is the mean, and nothing is sampled. Train it with beta = 0.

    There is no variance to report; with log_var = 0 the "KL" is half the squared length of the mean.
    """

    def forward(self, x):
        mean, _ = self.encoder(x)
        x_pred = self.decoder(mean)
        return x_pred, mean, torch.zeros_like(mean)


class ConvAutoencoder(ConvVAE):
    """The plain autoencoder with convolutional networks."""

    forward = Autoencoder.forward


def reconstruction_loss(x_pred, x):
    """Binary cross-entropy of x_pred against x, both (N, input_dim) in 0..1; nats, summed over the batch.

    With gray targets this is not a log-likelihood, nor the "ELBO" a bound; it is the convention
    of the lab and of most VAE code on MNIST.
    """
    return F.binary_cross_entropy(x_pred, x, reduction="sum")


def kl_divergence(mean, log_var):
    """KL(N(mean, var) || N(0, 1)), nats, summed over the batch (Kingma and Welling, appendix B)."""
    return -0.5 * torch.sum(1 + log_var - mean**2 - log_var.exp())


def train_step(model, optimizer, x, beta):
    """One update on x (N, input_dim); the batch's reconstruction and KL sums, detached, on the device."""
    x_pred, mean, log_var = model(x)
    reconstruction = reconstruction_loss(x_pred, x)
    kl = kl_divergence(mean, log_var)
    loss = reconstruction + beta * kl

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return reconstruction.detach(), kl.detach()


def flat_images(batch, device):
    """The images of a batch, or of an (images, labels) pair, on the device as rows (N, input_dim)."""
    x = batch[0] if isinstance(batch, (list, tuple)) else batch
    return x.to(device).flatten(1)


def train_epoch(model, optimizer, batches, beta, step=train_step):
    """One pass over the batches; mean reconstruction, KL and loss, in nats per image."""
    device = next(model.parameters()).device
    sums, images = torch.zeros(2, device=device), 0
    model.train()
    for batch in batches:
        x = flat_images(batch, device)
        sums += torch.stack(step(model, optimizer, x, beta))
        images += len(x)
    reconstruction, kl = (sums / images).tolist()  # the only wait for the device in an epoch
    return reconstruction, kl, reconstruction + beta * kl


@torch.no_grad()
def evaluate(model, batches, beta):
    """Mean reconstruction, KL and loss in nats per image, with z sampled as in training."""
    device = next(model.parameters()).device
    sums, images = torch.zeros(2, device=device), 0
    model.eval()
    for batch in batches:
        x = flat_images(batch, device)
        x_pred, mean, log_var = model(x)
        sums += torch.stack([reconstruction_loss(x_pred, x), kl_divergence(mean, log_var)])
        images += len(x)
    reconstruction, kl = (sums / images).tolist()
    return reconstruction, kl, reconstruction + beta * kl


# === Script ===
# Options, data, progress and files. None of it is needed to train in a notebook.

import math
import sys
import time

import common

COLUMNS = [f"{split}/{name}" for split in ("train", "val") for name in ("reconstruction_loss", "kl_loss", "loss")]
CURVES = {
    "reconstruction, nats per image": ["train/reconstruction_loss", "val/reconstruction_loss"],
    "KL divergence, nats per image": ["train/kl_loss", "val/kl_loss"],
    "loss = reconstruction + beta KL": ["train/loss", "val/loss"],
}


def new_parser():
    parser = common.new_parser("vae.py", __doc__)
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--arch", choices=["fc", "conv"], default="fc", help="fully connected or convolutional (default: fc)")
    add("--hidden-dim", type=common.count, default=512, metavar="N", help="width of the layers (default: 512)")
    add("--latent-dim", type=common.count, default=128, metavar="N", help="size of z (default: 128)")
    loss = group.add_mutually_exclusive_group()
    beta = common.between(float, 0)
    loss.add_argument("--beta", type=beta, default=10.0, metavar="B", help="weight of the KL divergence (default: 10)")
    loss.add_argument("--autoencoder", action="store_true", help="no sampling and no KL divergence (default: a VAE)")
    common.add_training_options(parser, batch_size="1024, on digits 64", lr=1e-3)
    common.add_data_options(parser, "mnist, or digits if it cannot be had", "data", "runs/vae-beta10 and the like")
    return parser


def build(image_shape, arch, autoencoder, hidden_dim, latent_dim):
    """The network that the options ask for, on flat rows of images of that shape."""
    if arch == "conv":
        return (ConvAutoencoder if autoencoder else ConvVAE)(image_shape, hidden_dim, latent_dim)
    input_dim = math.prod(image_shape)
    return (Autoencoder if autoencoder else VAE)(input_dim, hidden_dim, latent_dim, input_dim)


def load(path, device="cpu"):
    """The model of a checkpoint, in eval mode, and its config, of which "image_shape" is a part.

    path is a run, a checkpoint, or a Lightning checkpoint of the lab, whose sizes are read off its
    tensors. Raises common.Error if it is none of these.
    """
    checkpoint = common.load_checkpoint(path, "vae", device)
    config = {"dataset": "mnist", "arch": "fc", "autoencoder": False, **checkpoint["config"]}
    weights = checkpoint["state_dict"]
    try:
        config["latent_dim"], config["hidden_dim"] = weights["encoder.mean.weight"].shape
        if "image_shape" in checkpoint:
            config["image_shape"] = tuple(checkpoint["image_shape"])
        else:
            input_dim = weights["encoder.backbone.0.weight"].shape[1]
            channels = 1 if math.isqrt(input_dim) ** 2 == input_dim else 3
            side = math.isqrt(input_dim // channels)
            config["image_shape"] = (channels, side, side)
        sizes = {name: config[name] for name in ("image_shape", "arch", "autoencoder", "hidden_dim", "latent_dim")}
        model = build(**sizes)
        model.load_state_dict(weights)
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError):
        raise common.Error(f"{path}: its tensors are not those of a VAE of this project or of the lab", 2) from None
    return model.to(device).eval(), config


@common.one_line_errors("vae.py")
def main(argv=None):
    options, checkpoint = common.parse_training_options(new_parser(), argv, "vae")
    device = common.set_up(options)
    if options.autoencoder:
        options.beta = 0.0

    data = common.load_dataset(options.dataset, options.data)
    options.dataset = data.name
    options.batch_size = options.batch_size or (64 if data.name == "digits" else 1024)
    train_images, test_images = data.train[: options.subset].to(device), data.test.to(device)
    image_shape = tuple(train_images.shape[1:])

    model = build(image_shape, options.arch, options.autoencoder, options.hidden_dim, options.latent_dim)
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # pixel by pixel in memory: quicker to convolve
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    if options.bf16:
        for network in (model.encoder, model.decoder):
            network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)

    run_name = "vae-conv" if options.arch == "conv" else "vae"
    run_name += "-autoencoder" if options.autoencoder else f"-beta{options.beta:g}"
    run_name += "" if data.name == "mnist" else f"-{data.name}"
    x = test_images[:50].flatten(1) / 255
    z = common.fixed_codes(50, options.latent_dim, options.seed).to(device)
    with common.Run("vae.py", run_name, options, image_shape, model, [optimizer], CURVES, checkpoint) as run:
        for epoch in run.epochs():
            start = time.perf_counter()
            batches = run.progress(common.batches(train_images, options.batch_size, shuffle=True), len(train_images))
            train_losses = train_epoch(model, optimizer, batches, options.beta)
            images_per_second = len(train_images) / (time.perf_counter() - start)
            val_losses = evaluate(model, common.batches(test_images, options.batch_size), options.beta)

            with torch.no_grad():
                mean, log_var = model.encoder(x)
                x_pred = model.decoder(mean)
                run.save_epoch_grid("reconstructions", common.pairs(x, x_pred).unflatten(1, image_shape))
                run.save_epoch_grid("samples", model.decoder(z).unflatten(1, image_shape))
            losses = dict(zip(COLUMNS, train_losses + val_losses))
            reconstruction, kl, loss = val_losses
            equation = f"test {reconstruction:.2f} + {options.beta:g} * {kl:.2f} = {loss:.2f}"
            run.end_epoch(images_per_second, losses, f"train {train_losses[2]:.2f}, {equation}")
    if data.warning:
        print(data.warning, file=sys.stderr)


if __name__ == "__main__":
    main()
