"""Deep Convolutional GAN (Radford et al., 2015) on MNIST, in plain PyTorch.

A generator G turns noise z ~ N(0, 1) into images, a discriminator D learns to tell them from real
images x, and each is trained against the other. They minimize

    L_G = -mean log D(G(z))                                        (non-saturating)
    L_D = -1/2 mean [log D(x) + log(1 - D(G(z)))]

    python dcgan.py --epochs 150                       # the lab's run
    python dcgan.py --epochs 10                        # enough to see digits, without a GPU
    python dcgan.py --dataset cifar100 --epochs 20     # three channels

Everything above the line "=== Script" needs only torch and can be pasted into a notebook.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Generator(nn.Module):
    """Noise z (N, latent_dim) -> images (N, *img_shape), in 0..1; img_shape is (C, H, W), H = W, a multiple of 4."""

    def __init__(self, latent_dim, img_shape):
        super().__init__()
        self.init_size = img_shape[1] // 4  # doubled twice below
        self.l1 = nn.Sequential(nn.Linear(latent_dim, 128 * self.init_size**2))
        # eps=0.8: see Discriminator. It hardly matters here, where the variances become about 10.
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),  # 8x8 -> 16x16
            nn.Conv2d(128, 128, 3, padding=1),
            nn.BatchNorm2d(128, eps=0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),  # 16x16 -> 32x32
            nn.Conv2d(128, 64, 3, padding=1),
            nn.BatchNorm2d(64, eps=0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, img_shape[0], 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z):
        h = self.l1(z).view(-1, 128, self.init_size, self.init_size)
        return self.conv_blocks(h)


class Discriminator(nn.Module):
    """Images (N, *img_shape) -> the probability that each is real, (N, 1); H = W, a multiple of 16.

    Raises ValueError for images of another shape.
    """

    def __init__(self, img_shape):
        super().__init__()
        self.img_shape = tuple(img_shape)

        def block(in_channels, out_channels):
            return [
                nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Dropout2d(0.25),
            ]

        # The lab writes BatchNorm2d(n, 0.8), as many DCGAN implementations do. The second argument is eps, though a
        # momentum was probably meant. It is larger than the variances that it is added to (about 0.1 after three
        # epochs), so these norms center, and hardly scale. Kept because the lab's trained weights depend on it.
        self.model = nn.Sequential(
            *block(img_shape[0], 16),  # no batch norm in the first block
            *block(16, 32),
            nn.BatchNorm2d(32, eps=0.8),
            *block(32, 64),
            nn.BatchNorm2d(64, eps=0.8),
            *block(64, 128),
            nn.BatchNorm2d(128, eps=0.8),
        )
        ds_size = img_shape[1] // 2**4  # each of the four blocks halves it
        self.adv_layer = nn.Sequential(nn.Linear(128 * ds_size**2, 1), nn.Sigmoid())

    def forward(self, images):
        if images.shape[1:] != self.img_shape:  # 28x28 would pass through the layers of 32x32
            raise ValueError(f"the images are {tuple(images.shape[1:])}, this discriminator is for {self.img_shape}")
        h = self.model(images).flatten(1)
        return self.adv_layer(h)


def generator_loss(fake_score):
    """-mean log D(G(z)) for fake_score = D(G(z)) (N, 1), in nats: small when D takes the fakes for real.

    This is the non-saturating loss (Goodfellow et al., 2014, section 3).
    """
    return F.binary_cross_entropy(fake_score, torch.ones_like(fake_score))


def discriminator_loss(real_score, fake_score):
    """-1/2 mean [log D(x) + log(1 - D(G(z)))] for the two scores (N, 1), in nats: small when D is right."""
    real_loss = F.binary_cross_entropy(real_score, torch.ones_like(real_score))
    fake_loss = F.binary_cross_entropy(fake_score, torch.zeros_like(fake_score))
    return (real_loss + fake_loss) / 2


def train_dcgan(generator, discriminator, optimizer_g, optimizer_d, batches, latent_dim):
    """Train both networks for one epoch: on each batch an update of G, then one of D on the same fake images.

    A batch is a pair, as a DataLoader gives it: images in 0..1, (N, C, H, W), and labels, which are not used.
    Random numbers are drawn in this order: z, then D's dropout for G(z), for x, and for G(z) again.
    Returns g_loss, d_loss, and the accuracies of D on real images (score > 0.5) and on fakes (score <= 0.5) at every
    step: (steps, 4), on the CPU.
    """
    device = next(generator.parameters()).device
    steps = []

    generator.train()
    discriminator.train()
    for images, _ in batches:
        x = images.to(device)
        z = torch.randn(len(x), latent_dim, device=device)
        fake_images = generator(z)

        # (1) Update G: minimize -mean log D(G(z))
        g_loss = generator_loss(discriminator(fake_images))
        optimizer_g.zero_grad()
        g_loss.backward()
        optimizer_g.step()

        # (2) Update D: minimize -1/2 mean [log D(x) + log(1 - D(G(z)))]. The fakes are detached: G is held fixed
        # here, and g_loss.backward() has freed the graph that leads back to it.
        real_score = discriminator(x)
        fake_score = discriminator(fake_images.detach())
        d_loss = discriminator_loss(real_score, fake_score)
        optimizer_d.zero_grad()  # also clears the gradients that (1) left in D
        d_loss.backward()
        optimizer_d.step()

        real_acc = (real_score > 0.5).float().mean()
        fake_acc = (fake_score <= 0.5).float().mean()
        steps.append(torch.stack([g_loss.detach(), d_loss.detach(), real_acc, fake_acc]))

    return torch.stack(steps).cpu()  # the only synchronization of this epoch


# === Script ===
# Options, images, speed, pictures and files. None of it is needed in a notebook.

import math
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from datetime import timedelta
from os.path import expanduser
from pathlib import Path

import common

SCRIPT = Path(__file__).name  # a copy, my_dcgan.py, names its runs after itself
MAY_CHANGE = {"epochs", "lr", "data", "device", "bf16", "tensorboard", "out", "resume"}  # of a resumed run


def upsample_conv(x, conv):
    """conv(nn.Upsample(scale_factor=2)(x)) for a 3x3 convolution, zero padding of 1: (N, C, H, W) -> (N, D, 2H, 2W).

    In one dimension, with pixels p, q, r, each repeated by the upsampling, and a kernel (a, b, c):

        p p q q r r
          a b c              left q:   a p + (b + c) q
            a b c            right q:  (a + b) q + c r

    So q is multiplied by c, b + c, a + b and a in the four results that it is part of. That is a transposed convolution
    of stride 2, whose kernel has 4 entries, or 4x4 in two dimensions: 16/36 of the multiplications.
    """
    kernel = conv.weight.flip(2, 3)  # (D, C, 3, 3), each row (c, b, a)
    kernel = F.pad(kernel, (0, 0, 1, 0)) + F.pad(kernel, (0, 0, 0, 1))  # add up along the columns: (D, C, 4, 3)
    kernel = F.pad(kernel, (1, 0)) + F.pad(kernel, (0, 1))  # and along the rows: (D, C, 4, 4)
    kernel = kernel.transpose(0, 1).contiguous()  # MPS had errors with strided weights
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)  # all channels of a pixel together: faster
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def is_upsample_conv(upsample, conv):
    """Whether two layers are what upsample_conv computes, with no other setting."""
    if not isinstance(upsample, nn.Upsample) or not isinstance(conv, nn.Conv2d):
        return False
    settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    plain = settings == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return plain and upsample.scale_factor == 2 and upsample.mode == "nearest"


class FastGenerator(Generator):
    """The same layers, weights and images; each upsampling is computed together with the convolution after it."""

    def forward(self, z):
        h = self.l1(z).view(-1, 128, self.init_size, self.init_size)
        layers = list(self.conv_blocks)
        while layers:
            layer = layers.pop(0)
            if layers and is_upsample_conv(layer, layers[0]):
                h = upsample_conv(h, conv=layers.pop(0))
            else:
                h = layer(h)
        return h


def parse_args(argv):
    """The options and, with --resume, the checkpoint of that run, whose options are then the defaults."""
    parser = ArgumentParser(SCRIPT, description=__doc__, formatter_class=common.Help)
    # training
    parser.add_argument("--epochs", type=common.positive, default=150, help="passes over the images")
    parser.add_argument("--batch-size", type=common.positive, default=64, help="images per step")
    parser.add_argument("--latent-dim", type=common.positive, default=100, help="dimensions of z")
    parser.add_argument("--lr", type=float, default=2e-4, help="Adam's learning rate")
    parser.add_argument("--b1", type=float, default=0.5, help="Adam's first beta")
    parser.add_argument("--b2", type=float, default=0.999, help="Adam's second beta")
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
    """The script; data set, latent dimension, subset and seed if they are not the defaults."""
    name = Path(__file__).stem
    if args.dataset != "mnist":
        name += f"-{args.dataset}"
    if args.latent_dim != 100:
        name += f"-z{args.latent_dim}"
    if args.subset:
        name += f"-subset{args.subset}"
    if args.seed:
        name += f"-seed{args.seed}"
    return name


def load(checkpoint, device):
    """The generator of a checkpoint in eval mode, which is also the function from codes to images, and its config."""
    config = Namespace(**checkpoint["config"], epoch=checkpoint["epoch"])
    generator = FastGenerator(config.latent_dim, config.image_shape).to(device)
    weights = checkpoint["state_dict"]
    generator.load_state_dict({name: weights[f"generator.{name}"] for name in generator.state_dict()})
    generator.eval()
    return generator, generator, config


CURVES = {
    "binary cross-entropy, nats": {"generator": "generator/loss", "discriminator": "discriminator/loss"},
    "accuracy of the discriminator": {"real": "discriminator/real_acc", "fake": "discriminator/fake_acc"},
}
LEVELS = {"D cannot tell": [math.log(2), 0.5, math.log(2)]}  # in each panel the value at D = 1/2


def main(argv=None):
    args, checkpoint = parse_args(argv)
    device = common.pick_device(args.device)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.manual_seed(args.seed)

    # the images and their labels, on the device once
    images = common.load_images(args.dataset, args.data, size=32)
    x = images.train[: args.subset].to(device)
    labels = images.train_labels[: args.subset].to(device)
    args.dataset = images.name
    args.image_shape = tuple(images.train.shape[1:])

    # both networks, their optimizers, and the codes that are drawn after every epoch
    generator = FastGenerator(args.latent_dim, args.image_shape).to(device)
    discriminator = Discriminator(args.image_shape).to(device)
    networks = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    fixed_z = torch.randn(50, args.latent_dim).to(device)
    betas = (args.b1, args.b2)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=args.lr, betas=betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=args.lr, betas=betas, fused=True)
    if args.bf16:  # the logits before the sigmoids stay float32
        common.use_bf16(generator, [generator.conv_blocks[-2]])
        common.use_bf16(discriminator, [discriminator.adv_layer[0]])

    # a new run, or one to continue
    if checkpoint:
        run_dir = Path(args.resume)
        rows = checkpoint["metrics"]
        steps = checkpoint["steps"]
        networks.load_state_dict(checkpoint["state_dict"])
        common.load_adam(optimizer_g, checkpoint["optimizer_g"])
        common.load_adam(optimizer_d, checkpoint["optimizer_d"])
    else:
        run_dir = common.new_folder(args.out, run_name(args))
        rows = []
    writer = common.open_writer(run_dir, rows) if args.tensorboard else None
    parameters = sum(parameter.numel() for parameter in networks.parameters())
    print(f"{run_dir}: {len(x):,} images of {images.name}, {parameters:,} parameters on {device}", flush=True)

    try:
        for epoch in range(len(rows) + 1, args.epochs + 1):
            start = time.perf_counter()
            torch.manual_seed(10_000 * args.seed + epoch)  # a resumed run draws the same numbers

            batches = common.batches(x, labels, args.batch_size, shuffle=True)
            steps = train_dcgan(generator, discriminator, optimizer_g, optimizer_d, batches, args.latent_dim)
            g_loss, d_loss, real_acc, fake_acc = steps.mean(0).tolist()

            generator.eval()
            with torch.no_grad():
                grids = {"samples": generator(fixed_z)}

            seconds = time.perf_counter() - start
            row = {
                "epoch": epoch,
                "seconds": round(seconds, 3),
                "generator/loss": g_loss,
                "discriminator/loss": d_loss,
                "discriminator/real_acc": real_acc,
                "discriminator/fake_acc": fake_acc,
                "discriminator/overall_acc": (real_acc + fake_acc) / 2,
            }
            saved = {
                "script": SCRIPT,
                "config": vars(args),
                "state_dict": networks.state_dict(),
                "optimizer_g": optimizer_g.state_dict(),
                "optimizer_d": optimizer_d.state_dict(),
                "steps": steps,
            }
            common.save_epoch(run_dir, [*rows, row], grids, writer, saved)
            rows.append(row)

            left = timedelta(seconds=round(seconds * (args.epochs - epoch)))
            line = f"{epoch:>3}/{args.epochs}: G {g_loss:.3f}, D {d_loss:.3f}"
            print(f"{line}, real {real_acc:.1%}, fake {fake_acc:.1%}, {seconds:.1f} s, {left} left", flush=True)
    except KeyboardInterrupt:
        if not rows:
            sys.exit("interrupted; nothing is saved yet")
        sys.exit(f"interrupted; to continue: python {SCRIPT} --resume {shlex.quote(run_dir.as_posix())}")
    finally:
        if rows:
            last_steps = {"generator": steps[:, 0], "discriminator": steps[:, 1]}
            common.save_curves(run_dir / "losses.png", rows, CURVES, last_steps, LEVELS)
    print(f"next: python sample.py {shlex.quote(run_dir.as_posix())}")


if __name__ == "__main__":
    main()
