"""Deep Convolutional GAN (Radford et al., 2015) on MNIST, in plain PyTorch.

A generator G turns noise z ~ N(0, 1) into images, a discriminator D learns to tell them from real
images x, and each is trained against the other. They minimise

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
# Options, images, speed and files. None of it is needed in a notebook.

import math
import shlex
import shutil
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import timedelta
from pathlib import Path

import common


class UpsampleConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2) and a 3x3 convolution in one: (N, C, H, W) -> (N, D, 2H, 2W).

    Upsampling repeats each pixel in a 2x2 block, so at most four of the nine pixels under a 3x3 window differ.
    With the weights that meet the same pixel added up, as in one dimension (a, b, c) to (a, a + b, b + c, c), what
    remains is a transposed convolution of stride 2 with a 4x4 kernel: the same numbers for 16/36 of the
    multiplications. The parameters stay those of the 3x3 one.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x):
        kernel = self.weight.flip(2, 3)  # (D, C, 3, 3); the transposed convolution mirrors it back
        kernel = F.pad(kernel, (0, 0, 1, 0)) + F.pad(kernel, (0, 0, 0, 1))  # a pixel fills two rows: (D, C, 4, 3)
        kernel = F.pad(kernel, (1, 0)) + F.pad(kernel, (0, 1))  # and two columns: (D, C, 4, 4)
        kernel = kernel.transpose(0, 1).contiguous()  # some releases of MPS read strided weights wrongly
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # all channels of a pixel together: faster
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


def fuse_upsampling(generator):
    """Replace, in place, each nn.Upsample and the nn.Conv2d after it by one UpsampleConv2d with its parameters."""
    layers = generator.conv_blocks
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Upsample):
            conv = layers[i + 1]
            with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
                fused = UpsampleConv2d(conv.in_channels, conv.out_channels)
            fused.weight = conv.weight
            fused.bias = conv.bias
            layers[i] = nn.Identity()
            layers[i + 1] = fused


def parse_options(argv):
    """The options and, with --resume, the checkpoint of that run, whose options become the defaults."""
    parser = ArgumentParser("dcgan.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    # training
    parser.add_argument("--epochs", type=common.count, default=150, help="passes over the images (default: 150)")
    parser.add_argument("--batch-size", type=common.count, default=64, help="images per step (default: 64)")
    parser.add_argument("--latent-dim", type=common.count, default=100, help="dimensions of z (default: 100)")
    parser.add_argument("--lr", type=float, default=2e-4, help="Adam's learning rate (default: 0.0002)")
    parser.add_argument("--b1", type=float, default=0.5, help="Adam's first beta (default: 0.5)")
    parser.add_argument("--b2", type=float, default=0.999, help="Adam's second beta (default: 0.999)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    # images
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="images (default: mnist, or else digits)")
    parser.add_argument("--data", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--subset", type=common.count, help="train on the first SUBSET images (default: all)")
    # device
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: auto, a GPU if any)")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="matrix products in bfloat16; a CPU without instructions for it emulates it and is many times slower"
        " (default: float32, with TF32 products on CUDA)",
    )
    # files
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", help="a new folder for the run (default: one under runs/)")
    folder.add_argument("--resume", metavar="RUN", type=common.run_folder, help="go on with a run (default: a new one)")
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too (default: no)")

    options = parser.parse_args(argv)
    checkpoint = None
    if options.resume:
        checkpoint = common.load_checkpoint(options.resume)
        if checkpoint.get("model") != "dcgan" or "optimizer_g" not in checkpoint:
            raise common.Error(f"{options.resume} is not a run of dcgan.py that can be resumed")
        parser.set_defaults(**checkpoint["config"])
        options = parser.parse_args(argv)  # the run's own, but for what was typed
    return options, checkpoint


def run_name(options):
    """dcgan, with what is not the default: dcgan-cifar100, dcgan-z2, ..."""
    name = "dcgan"
    if options.dataset != "mnist":
        name += f"-{options.dataset}"
    if options.latent_dim != 100:
        name += f"-z{options.latent_dim}"
    return name


def build(image_shape, latent_dim):
    """Both networks, the generator with fused upsampling."""
    generator = Generator(latent_dim, image_shape)
    fuse_upsampling(generator)
    return nn.ModuleDict({"generator": generator, "discriminator": Discriminator(image_shape)})


def load(path, device="cpu"):
    """The networks of a run or a checkpoint, in eval mode, and its config, with "image_shape" in it.

    They are the "generator" and the "discriminator" of one nn.ModuleDict; the latter is missing where only a
    generator's weights were saved. Raises common.Error.
    """
    checkpoint = common.load_checkpoint(path)
    weights = {
        "generator": common.find_weights(checkpoint, "l1.0.weight"),
        "discriminator": common.find_weights(checkpoint, "adv_layer.0.weight"),
    }
    if "conv_blocks.9.bias" not in weights["generator"]:
        names = list(common.tensors(checkpoint))[:10]
        raise common.Error(f"the weights in {path} are not recognised: {names}")
    features, latent_dim = weights["generator"]["l1.0.weight"].shape
    channels = len(weights["generator"]["conv_blocks.9.bias"])
    side = 4 * math.isqrt(features // 128)
    config = checkpoint["config"] if checkpoint.get("model") == "dcgan" else {}
    config = {**config, "latent_dim": latent_dim, "image_shape": (channels, side, side)}

    model = build(config["image_shape"], latent_dim).to(device)
    if not weights["discriminator"]:
        del model["discriminator"]
    for name, network in model.items():
        common.load_weights(network, weights[name], path)
    return model.eval(), config


CURVES = {
    "binary cross-entropy, nats": ["generator/loss", "discriminator/loss"],
    "accuracy of the discriminator": [
        "discriminator/real_acc", "discriminator/fake_acc", "discriminator/overall_acc",
    ],
}


def main(argv=None):
    options, checkpoint = parse_options(argv)
    device = common.pick_device(options.device)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.manual_seed(options.seed)

    # the images, on the device once: uint8 (N, C, 32, 32)
    data = common.load_dataset(options.dataset, options.data, size=32)
    images = data.train[: options.subset].to(device)
    image_shape = tuple(images.shape[1:])
    options.dataset = data.name  # known only now, and kept in the checkpoint

    # both networks, their optimizers, and the codes that are drawn after every epoch
    model = build(image_shape, options.latent_dim).to(device)
    generator = model["generator"]
    discriminator = model["discriminator"]
    validation_z = torch.randn(50, options.latent_dim).to(device)
    betas = (options.b1, options.b2)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=options.lr, betas=betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=options.lr, betas=betas, fused=True)
    if options.bf16:  # the logits before the sigmoids stay float32
        common.use_bf16(generator, [generator.conv_blocks[-2]])
        common.use_bf16(discriminator, [discriminator.adv_layer[0]])

    # a new run, or one to go on with
    if checkpoint:
        folder = Path(options.resume)
        rows = checkpoint["metrics"]
        steps = checkpoint["steps"]
        common.load_weights(model, checkpoint["state_dict"], folder)
        common.load_adam(optimizer_g, checkpoint["optimizer_g"])
        common.load_adam(optimizer_d, checkpoint["optimizer_d"])
        resume_command = "run this command again"
    else:
        folder = common.new_folder(options.out, run_name(options))
        rows = []
        steps = torch.empty(0, 4)  # g_loss, d_loss, real_acc and fake_acc of every step
        resume_command = f"python dcgan.py --resume {shlex.quote(folder.as_posix())}"

    try:
        board = common.open_board(folder, rows) if options.tensorboard else None
        parameters = sum(parameter.numel() for parameter in model.parameters())
        precision = "bfloat16" if options.bf16 else "float32"
        print(f"{folder}: {len(rows)} of {options.epochs} epochs are done")
        print(f"{len(images):,} images of {data.name}; {parameters:,} parameters on {device}, in {precision}")
        print(f"if interrupted: {resume_command}")
        print("    epoch   seconds  time left    G loss    D loss  real acc  fake acc", flush=True)

        for epoch in range(len(rows) + 1, options.epochs + 1):
            start = time.perf_counter()
            torch.manual_seed(10_000 * options.seed + epoch)  # a resumed run draws the same numbers

            # one pass over the images
            model.train()
            step_numbers = []
            for x in common.batches(images, options.batch_size, shuffle=True):  # floats in 0..1
                z = torch.randn(len(x), options.latent_dim, device=device)
                numbers = gan_step(generator, discriminator, optimizer_g, optimizer_d, x, z)
                step_numbers.append(torch.stack(numbers))
            epoch_steps = torch.stack(step_numbers).cpu()  # until here Python did not wait for the device
            g_loss, d_loss, real_acc, fake_acc = epoch_steps.mean(0).tolist()
            speed = len(images) / (time.perf_counter() - start)  # images per second

            # a picture of the same codes after every epoch
            model.eval()
            with torch.no_grad():
                samples = generator(validation_z)

            # the row of metrics
            row = {
                "epoch": epoch, "seconds": round(time.perf_counter() - start, 3), "images_per_second": round(speed),
                "generator/loss": g_loss, "discriminator/loss": d_loss,
                "discriminator/real_acc": real_acc, "discriminator/fake_acc": fake_acc,
                "discriminator/overall_acc": (real_acc + fake_acc) / 2,
            }
            common.check_finite({**row, "samples": samples})
            new_rows = [*rows, row]
            new_steps = torch.cat([steps, epoch_steps])

            # the files of this epoch, and then the checkpoint
            common.save_epoch(folder, new_rows, {"samples": samples}, board)
            common.save_checkpoint(folder / "checkpoint.pt", {
                "model": "dcgan", "config": vars(options), "image_shape": image_shape,
                "state_dict": model.state_dict(),
                "optimizer_g": optimizer_g.state_dict(), "optimizer_d": optimizer_d.state_dict(),
                "epoch": epoch, "metrics": new_rows, "steps": new_steps,
            })
            rows = new_rows
            steps = new_steps

            # one line on the console, with the time of the whole epoch
            seconds = time.perf_counter() - start
            left = timedelta(seconds=round(seconds * (options.epochs - epoch)))
            line = f"{epoch:>5}/{options.epochs:<3} {seconds:9.1f} {left!s:>10} {g_loss:9.3f} {d_loss:9.3f}"
            print(f"{line} {real_acc:9.1%} {fake_acc:9.1%}", flush=True)
    finally:  # after the last epoch, Ctrl-C or an error
        if rows:
            last_steps = {"generator/loss": steps[:, 0], "discriminator/loss": steps[:, 1]}
            common.save_curves(folder / "losses.png", rows, CURVES, last_steps)
        elif not options.resume:  # a new run that finished no epoch: its name is free again
            shutil.rmtree(folder, ignore_errors=True)
    print(f"next: python sample.py {shlex.quote(folder.as_posix())}")


if __name__ == "__main__":
    common.run_script(main)
