"""Deep Convolutional GAN (Radford et al., 2015) on MNIST, in plain PyTorch.

A generator G turns noise z ~ N(0, 1) into images, a discriminator D learns to tell them from real
images x, and each is trained against the other. They minimise

    L_G = -mean log D(G(z))                                        (non-saturating)
    L_D = -1/2 mean [log D(x) + log(1 - D(G(z)))]

    python dcgan.py --epochs 150                       # the lab's run
    python dcgan.py --epochs 10                        # enough to see digits, without a GPU
    python dcgan.py --dataset cifar100 --epochs 50     # three channels

Everything above the line "=== Script" needs only torch and can be pasted into a notebook.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Generator(nn.Module):
    """Noise z (N, latent_dim) -> images (N, *img_shape), in 0..1; img_shape is (C, H, W) with H = W."""

    def __init__(self, latent_dim, img_shape):
        super().__init__()
        self.init_size = img_shape[1] // 4  # doubled twice below
        self.l1 = nn.Sequential(nn.Linear(latent_dim, 128 * self.init_size**2))
        # The lab writes BatchNorm2d(n, 0.8), as much DCGAN code does. A momentum was probably meant, but the
        # second argument is eps. It is kept, by its name, because the lab's trained weights depend on it.
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
    """Images (N, *img_shape) -> the probability that each is real, (N, 1); H and W are multiples of 16."""

    def __init__(self, img_shape):
        super().__init__()

        def block(in_channels, out_channels):
            return [
                nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Dropout2d(0.25),
            ]

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
        h = self.model(images).flatten(1)
        return self.adv_layer(h)


def generator_loss(fake_score):
    """-mean log D(G(z)) for fake_score = D(G(z)) (N, 1), in nats: small when D takes the fakes for real."""
    return F.binary_cross_entropy(fake_score, torch.ones_like(fake_score))


def discriminator_loss(real_score, fake_score):
    """-1/2 mean [log D(x) + log(1 - D(G(z)))] for the two scores (N, 1), in nats: small when D is right."""
    real_loss = F.binary_cross_entropy(real_score, torch.ones_like(real_score))
    fake_loss = F.binary_cross_entropy(fake_score, torch.zeros_like(fake_score))
    return (real_loss + fake_loss) / 2


def gan_step(generator, discriminator, optimizer_g, optimizer_d, images, z):
    """One update of each network on real images (N, C, H, W) and noise z (N, latent_dim).

    Returns g_loss, d_loss, real_acc and fake_acc, detached, on the device. Raises ValueError if the images
    are not of the generator's shape, which the discriminator would not notice.
    """
    fake_images = generator(z)
    if images.shape[1:] != fake_images.shape[1:]:
        raise ValueError(f"the images are {tuple(images.shape[1:])}, the generator's {tuple(fake_images.shape[1:])}")

    # (1) Update G: minimise -mean log D(G(z))
    g_loss = generator_loss(discriminator(fake_images))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()

    # (2) Update D: minimise -1/2 mean [log D(x) + log(1 - D(G(z)))]
    real_score = discriminator(images)
    fake_score = discriminator(fake_images.detach())  # detached: no gradient reaches the generator
    d_loss = discriminator_loss(real_score, fake_score)
    optimizer_d.zero_grad()  # also clears the gradients that (1) left in D
    d_loss.backward()
    optimizer_d.step()

    real_acc = (real_score > 0.5).float().mean()
    fake_acc = (fake_score <= 0.5).float().mean()
    return g_loss.detach(), d_loss.detach(), real_acc, fake_acc


# === Script ===
# Speed, options, data and files. None of it is needed in a notebook.

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

COLUMNS = ["generator/loss", *(f"discriminator/{name}" for name in ("loss", "real_acc", "fake_acc", "overall_acc"))]
CURVES = {"binary cross-entropy, nats": COLUMNS[:2], "accuracy of the discriminator": COLUMNS[2:]}


class UpsampleConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2) and a 3x3 convolution in one: (N, C, H, W) -> (N, D, 2H, 2W).

    Upsampling repeats each pixel in a 2x2 block, so at most four of the nine pixels under a 3x3 window differ.
    With the weights that meet the same pixel added up, what remains is a transposed convolution of stride 2 with
    a 4x4 kernel: the same numbers for 16/36 of the multiplications. The parameters stay those of the 3x3 one.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x):
        kernel = self.weight.flip(2, 3)  # (D, C, 3, 3); the transposed convolution mirrors it back
        kernel = F.pad(kernel, (0, 0, 1, 0)) + F.pad(kernel, (0, 0, 0, 1))  # a pixel fills two rows: (D, C, 4, 3)
        kernel = F.pad(kernel, (1, 0)) + F.pad(kernel, (0, 1))  # and two columns: (D, C, 4, 4)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # all channels of a pixel together: faster
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


def fuse_upsampling(generator):
    """Replace, in place, each nn.Upsample and the nn.Conv2d after it by one UpsampleConv2d with its parameters."""
    layers = generator.conv_blocks
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Upsample):
            conv = layers[i + 1]
            with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
                fused = UpsampleConv2d(conv.in_channels, conv.out_channels)
            fused.weight, fused.bias = conv.weight, conv.bias
            layers[i], layers[i + 1] = nn.Identity(), fused


def parse_options(argv):
    """The options and, with --resume, the checkpoint of that run, whose options are then the defaults."""
    parser = ArgumentParser("dcgan.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    folder = parser.add_mutually_exclusive_group()
    parser.add_argument("--latent-dim", type=between(int, 1), default=100, help="dimensions of z (default: 100)")
    parser.add_argument("--b1", type=between(float, 0, 1), default=0.5, help="Adam's first beta (default: 0.5)")
    parser.add_argument("--b2", type=between(float, 0, 1), default=0.999, help="Adam's second beta (default: 0.999)")
    parser.add_argument("--epochs", type=between(int, 1), default=150, help="passes over the images (default: 150)")
    parser.add_argument("--batch-size", type=between(int, 1), default=64, help="images per step (default: 64)")
    parser.add_argument("--lr", type=between(float, 1e-12), default=2e-4, help="Adam's learning rate (default: 0.0002)")
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
        if checkpoint.get("model") != "dcgan" or not checkpoint.keys() >= {"config", "metrics", "steps"}:
            raise common.Error(f"{options.resume} is not a run of dcgan.py that could be resumed")
        parser.set_defaults(**checkpoint["config"])
        options = parser.parse_args(argv)
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs a package that is not installed: pip install tensorboard")
    return options, checkpoint


def build(image_shape, latent_dim):
    """Both networks, under the lab's names; the generator's upsampling is fused."""
    model = nn.ModuleDict(
        {"generator": Generator(latent_dim, image_shape), "discriminator": Discriminator(image_shape)}
    )
    fuse_upsampling(model["generator"])
    return model


def load(path, device="cpu"):
    """The networks of a run or a checkpoint, in eval mode, and its config, with "image_shape" in it.

    They are the "generator" and the "discriminator" of one nn.ModuleDict. The sizes of weights without a config,
    such as the lab's, are read off the tensors. Raises common.Error.
    """
    checkpoint = common.load_checkpoint(path, device)
    weights = checkpoint["state_dict"]
    if checkpoint.get("model") == "dcgan" and "config" in checkpoint:
        config = {**checkpoint["config"], "image_shape": tuple(checkpoint["image_shape"])}
    elif "generator.l1.0.weight" in weights and "discriminator.model.0.weight" in weights:
        features, latent_dim = weights["generator.l1.0.weight"].shape
        side, channels = 4 * math.isqrt(features // 128), weights["discriminator.model.0.weight"].shape[1]
        config = {"latent_dim": latent_dim, "image_shape": (channels, side, side)}
    else:
        raise common.Error(f"{path} is neither a run of dcgan.py nor weights of the lab's DCGAN")
    model = build(config["image_shape"], config["latent_dim"]).to(device)
    common.restore(path, checkpoint, model)
    return model.eval(), config


def main(argv=None):
    options, checkpoint = parse_options(argv)
    device = common.pick_device(options.device)
    options.bf16 = options.bf16 and common.bf16_pays(device)
    torch.manual_seed(options.seed)

    data = common.load_dataset(options.dataset, options.data, size=32)
    images = data.train[: options.subset].to(device)
    n, image_shape = len(images), tuple(images.shape[1:])
    options.dataset = data.name

    model = build(image_shape, options.latent_dim).to(device)
    generator, discriminator = model["generator"], model["discriminator"]
    adam = {"lr": options.lr, "betas": (options.b1, options.b2), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    if options.bf16:
        for network, logits in ((generator, generator.conv_blocks[-2]), (discriminator, discriminator.adv_layer[0])):
            network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
            logits.register_forward_hook(lambda layer, inputs, output: output.float())  # the sigmoid needs float32
    # Binary cross-entropy aborts on nan, on CUDA with the whole process. check_finite names the cause instead.
    discriminator.register_forward_hook(lambda network, inputs, score: score.nan_to_num(0.5))

    rng = torch if device.type == "cpu" else torch.get_device_module(device)  # holds the state of randn and the like
    if checkpoint:
        folder, rows, steps = Path(options.resume), checkpoint["metrics"], checkpoint["steps"]
        common.restore(folder, checkpoint, model, [optimizer_g, optimizer_d])
        if options.seed == checkpoint["config"]["seed"] and device.type in checkpoint["random_states"]:
            rng.set_rng_state(checkpoint["random_states"][device.type])
    else:
        folder = common.new_folder(options.out, "dcgan" if data.name == "mnist" else f"dcgan-{data.name}")
        rows, steps = [], torch.empty(0, 4)  # the numbers of every epoch and of every step
    with common.whole_file(folder / "config.json") as file:
        file.write(json.dumps({"model": "dcgan", **vars(options)}, indent=2).encode())
    if options.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(folder, purge_step=len(steps) + 1)

    # Fixed codes for the pictures, from a generator of their own: drawing them does not change the training.
    validation_z = torch.randn(50, options.latent_dim, generator=torch.Generator().manual_seed(options.seed)).to(device)

    print(f"{folder}: {n:,} images of {data.name} on {device}, {len(rows)} of {options.epochs} epochs done")
    print("    epoch  images/s  time left    G loss    D loss  real acc  fake acc")
    saved_at = -math.inf
    try:
        for epoch in range(len(rows) + 1, options.epochs + 1):
            start = time.perf_counter()
            model.train()
            sums, numbers = torch.zeros(4, device=device), []
            batches = common.batches(images, options.batch_size, shuffle=True)
            count = math.ceil(n / options.batch_size)
            for x in tqdm(batches, f"epoch {epoch}", count, leave=False, delay=2, disable=common.NO_BAR):
                z = torch.randn(len(x), options.latent_dim, device=device)
                numbers.append(torch.stack(gan_step(generator, discriminator, optimizer_g, optimizer_d, x, z)))
                sums += len(x) * numbers[-1]
            g_loss, d_loss, real_acc, fake_acc = (sums / n).tolist()  # the training pass's only wait
            speed = n / (time.perf_counter() - start)
            numbers = torch.stack(numbers).cpu()

            generator.eval()
            with torch.no_grad():
                samples = generator(validation_z)
            grid = common.save_grid(folder / f"images/epoch_{epoch:03d}_samples.png", samples)

            seconds = time.perf_counter() - start
            row = {"epoch": epoch, "seconds": round(seconds, 3), "images_per_second": round(speed)}
            row.update(zip(COLUMNS, [g_loss, d_loss, real_acc, fake_acc, (real_acc + fake_acc) / 2]))
            common.check_finite(model.state_dict() | row)
            rows.append(row)
            steps = torch.cat([steps, numbers])
            common.save_metrics(folder / "metrics.csv", rows)
            if options.tensorboard:
                for step, values in enumerate(numbers.tolist(), start=len(steps) - len(numbers) + 1):
                    for name, value in zip(COLUMNS, [*values, (values[2] + values[3]) / 2]):
                        board.add_scalar(name, value, step)
                board.add_image("samples", grid, len(steps))
                board.flush()
            if epoch == options.epochs or time.perf_counter() - saved_at > common.SAVE_EVERY:
                checkpoint = {
                    "model": "dcgan",
                    "config": vars(options),
                    "image_shape": image_shape,
                    "state_dict": model.state_dict(),
                    "optimizers": [optimizer_g.state_dict(), optimizer_d.state_dict()],
                    "epoch": epoch,
                    "metrics": rows,
                    "steps": steps,
                    "random_states": {device.type: rng.get_rng_state()},
                }
                common.save_checkpoint(folder / "checkpoint.pt", checkpoint)
                saved_at = time.perf_counter()

            left = timedelta(seconds=round(seconds * (options.epochs - epoch)))
            line = f"{epoch:>5}/{options.epochs:<3} {speed:9,.0f} {left!s:>10} {g_loss:9.3f} {d_loss:9.3f}"
            print(f"{line} {real_acc:9.1%} {fake_acc:9.1%}", flush=True)
    except KeyboardInterrupt:
        saved = (folder / "checkpoint.pt").exists()
        way_back = f"go on with: python dcgan.py --resume {shlex.quote(folder.as_posix())}"
        raise KeyboardInterrupt(f"interrupted; {way_back if saved else 'nothing was saved yet'}") from None
    finally:
        if rows:
            common.save_curves(folder / "losses.png", rows, CURVES, dict(zip(COLUMNS, steps.T.numpy())))
    print(f"{folder}/: checkpoint.pt, metrics.csv, losses.png, images/")
    print(f"next: python sample.py {shlex.quote(folder.as_posix())}")


if __name__ == "__main__":
    common.run_script(main)
