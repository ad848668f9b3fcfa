"""The tests: mathematics against an independent computation, the scripts as users run them, and failures."""

import contextlib
import csv
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import dcgan
import sample
import tsne
import vae

HERE = Path(__file__).parent
SCRIPTS = {"vae": vae, "dcgan": dcgan, "sample": sample, "tsne": tsne}
DIGITS = ["--dataset", "digits", "--device", "cpu", "--latent-dim", "8"]
VAE_RUN = [*DIGITS, "--subset", "200", "--epochs", "3", "--hidden-dim", "32"]
DCGAN_RUN = [*DIGITS, "--subset", "20", "--epochs", "2"]
ABSENT = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both


@pytest.fixture(autouse=True)
def in_an_empty_folder_without_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError("no network in the tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A trained run of each kind; tests only read them."""
    folder = tmp_path_factory.mktemp("trained")
    vae.main([*VAE_RUN, "--out", str(folder / "vae")])
    dcgan.main([*DCGAN_RUN, "--out", str(folder / "dcgan")])
    return folder


def error_of(capsys, script, *argv):
    """The exit status of a script that must fail, and its last line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main([str(word) for word in argv])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{script}.py: error: ")
    return stop.value.code, last


def command(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=100, **options)


def metrics(run):
    """The rows of metrics.csv without their times."""
    with (Path(run) / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)
        ]


def weights(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)["state_dict"]


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- The VAE's mathematics ---


def test_kl_is_that_of_torch_distributions():
    mean, log_var = torch.randn(5, 7), torch.randn(5, 7)
    q = torch.distributions.Normal(mean, log_var.exp().sqrt())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum()
    torch.testing.assert_close(vae.kl_divergence(mean, log_var), expected)


def test_reconstruction_loss_is_the_written_out_cross_entropy():
    x_pred, x = torch.rand(3, 4, dtype=torch.double), torch.rand(3, 4, dtype=torch.double)
    expected = 0.0
    for p, t in zip(x_pred.flatten().tolist(), x.flatten().tolist()):
        expected -= t * np.log(p) + (1 - t) * np.log(1 - p)
    assert vae.reconstruction_loss(x_pred, x).item() == pytest.approx(expected)


def test_gradients_flow_through_the_trick():
    mean = torch.randn(4, 3, requires_grad=True)
    log_var = torch.randn(4, 3, requires_grad=True)
    torch.manual_seed(1)
    z = vae.reparameterize(mean, torch.exp(0.5 * log_var))
    torch.manual_seed(1)
    epsilon = torch.randn(4, 3)
    z.sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(4, 3))
    torch.testing.assert_close(log_var.grad, 0.5 * torch.exp(0.5 * log_var.detach()) * epsilon)
    torch.testing.assert_close(z.detach(), mean.detach() + torch.exp(0.5 * log_var.detach()) * epsilon)


class LabVAE(nn.Module):
    """The lab's network, written independently, for its parameters' names and its arithmetic."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.backbone = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
        self.encoder.mean, self.encoder.log_var = nn.Linear(512, 128), nn.Linear(512, 128)
        self.decoder.backbone = nn.Sequential(
            nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 784)
        )

    def losses(self, x):
        h = self.encoder.backbone(x)
        mean, log_var = self.encoder.mean(h), self.encoder.log_var(h)
        z = mean + torch.exp(0.5 * log_var) * torch.empty_like(mean).normal_()
        x_pred = 1 / (1 + torch.exp(-self.decoder.backbone(z)))
        reconstruction = -(x * x_pred.log() + (1 - x) * (1 - x_pred).log()).sum()
        return reconstruction, 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum()


def test_a_vae_step_is_the_labs():
    ours, lab, x = vae.VAE(784, 512, 128, 784), LabVAE(), torch.rand(16, 784)
    assert sum(p.numel() for p in ours.encoder.parameters()) == 795_904
    assert sum(p.numel() for p in ours.decoder.parameters()) == 730_896
    lab.load_state_dict(ours.state_dict())
    torch.manual_seed(3)
    losses = vae.train_step(ours, torch.optim.Adam(ours.parameters(), lr=1e-3), x, beta=10)
    torch.manual_seed(3)
    expected = lab.losses(x)
    (expected[0] + 10 * expected[1]).backward()
    torch.testing.assert_close(losses, tuple(loss.detach() for loss in expected), rtol=1e-4, atol=1e-3)
    for (name, p), q in zip(ours.named_parameters(), lab.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
    torch.optim.Adam(lab.parameters(), lr=1e-3).step()
    for p, q in zip(ours.parameters(), lab.parameters()):
        clear = q.grad.abs() > 1e-2  # Adam's first step is the gradient's sign: rounding decides it near zero
        torch.testing.assert_close(p[clear], q[clear], rtol=0, atol=1e-5)


def test_epoch_means_are_over_images_not_batches():
    model = vae.Autoencoder(12, 8, 4, 12)
    x = torch.rand(10, 1, 3, 4)
    whole = vae.evaluate(model, [x], beta=2.0)
    pairs = [(part, torch.zeros(len(part))) for part in x.split(4)]  # as a DataLoader gives them, the last one smaller
    assert vae.evaluate(model, pairs, beta=2.0) == pytest.approx(whole)
    assert whole[2] == pytest.approx(whole[0] + 2 * whole[1])
    seen = []

    def step(model, optimizer, x, beta):
        seen.append(x.shape)
        return x.sum(), torch.tensor(float(len(x)))

    means = vae.train_epoch(model, None, pairs, 3.0, step=step)
    assert seen == [(4, 12), (4, 12), (2, 12)]
    assert means == pytest.approx((x.sum().item() / 10, 1.0, x.sum().item() / 10 + 3))


@pytest.mark.parametrize("img_shape", [(1, 28, 28), (1, 32, 32), (3, 32, 32)])
def test_the_convolutional_vae_takes_and_returns_flat_rows(img_shape):
    model = vae.ConvVAE(img_shape, 64, 16)
    x = torch.rand(5, *img_shape).flatten(1)
    x_pred, mean, log_var = model(x)
    assert (x_pred.shape, mean.shape, log_var.shape) == (x.shape, (5, 16), (5, 16))
    assert 0 <= x_pred.min() and x_pred.max() <= 1
    assert {"encoder.mean.weight", "encoder.log_var.weight"} <= model.state_dict().keys()


def test_the_convolutional_vae_overfits_eight_digits():
    torch.manual_seed(0)
    x = common.load_digits(28).train[:8].flatten(1) / 255
    model = vae.ConvVAE((1, 28, 28), 128, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        vae.train_epoch(model, optimizer, [x], beta=0)
    x_pred, _, _ = model(x)
    assert F.mse_loss(x_pred, x) < 0.1 * x.var()


def test_the_autoencoder_is_deterministic_and_ignores_the_kl():
    torch.manual_seed(0)
    model, x = vae.Autoencoder(12, 8, 4, 12), torch.rand(6, 12)
    x_pred, mean, log_var = model(x)
    torch.testing.assert_close(x_pred, model.decoder(mean))
    assert torch.equal(model(x)[0], x_pred)
    vae.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), x, beta=0.0)
    assert model.encoder.log_var.weight.grad is None  # the KL alone could reach it
    assert model.encoder.mean.weight.grad.any()


# --- The DCGAN's mathematics ---


def test_upsampling_inside_the_convolution_changes_nothing():
    ours = dcgan.UpsampleConv2d(3, 5, 3, padding=1).double()
    slow = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, padding=1)).double()
    slow[1].load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 6, 7, dtype=torch.double, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    cotangent = torch.randn(2, 5, 12, 14, dtype=torch.double)
    torch.testing.assert_close(ours(x), slow(y))
    ours(x).backward(cotangent)
    slow(y).backward(cotangent)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, slow[1].weight.grad)
    torch.testing.assert_close(ours.bias.grad, slow[1].bias.grad)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_dcgans_networks_have_the_labs_shape(channels):
    generator, discriminator = dcgan.Generator(100, (channels, 32, 32)), dcgan.Discriminator((channels, 32, 32))
    images = generator(torch.randn(2, 100))
    assert images.shape == (2, channels, 32, 32)
    assert discriminator(images).shape == (2, 1)
    if channels == 1:
        assert sum(p.numel() for p in generator.parameters()) == 1_049_985
        assert sum(p.numel() for p in discriminator.parameters()) == 98_113
    blocks = {key.rsplit(".", 1)[0] for key in generator.state_dict()}
    assert blocks == {"l1.0", *(f"conv_blocks.{i}" for i in (0, 2, 3, 6, 7, 9))}
    blocks = {key.rsplit(".", 1)[0] for key in discriminator.state_dict()}
    assert blocks == {*(f"model.{i}" for i in (0, 3, 6, 7, 10, 11, 14)), "adv_layer.0"}


def slow_generator(weights, z):
    """The lab's generator with nn.Upsample, in training mode, from a dict of tensors."""

    def conv(x, i):
        return F.conv2d(x, weights[f"conv_blocks.{i}.weight"], weights[f"conv_blocks.{i}.bias"], padding=1)

    def norm(x, i, eps):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        scale, shift = (weights[f"conv_blocks.{i}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        return (x - mean) / (var + eps).sqrt() * scale + shift

    x = (z @ weights["l1.0.weight"].T + weights["l1.0.bias"]).view(len(z), 128, 8, 8)
    x = conv(nn.Upsample(scale_factor=2)(norm(x, 0, 1e-5)), 2)
    x = conv(nn.Upsample(scale_factor=2)(F.leaky_relu(norm(x, 3, 0.8), 0.2)), 6)
    return torch.sigmoid(conv(F.leaky_relu(norm(x, 7, 0.8), 0.2), 9))


def test_a_dcgan_step_is_the_one_written_out_the_slow_way():
    torch.manual_seed(0)
    generator, discriminator = dcgan.Generator(10, (1, 32, 32)).double(), dcgan.Discriminator((1, 32, 32)).double()
    for layer in discriminator.model:
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
    images, z = torch.rand(6, 1, 32, 32, dtype=torch.double), torch.randn(6, 10, dtype=torch.double)
    passes = []
    discriminator.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0]))
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    slow = {name: p.detach().clone().requires_grad_() for name, p in generator.named_parameters()}
    # with a learning rate of 0 nothing moves, and both losses can be recomputed
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.0) for network in (generator, discriminator)]
    g_loss, d_loss, real_acc, fake_acc = dcgan.train_step(generator, discriminator, *optimizers, images, z)

    assert len(passes) == 3 and torch.equal(passes[0], passes[2]) and torch.equal(passes[1], images)
    assert passes[0].requires_grad and not passes[2].requires_grad
    fakes = slow_generator(slow, z)
    score = discriminator(fakes)
    expected = -score.log().mean()
    expected.backward()
    torch.testing.assert_close(g_loss, expected.detach())
    for name, p in generator.named_parameters():
        torch.testing.assert_close(p.grad, slow[name].grad, msg=name)
    real_score, fake_score = discriminator(images), discriminator(fakes.detach())
    expected = -0.5 * (real_score.log().mean() + (1 - fake_score).log().mean())
    gradients = torch.autograd.grad(expected, list(discriminator.parameters()))
    torch.testing.assert_close(d_loss, expected.detach())
    discriminator.zero_grad()
    dcgan.train_step(generator, discriminator, *optimizers, images, z)
    for p, gradient in zip(discriminator.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient)
    assert (real_acc, fake_acc) == ((real_score > 0.5).double().mean(), (fake_score <= 0.5).double().mean())
    assert all(torch.equal(before[name], p) for name, p in discriminator.named_parameters())


def test_each_update_leaves_the_other_network_alone():
    networks = (dcgan.Generator(10, (1, 32, 32)), dcgan.Discriminator((1, 32, 32)))
    for moving in (0, 1):
        before = [[p.clone() for p in network.parameters()] for network in networks]
        optimizers = [
            torch.optim.SGD(network.parameters(), lr=0.1 * (i == moving)) for i, network in enumerate(networks)
        ]
        dcgan.train_step(*networks, *optimizers, torch.rand(4, 1, 32, 32), torch.randn(4, 10))
        for i, network in enumerate(networks):
            equal = [torch.equal(p, q) for p, q in zip(network.parameters(), before[i])]
            assert not all(equal) if i == moving else all(equal)


# --- Images ---


def test_resizing_agrees_with_pil_to_one_gray_level(tmp_path):
    from torchvision import transforms

    write_mnist(tmp_path, common.load_digits(28).train[:40], torch.arange(40) % 10)
    ours = common.load_dataset("mnist", tmp_path, size=32).train
    resize = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    originals = common.load_dataset("mnist", tmp_path).train
    slow = torch.stack([resize(Image.fromarray(image[0].numpy())) for image in originals])
    assert ours.shape == (40, 1, 32, 32)
    assert (ours / 255 - slow).abs().max() <= 1.001 / 255


def test_batches_use_every_image_once():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    in_order = list(common.batches(images, 4))
    assert [len(batch) for batch in in_order] == [4, 4, 2]
    torch.testing.assert_close(torch.cat(in_order), images / 255)
    shuffled = torch.cat(list(common.batches(images, 4, shuffle=True)))
    assert not torch.equal(shuffled, images / 255) and torch.equal(shuffled.sort(0).values, images / 255)


def write_mnist(root, images, labels):
    """The four files of MNIST, with the same images to train and to test on."""
    raw = Path(root) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, len(images), *images.shape[-2:])
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, len(labels)) + labels.byte().numpy().tobytes()
        )
    return raw


def test_a_truncated_mnist_file_is_named_and_a_small_whole_one_accepted(tmp_path, capsys):
    raw = write_mnist(tmp_path / "data", common.load_digits(28).train[:30], torch.arange(30) % 10)
    vae.main([*VAE_RUN, "--dataset", "mnist", "--out", "small"])
    assert len(metrics("small")) == 3
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    status, line = error_of(capsys, "vae", *VAE_RUN, "--dataset", "mnist")
    assert status == 1 and path.name in line and "delete it" in line


def test_without_network_the_default_falls_back_loudly_and_a_named_set_is_refused(capsys):
    vae.main(["--epochs", "1", "--hidden-dim", "8"])
    captured = capsys.readouterr()
    assert captured.err.count("WARNING") == 2 and "SCIKIT-LEARN" in captured.err
    assert metrics("runs/vae-beta10-digits")
    for name in ("mnist", "cifar10"):
        status, line = error_of(capsys, "vae", "--epochs", 1, "--dataset", name)
        assert status == 1 and name in line and "--dataset digits" in line
    assert os.listdir("runs") == ["vae-beta10-digits"]


@pytest.mark.parametrize("script", ["vae", "dcgan"])
def test_cifar100_has_three_channels(script, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    folder = tmp_path / "data" / CIFAR100.base_folder
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (12, 3 * 32 * 32), dtype=np.uint8)
    entry = {"data": images, "fine_labels": list(range(12)), "fine_label_names": [f"class {i}" for i in range(100)]}
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(entry))
    data = common.load_dataset("cifar100", "data")
    assert torch.equal(data.train, torch.from_numpy(images).view(12, 3, 32, 32)) and data.classes[3] == "class 3"
    SCRIPTS[script].main(["--dataset", "cifar100", "--epochs", "1", "--out", "run"])
    assert Image.open("run/images/epoch_001_samples.png").size[0] == 10 * 34 + 2
    sample.main(["run", "--n", "3"])
    if script == "vae":
        tsne.main(["run", "--n", "12", "--perplexity", "3"])


# --- The scripts, as users run them ---


def test_the_vae_from_the_shell(tmp_path):
    done = command(HERE / "vae.py", *VAE_RUN, "--beta", "1", "--arch", "conv")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "vae-conv-beta1-digits"
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["val/loss"]) < float(rows[0]["val/loss"])
    for split in ("train", "val"):
        losses = [float(rows[2][f"{split}/{name}"]) for name in ("reconstruction_loss", "kl_loss", "loss")]
        assert losses[0] + 1 * losses[1] == pytest.approx(losses[2])
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    grids = {f"images/epoch_00{e}_{name}.png" for e in (1, 2, 3) for name in ("samples", "reconstructions")}
    assert files == {"checkpoint.pt", "config.json", "metrics.csv", "losses.png"} | grids
    assert "sample.py" in done.stdout.splitlines()[-1]
    vae.main([*VAE_RUN, "--beta", "1", "--arch", "conv"])  # the same again: a folder of its own, the same bytes
    assert metrics(f"{run}-2") == rows
    assert same_weights(weights(run), weights(f"{run}-2"))


def test_the_dcgan_from_the_shell(tmp_path):
    done = command(HERE / "dcgan.py", *DCGAN_RUN, "--bf16", "--out", "run")
    assert done.returncode == 0, done.stderr
    row = metrics("run")[-1]
    accuracies = [float(row[f"discriminator/{name}_acc"]) for name in ("real", "fake", "overall")]
    assert sum(accuracies[:2]) / 2 == pytest.approx(accuracies[2])
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    assert (checkpoint["version"], checkpoint["model"], checkpoint["epoch"]) == (1, "dcgan", 2)
    assert tuple(checkpoint["image_shape"]) == (1, 32, 32)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"generator", "discriminator"}
    assert Image.open("run/images/epoch_002_samples.png").size == (10 * 34 + 2, 5 * 34 + 2)


def test_bf16_is_for_matrix_products_alone():
    vae.main([*VAE_RUN, "--out", "float32"])
    vae.main([*VAE_RUN, "--out", "bf16", "--bf16"])
    losses = [float(metrics(run)[-1]["val/loss"]) for run in ("float32", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)
    model = vae.VAE(784, 64, 8, 784)
    for network in (model.encoder, model.decoder):
        network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)
    assert {output.dtype for output in model(torch.rand(2, 784))} == {torch.float32}


BAD = {
    "vae": ["--beta nan", "--beta -1", "--beta 1 --autoencoder", "--hidden-dim 0", "--out .", "--arch gru"],
    "dcgan": ["--b1 1", "--b2 -0.1", "--latent-dim 1.5"],
    "vae dcgan": [
        "--epochs 0",
        "--batch-size 0",
        "--subset 0",
        "--lr 0",
        "--lr inf",
        "--seed -1",
        "--dataset imagenet",
        "--resume nowhere",
        "--out here/file/run",
        "--data here/file",
        f"--device {ABSENT}",
        "--epochs 99999999999999999999",
    ],
    "sample tsne": ["nowhere", "", "here/file", "--n 0", f"--device {ABSENT}"],
}


@pytest.mark.parametrize("script,words", [(s, w) for k, v in BAD.items() for s in k.split() for w in v])
def test_a_bad_option_is_one_line_and_status_2(script, words, tmp_path, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    status, line = error_of(capsys, script, *words.split())
    assert status == 2 and (not words or words.split()[0].lstrip("-") in line or words.split()[-1] in line)
    assert not (tmp_path / "runs").exists()


def test_overflowing_sizes_train_one_batch_or_say_so(capsys, monkeypatch):
    vae.main([*VAE_RUN, "--batch-size", "99999999", "--subset", "99999999", "--out", "one"])
    assert len(metrics("one")) == 3

    def too_large(*args):
        return torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(vae, "build", too_large)
    status, line = error_of(capsys, "vae", *VAE_RUN)
    assert status == 1 and "memory" in line


def test_tensorboard_is_optional_and_gets_losses_and_grids(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, line = error_of(capsys, "vae", *VAE_RUN, "--tensorboard")
    assert status == 2 and "pip install tensorboard" in line

    board = MagicMock()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", MagicMock(SummaryWriter=board))
    vae.main([*VAE_RUN, "--tensorboard", "--out", "run"])
    scalars = [call.args for call in board().add_scalar.call_args_list]
    last = {name: pytest.approx(float(value)) for name, value in metrics("run")[-1].items() if name != "epoch"}
    assert {name: value for name, value, epoch in scalars if epoch == 3} == last
    grids = [(call.args[0], call.args[2]) for call in board().add_image.call_args_list]
    assert grids == [(name, epoch) for epoch in (1, 2, 3) for name in ("reconstructions", "samples")]


def test_importing_the_scripts_has_no_side_effects(tmp_path):
    code = """
import sys, torch
state = torch.get_rng_state()
import vae, dcgan, sample, tsne
assert torch.equal(state, torch.get_rng_state())
print([name for name in ("torchvision", "matplotlib", "sklearn") if name in sys.modules])
"""
    done = command("-c", code, "--nonsense", env={**os.environ, "PYTHONPATH": str(HERE)})
    assert (done.returncode, done.stdout.strip(), os.listdir(tmp_path)) == (0, "[]", []), done.stderr


# --- Pictures from a checkpoint ---


def pixels(path):
    return np.asarray(Image.open(path).convert("L"))


def test_pictures_have_their_tiles_and_equal_seeds_give_equal_bytes(runs, capsys, monkeypatch):
    for out, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        sample.main([str(runs / "vae"), "--out", out, "--seed", seed])
    names = ["samples.png", "interpolation.png", "interpolation_digits.png", "reconstructions.png"]
    assert capsys.readouterr().out.split() == [f"{out}/{name}" for out in "abc" for name in names]
    tiles = {
        "samples.png": (8, 3),
        "interpolation.png": (11, 1),
        "interpolation_digits.png": (13, 1),
        "reconstructions.png": (10, 10),
    }
    for name, (columns, rows) in tiles.items():
        assert Image.open(f"a/{name}").size == (columns * 30 + 2, rows * 30 + 2)
        assert Path(f"a/{name}").read_bytes() == Path(f"b/{name}").read_bytes()
    assert Path("a/samples.png").read_bytes() != Path("c/samples.png").read_bytes()
    monkeypatch.setattr("matplotlib.pyplot.get_backend", lambda: "agg")
    status, line = error_of(capsys, "sample", runs / "dcgan", "--out", "g", "--n", 5, "--steps", 4, "--slerp", "--show")
    assert status == 1 and "no window" in line
    assert sorted(os.listdir("g")) == ["interpolation.png", "samples.png"]


def test_an_interpolation_ends_in_the_two_codes(runs):
    z1, z2 = torch.randn(2, 50)
    for path in (sample.interpolate, sample.slerp):
        codes = path(z1, z2, 11)
        torch.testing.assert_close(codes[[0, -1]], torch.stack([z1, z2]))
    torch.testing.assert_close(sample.interpolate(z1, z2, 11)[3], 0.7 * z1 + 0.3 * z2)
    on_sphere = sample.slerp(F.normalize(z1, dim=0), F.normalize(z2, dim=0), 11)
    torch.testing.assert_close(on_sphere.norm(dim=1), torch.ones(11))
    assert torch.isfinite(sample.slerp(z1, z1, 3)).all()

    sample.main([str(runs / "vae"), "--out", "p", "--images", "3", "7"])
    model, _ = vae.load(runs / "vae")
    originals = common.load_digits(28).train[[3, 7]] / 255
    ends = model.decoder(model.encoder(originals.flatten(1))[0]).detach().view(2, 28, 28)
    row = torch.from_numpy(pixels("p/interpolation_digits.png").copy())
    for tile, image in ((0, originals[0, 0]), (1, ends[0]), (11, ends[1]), (12, originals[1, 0])):
        drawn = row[2:30, 30 * tile + 2 : 30 * tile + 30] / 255
        assert (drawn - image).abs().max() <= 1.001 / 255


def test_the_newest_run_is_the_default(runs, capsys):
    vae.main(VAE_RUN)
    dcgan.main(DCGAN_RUN)
    os.utime("runs/dcgan-digits/checkpoint.pt", (time.time() + 9, time.time() + 9))
    capsys.readouterr()
    sample.main([])
    assert "runs/dcgan-digits/samples.png" in capsys.readouterr().out
    tsne.main(["--n", "40", "--perplexity", "5"])
    assert "runs/vae-beta10-digits/tsne_mean.png" in capsys.readouterr().out


@pytest.mark.parametrize("codes", ["mean", "sample", "std", "pixels"])
def test_tsne_draws_a_map_and_says_how_often_the_nearest_agrees(codes, runs, capsys):
    tsne.main([str(runs / "vae"), "--codes", codes, "--n", "60", "--perplexity", "5", "--out", "maps"])
    assert "1-nearest-neighbour accuracy" in capsys.readouterr().out
    assert Image.open(f"maps/tsne_{codes}.png").size == (1200, 900)


def test_the_nearest_neighbour_is_another_code():
    codes = np.random.default_rng(0).normal(size=(30, 4))
    labels = np.arange(30) % 3
    distances = ((codes[:, None] - codes) ** 2).sum(-1) + np.diag(np.full(30, np.inf))
    assert tsne.nearest_neighbour_accuracy(codes, labels) == (labels[distances.argmin(1)] == labels).mean()


def test_a_gan_has_no_encoder_and_an_autoencoder_no_variance(runs, capsys):
    status, line = error_of(capsys, "tsne", runs / "dcgan")
    assert status == 2 and "no encoder" in line
    vae.main([*VAE_RUN, "--autoencoder", "--epochs", "1", "--out", "run"])
    status, line = error_of(capsys, "tsne", "run", "--codes", "std")
    assert status == 2 and "no variance" in line


@pytest.mark.parametrize("kind", ["vae", "dcgan"])
def test_the_labs_lightning_checkpoints_open(kind, runs):
    checkpoint = {
        "epoch": 149,
        "global_step": 8850,
        "pytorch-lightning_version": "1.7.7",
        "state_dict": weights(runs / kind),
    }
    torch.save(checkpoint, "lab.ckpt")
    model, config = SCRIPTS[kind].load("lab.ckpt")
    assert same_weights(model.state_dict(), weights(runs / kind)) and not model.training
    assert (config["latent_dim"], config["image_shape"]) == (8, (1, 28, 28) if kind == "vae" else (1, 32, 32))
    sample.main(["lab.ckpt", "--dataset", "digits", "--out", "pictures"])
    assert Path("pictures/samples.png").exists()


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_bad_checkpoint_is_refused_and_nothing_in_it_runs(runs, capsys, monkeypatch):
    whole = (runs / "vae" / "checkpoint.pt").read_bytes()
    good = torch.load(runs / "vae" / "checkpoint.pt", weights_only=True)
    Path("empty.pt").touch()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    Path("bit.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    Path("text.pt").write_text("epoch,seconds\n")
    torch.save({**good, "config": None, "model": "dcgan", "optimizers": 3}, "odd.pt")
    torch.save({**good, "payload": Malicious()}, "code.pt")
    torch.save({"model": {"weight": torch.zeros(2)}}, "foreign.pt")
    torch.save({**good, "version": 2}, "future.pt")
    torch.save({**good, "state_dict": {"encoder.mean.weight": torch.zeros(2, 2)}}, "alien.pt")
    torch.save({**good, "state_dict": {"encoder.mean.weight": 3}}, "number.pt")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", sys.modules[__name__])
    monkeypatch.setattr(Malicious, "__module__", "pytorch_lightning")
    torch.save({"state_dict": good["state_dict"], "callbacks": Malicious}, "old.ckpt")
    assert "converted.pt" in error_of(capsys, "sample", "old.ckpt")[1]
    for path in (
        "empty.pt",
        "cut.pt",
        "bit.pt",
        "text.pt",
        "code.pt",
        "foreign.pt",
        "future.pt",
        "alien.pt",
        "number.pt",
        "missing.pt",
    ):
        for script in ("sample", "tsne"):
            status, line = error_of(capsys, script, path)
            assert status == 2 and path in line
    for path in ("empty.pt", "cut.pt", "bit.pt", "text.pt", "code.pt", "foreign.pt", "future.pt", "alien.pt", "odd.pt"):
        status, line = error_of(capsys, "vae", "--resume", path, "--epochs", 9)
        assert status in (1, 2) and path in line
    assert "code" in error_of(capsys, "sample", "code.pt")[1]
    assert not Path("executed").exists()
    status, line = error_of(capsys, "dcgan", "--resume", runs / "vae")
    assert status == 2 and "vae" in line


# --- Nothing is lost ---


def script_in_a_process(script, words, before=""):
    """Popen of a script's main, with a line of Python before it; SIGINT interrupts it even from a background shell."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import common, {script}\n"
    code += f"{before}\n{script}.main({[str(word) for word in words]})"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path, process):
    while not Path(path).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


KILLED_WHILE_WRITING = """
import os
write_bytes, written = common.Path.write_bytes, []
def write_half_of_the_third_checkpoint(path, data):
    written.append(path.name)
    if written.count("checkpoint.pt.tmp") == 3:
        write_bytes(path, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_bytes(path, data)
common.Path.write_bytes = write_half_of_the_third_checkpoint
common.SAVE_EVERY = 0
"""


@pytest.mark.parametrize("script,run", [("vae", VAE_RUN), ("dcgan", [*DCGAN_RUN, "--batch-size", "16"])])
def test_a_killed_run_resumes_bit_for_bit(script, run):
    words = [*run, "--epochs", "6"]
    main = SCRIPTS[script].main
    befores = {"halfway": KILLED_WHILE_WRITING, "killed": "common.SAVE_EVERY = 0"}
    processes = {out: script_in_a_process(script, [*words, "--out", out], before) for out, before in befores.items()}
    main([*words, "--out", "whole"])
    wait_for("killed/checkpoint.pt", processes["killed"])
    time.sleep(np.random.default_rng().uniform(0, 0.3))
    processes["killed"].kill()
    for process in processes.values():
        process.communicate()
    assert processes["halfway"].returncode == -signal.SIGKILL
    assert Path("halfway/checkpoint.pt.tmp").exists()
    assert torch.load("halfway/checkpoint.pt", weights_only=True)["epoch"] == 2

    for out in ("halfway", "killed"):
        with contextlib.suppress(SystemExit):  # status 0, should it have been quick enough to end
            main(["--resume", out])
        assert metrics(out) == metrics("whole")
        assert same_weights(weights(out), weights("whole"))
        assert not Path(out, "checkpoint.pt.tmp").exists()


def test_resuming_lays_out_adams_moments_as_the_weights():
    vae.main([*VAE_RUN, "--arch", "conv", "--epochs", "1", "--out", "one"])
    shutil.copytree("one", "other")
    checkpoint = torch.load("one/checkpoint.pt", weights_only=True)
    for moments in checkpoint["optimizers"][0]["state"].values():  # as a GPU would have left them
        moments.update({name: moments[name].contiguous() for name in ("exp_avg", "exp_avg_sq")})
    torch.save(checkpoint, "other/checkpoint.pt")
    for run in ("one", "other"):
        vae.main(["--resume", run, "--epochs", "2"])
    assert same_weights(weights("one"), weights("other"))


def test_a_signal_ends_the_run_with_a_way_back():
    vae.main([*VAE_RUN, "--epochs", "5", "--out", "whole"])
    statuses = {signal.SIGINT: 130, signal.SIGTERM: 143}
    words = [*VAE_RUN, "--epochs", "100000", "--out"]
    processes = {number: script_in_a_process("vae", [*words, number.name]) for number in statuses}
    for number, process in processes.items():
        wait_for(f"{number.name}/checkpoint.pt", process)
        process.send_signal(number)
    for number, process in processes.items():
        run = number.name
        _, errors = process.communicate(timeout=30)
        assert process.returncode == statuses[number]
        assert f"python vae.py --resume {run}" in errors.splitlines()[-1] and "Traceback" not in errors
        assert Path(run, "losses.png").exists()
        vae.main(["--resume", run, "--epochs", "5"])
        assert metrics(run) == metrics("whole") and same_weights(weights(run), weights("whole"))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint(capfd):
    vae.main([*VAE_RUN, "--out", "run"])
    before = Path("run/checkpoint.pt").read_bytes()
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)"
    process = script_in_a_process("vae", ["--resume", "run", "--epochs", "9"], limit)
    _, errors = process.communicate(timeout=60)
    line = errors.splitlines()[-1]
    assert process.returncode == 1 and line.startswith("vae.py: error: cannot write run/checkpoint.pt: "), errors
    assert "epoch 3" in line
    assert Path("run/checkpoint.pt").read_bytes() == before
    assert not list(Path("run").glob("*.tmp"))
    vae.main(["--resume", "run", "--epochs", "4"])
    assert len(metrics("run")) == 4


def test_a_loss_that_is_not_finite_stops_the_run(capsys, monkeypatch):
    vae.main([*VAE_RUN, "--out", "run"])
    before = Path("run/checkpoint.pt").read_bytes()
    monkeypatch.setattr(vae, "evaluate", lambda *args: (1.0, float("inf"), float("inf")))
    status, line = error_of(capsys, "vae", "--resume", "run", "--epochs", 5)
    assert (
        status == 1
        and "val/kl_loss is inf in epoch 4" in line
        and "--lr" in line
        and "holds epoch 3" in line
        and "--resume" not in line
    )
    assert Path("run/checkpoint.pt").read_bytes() == before and len(metrics("run")) == 3
    for script, words in (("vae", VAE_RUN), ("dcgan", DCGAN_RUN)):
        for batch_size in (7, 200):  # the nan comes within the epoch, or after it
            status, line = error_of(capsys, script, *words, "--lr", 1e300, "--batch-size", batch_size)
            assert status == 1 and "epoch 1" in line and "--lr" in line and "nothing was saved" in line


def test_what_resume_refuses(runs, capsys):
    status, line = error_of(capsys, "vae", "--resume", runs / "vae", "--lr", 0.1, "--epochs", 9, "--batch-size", 3)
    assert status == 2 and "--batch-size, --lr" in line and "--epochs" not in line
    with pytest.raises(SystemExit) as stop:
        vae.main(["--resume", str(runs / "vae")])
    assert stop.value.code == 0
    Path("begun").mkdir()
    status, line = error_of(capsys, "vae", "--resume", "begun")
    assert status == 2 and "no checkpoint" in line
    shutil.copy(runs / "vae" / "checkpoint.pt", "begun")
    for table, word in ((None, "has no metrics.csv"), ("epoch\n", "was changed")):
        if table:
            Path("begun/metrics.csv").write_text(table)
        status, line = error_of(capsys, "vae", "--resume", "begun", "--epochs", 9)
        assert status == 2 and word in line
    status, line = error_of(capsys, "vae", *VAE_RUN, "--out", runs / "vae")
    assert status == 2 and "exists" in line


def test_a_folder_that_can_no_longer_be_written_is_named(monkeypatch, capsys):
    replace = Path.replace

    def read_only_from_epoch_2(path, target):
        if "epoch_002" in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", read_only_from_epoch_2)
    status, line = error_of(capsys, "vae", *VAE_RUN, "--out", "run")
    assert status == 1 and "epoch_002_reconstructions.png: Permission denied" in line and "holds epoch 1" in line


# --- Copying into coursework ---


PASTED = """
import sys
for name in ("common", "matplotlib", "torchvision", "sklearn", "numpy", "tqdm"):
    if name not in sys.modules: sys.modules[name] = None  # importing it fails
import torch
namespace = {"__name__": "notebook"}
exec(open(sys.argv[1]).read().split("# === Script")[0], namespace)
globals().update(namespace)
torch.manual_seed(0)
images = (torch.rand(48, 1, 32, 32) > 0.5).float() * torch.rand(1, 1, 32, 32)
pairs = torch.utils.data.TensorDataset(images, torch.arange(48))
loader = torch.utils.data.DataLoader(pairs, batch_size=20, shuffle=True)
"""

TRAIN = {
    "vae": """
model = VAE(1024, 64, 8, 1024)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
losses = [train_epoch(model, optimizer, loader, beta=1.0)[2] for epoch in range(10)]
assert losses[-1] < 0.9 * losses[0], losses
""",
    "dcgan": """
generator, discriminator = Generator(8, (1, 32, 32)), Discriminator((1, 32, 32))
optimizers = [torch.optim.Adam(network.parameters(), lr=2e-4) for network in (generator, discriminator)]
losses = [train_epoch(generator, discriminator, *optimizers, loader)[1] for epoch in range(3)]
assert losses[-1] < losses[0], losses
""",
}


@pytest.mark.parametrize("script", ["vae", "dcgan"])
def test_the_upper_half_pastes_into_a_notebook(script):
    done = command("-c", PASTED + TRAIN[script], HERE / f"{script}.py")
    assert done.returncode == 0, done.stderr


def notebook_cell(containing):
    """The README's one Python block with this text."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (cell,) = [block for block in blocks if containing in block]
    return cell


@pytest.mark.parametrize("script,name", [("vae", "VAE(input_dim"), ("dcgan", "Generator(")])
def test_the_readmes_training_cells_run(script, name, tmp_path):
    write_mnist(tmp_path / "data", common.load_digits(28).train[:16], torch.arange(16) % 10)
    paste = "import sys; exec(open(sys.argv[1]).read().split('# === Script')[0] + sys.argv[2])"
    done = command("-c", paste, HERE / f"{script}.py", notebook_cell(name))
    assert len(done.stdout.splitlines()) == 10, done.stderr


def test_the_readmes_loading_cell_runs(runs, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "vae-beta10").symlink_to(runs / "vae")
    namespace = {}
    exec(notebook_cell("vae.load"), namespace)
    assert namespace["images"].shape == (24, 1, 28, 28)
