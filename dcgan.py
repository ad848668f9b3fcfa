"""Deep Convolutional GAN (Radford et al., 2015) on MNIST, in plain PyTorch.

A generator G turns noise z ~ N(0, 1) into images, a discriminator D tells them from real ones,
and each is trained against the other:

    L_G = -mean log D(G(z))                                        (non-saturating)
    L_D = -1/2 mean [log D(x) + log(1 - D(G(z)))]

    python dcgan.py --epochs 150                       # the lab's run
    python dcgan.py --epochs 14 --bf16                 # enough to see digits, without a GPU
    python dcgan.py --dataset cifar100 --epochs 50     # three channels

Everything above the line "=== Script" needs only torch: paste it into a notebook cell, and train
with a DataLoader of your own.
"""

import torch
import torch.nn.functional as F
from torch import nn


class UpsampleConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2) and a 3x3 convolution of padding 1, in one: (N, C, H, W) -> (N, D, 2H, 2W).

    Upsampling repeats each pixel in a 2x2 block, so of the nine pixels under a 3x3 window at most
    four differ. Adding up beforehand the weights that meet the same pixel leaves one transposed
    convolution of stride 2 with a 4x4 kernel: the same numbers for 16/36 of the multiplications,
    and the enlarged maps are never made. The parameters stay those of the 3x3 convolution.
    """

    def forward(self, x):
        kernel = self.weight.flip(2, 3)  # (D, C, 3, 3); transposing will mirror it back
        kernel = F.pad(kernel, (0, 0, 1, 0)) + F.pad(kernel, (0, 0, 0, 1))  # a pixel fills two rows: (D, C, 4, 3)
        kernel = F.pad(kernel, (1, 0)) + F.pad(kernel, (0, 1))  # and two columns: (D, C, 4, 4)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # pixel by pixel in memory: quicker to convolve
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, *img_shape), in 0..1."""

    def __init__(self, latent_dim, img_shape):
        super().__init__()
        self.latent_dim = latent_dim
        self.init_size = img_shape[1] // 4  # two doublings lead to the image's size
        self.l1 = nn.Sequential(nn.Linear(latent_dim, 128 * self.init_size**2))
        # The lab writes BatchNorm2d(n, 0.8), as much DCGAN code does: momentum was meant, but the second
        # argument is eps. We keep it, named: it damps the normalisation, and the lab's weights expect it.
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Identity(),  # the lab's nn.Upsample, now inside the convolution
            UpsampleConv2d(128, 128, 3, padding=1),  # 8x8 -> 16x16
            nn.BatchNorm2d(128, eps=0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Identity(),
            UpsampleConv2d(128, 64, 3, padding=1),  # 16x16 -> 32x32
            nn.BatchNorm2d(64, eps=0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, img_shape[0], 3, padding=1),
        )

    def forward(self, z):
        h = self.l1(z).view(-1, 128, self.init_size, self.init_size)
        return torch.sigmoid(self.conv_blocks(h).to(z.dtype))


class Discriminator(nn.Module):
    """images (N, *img_shape) -> the probability that each is real, (N, 1)."""

    def __init__(self, img_shape):
        super().__init__()

        def block(in_features, out_features):
            return [
                nn.Conv2d(in_features, out_features, 3, stride=2, padding=1),  # halves the map
                nn.LeakyReLU(0.2, inplace=True),
                nn.Dropout2d(0.25),
            ]

        self.model = nn.Sequential(
            *block(img_shape[0], 16),  # no batch norm on the images themselves
            *block(16, 32),
            nn.BatchNorm2d(32, eps=0.8),
            *block(32, 64),
            nn.BatchNorm2d(64, eps=0.8),
            *block(64, 128),
            nn.BatchNorm2d(128, eps=0.8),
        )
        self.adv_layer = nn.Sequential(nn.Linear(128 * (img_shape[1] // 16) ** 2, 1))

    def forward(self, images):
        h = self.model(images).flatten(1)
        logit = self.adv_layer(h).to(images.dtype)  # a sigmoid in bf16 would be 1 from a logit of 6 on
        return torch.sigmoid(logit)


def generator_loss(fake_score):
    """-mean log D(G(z)): small when the discriminator takes the fakes, fake_score (N, 1), for real."""
    return F.binary_cross_entropy(fake_score, torch.ones_like(fake_score))


def discriminator_loss(real_score, fake_score):
    """-1/2 mean [log D(x) + log(1 - D(G(z)))]: small when both scores, (N, 1), are right."""
    real_loss = F.binary_cross_entropy(real_score, torch.ones_like(real_score))
    fake_loss = F.binary_cross_entropy(fake_score, torch.zeros_like(fake_score))
    return (real_loss + fake_loss) / 2


def train_step(generator, discriminator, optimizer_g, optimizer_d, images, z):
    """One update of each network; g_loss, d_loss, real_acc and fake_acc, detached, on the device."""
    # 1. The generator moves to where the discriminator says "real".
    fake_images = generator(z)
    g_loss = generator_loss(discriminator(fake_images))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()

    # 2. The discriminator learns to tell the same fakes from real images. Detached: its loss stops
    #    at the images and never reaches the generator that made them.
    real_score = discriminator(images)
    fake_score = discriminator(fake_images.detach())
    d_loss = discriminator_loss(real_score, fake_score)
    optimizer_d.zero_grad()  # also forgets what step 1 left in the discriminator
    d_loss.backward()
    optimizer_d.step()

    real_acc = (real_score > 0.5).float().mean()
    fake_acc = (fake_score <= 0.5).float().mean()
    return g_loss.detach(), d_loss.detach(), real_acc, fake_acc


def train_epoch(generator, discriminator, optimizer_g, optimizer_d, batches, step=train_step):
    """One pass over the batches of images, or (images, labels) pairs; means of what the step returns."""
    device = next(generator.parameters()).device
    sums, n = torch.zeros(4, device=device), 0
    generator.train()
    discriminator.train()
    for batch in batches:
        images = batch[0] if isinstance(batch, (list, tuple)) else batch
        images = images.to(device)
        z = torch.randn(len(images), generator.latent_dim, device=device)
        losses = step(generator, discriminator, optimizer_g, optimizer_d, images, z)
        sums += len(images) * torch.stack(losses)
        n += len(images)
    return (sums / n).tolist()  # the only wait for the device in an epoch


# === Script ===
# Options, data, progress and files. None of it is needed to train in a notebook.

import math
import sys
import time

import common

CURVES = {
    "binary cross-entropy, nats": ["generator/loss", "discriminator/loss"],
    "accuracy of the discriminator": [f"discriminator/{part}_acc" for part in ("real", "fake", "overall")],
}


def new_parser():
    parser = common.new_parser("dcgan.py", __doc__)
    add = parser.add_argument_group("model and optimizers").add_argument
    beta = common.between(float, 0, 0.999999)
    add("--latent-dim", type=common.count, default=100, metavar="N", help="size of z (default: 100)")
    add("--b1", type=beta, default=0.5, metavar="B", help="Adam's first beta (default: 0.5)")
    add("--b2", type=beta, default=0.999, metavar="B", help="Adam's second beta (default: 0.999)")
    common.add_training_options(parser, batch_size="64", lr=2e-4)
    common.add_data_options(parser, "mnist, or digits if it cannot be had", "data", "runs/dcgan and the like")
    return parser


def load(path, device="cpu"):
    """Generator and discriminator of a checkpoint, in eval mode, and its config, "image_shape" included.

    The two are the "generator" and the "discriminator" of one nn.ModuleDict. path is a run, a
    checkpoint, or a Lightning checkpoint of the lab, whose sizes are read off its tensors. Raises
    common.Error if it is none of these.
    """
    checkpoint = common.load_checkpoint(path, "dcgan", device)
    weights = checkpoint["state_dict"]
    try:
        features, latent_dim = weights["generator.l1.0.weight"].shape
        channels = weights["discriminator.model.0.weight"].shape[1]
        side = 4 * math.isqrt(features // 128)
        image_shape = (channels, side, side)
        model = build(image_shape, latent_dim)
        model.load_state_dict(weights)
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError):
        raise common.Error(f"{path}: its tensors are not those of a DCGAN of this project or of the lab", 2) from None
    config = {"dataset": "mnist", **checkpoint["config"], "latent_dim": latent_dim, "image_shape": image_shape}
    return model.to(device).eval(), config


def build(image_shape, latent_dim):
    """Both networks under the names of the lab."""
    return nn.ModuleDict({"generator": Generator(latent_dim, image_shape), "discriminator": Discriminator(image_shape)})


@common.one_line_errors("dcgan.py")
def main(argv=None):
    options, checkpoint = common.parse_training_options(new_parser(), argv, "dcgan")
    device = common.set_up(options)

    data = common.load_dataset(options.dataset, options.data, size=32)
    options.dataset = data.name
    options.batch_size = options.batch_size or 64
    images = data.train[: options.subset].to(device)
    image_shape = tuple(images.shape[1:])

    model = build(image_shape, options.latent_dim).to(device)
    generator, discriminator = model["generator"], model["discriminator"]
    optimizer_g, optimizer_d = (
        torch.optim.Adam(network.parameters(), lr=options.lr, betas=(options.b1, options.b2), fused=True)
        for network in (generator, discriminator)
    )
    if options.bf16:
        for network in (generator, discriminator):
            network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)

    name = "dcgan" if data.name == "mnist" else f"dcgan-{data.name}"
    validation_z = common.fixed_codes(50, options.latent_dim, options.seed).to(device)
    optimizers = [optimizer_g, optimizer_d]
    with common.Run("dcgan.py", name, options, image_shape, model, optimizers, CURVES, checkpoint) as run:
        for epoch in run.epochs():
            start = time.perf_counter()
            batches = run.progress(common.batches(images, options.batch_size, shuffle=True), len(images))
            means = train_epoch(generator, discriminator, optimizer_g, optimizer_d, batches)
            images_per_second = len(images) / (time.perf_counter() - start)

            generator.eval()
            with torch.no_grad():
                run.save_epoch_grid("samples", generator(validation_z))
            g_loss, d_loss, real_acc, fake_acc = means
            losses = {
                "generator/loss": g_loss,
                "discriminator/loss": d_loss,
                "discriminator/real_acc": real_acc,
                "discriminator/fake_acc": fake_acc,
                "discriminator/overall_acc": (real_acc + fake_acc) / 2,
            }
            text = f"G {g_loss:.3f}, D {d_loss:.3f}, accuracy on real {real_acc:.0%}, on fake {fake_acc:.0%}"
            run.end_epoch(images_per_second, losses, text)
    if data.warning:
        print(data.warning, file=sys.stderr)


if __name__ == "__main__":
    main()
