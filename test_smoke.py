"""The tests: mathematics against an independent computation, the scripts as users run them, and failures."""

import contextlib
import csv
import io
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
DCGAN_RUN = [*DIGITS, "--subset", "12", "--epochs", "2", "--batch-size", "5"]
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
    """A trained run of each kind, and what it printed; tests only read them."""
    folder = tmp_path_factory.mktemp("trained")
    for script, words in (("vae", VAE_RUN), ("dcgan", DCGAN_RUN)):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            SCRIPTS[script].main([*words, "--out", str(folder / script)])
        Path(folder, f"{script}.txt").write_text(output.getvalue())
    return folder


def python(*words, **environment):
    """Run Python to its end, with the scripts importable."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), **environment}
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, timeout=100, env=environment)


def error_of(script, *argv):
    """The message with which a script refuses its arguments."""
    with pytest.raises(common.Error) as error:
        SCRIPTS[script].main([str(word) for word in argv])
    assert "\n" not in str(error.value)
    return str(error.value)


def metrics(run):
    """The rows of metrics.csv without their times."""
    with Path(run, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def saved(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def same_weights(one, other):
    one, other = (run if isinstance(run, dict) else saved(run)["state_dict"] for run in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def pixels(path):
    return torch.from_numpy(np.asarray(Image.open(path).convert("L")).copy()) / 255


# --- The VAE's mathematics ---


def lab_vae(hidden_dim=512, latent_dim=128, kind=vae.VAE):
    return kind(vae.Encoder(784, hidden_dim, latent_dim), vae.Decoder(latent_dim, hidden_dim, 784))


def test_kl_is_that_of_torch_distributions():
    mean, log_var = torch.randn(5, 7), torch.randn(5, 7)
    q = torch.distributions.Normal(mean, log_var.exp().sqrt())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))
    torch.testing.assert_close(vae.kl_divergence(mean, log_var), kl.sum())
    assert tsne.dimensions_in_use(mean, log_var, threshold=0.9) == (kl.mean(0) > 0.9).sum()


def test_a_vae_step_is_the_one_written_out_the_slow_way():
    model, x = lab_vae(), torch.rand(16, 784)
    assert sum(p.numel() for p in model.encoder.parameters()) == 795_904
    assert sum(p.numel() for p in model.decoder.parameters()) == 730_896
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    losses = vae.vae_step(model, torch.optim.Adam(model.parameters(), lr=1e-3), x, beta=10)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    h = linear(linear(x, "encoder.backbone.0").clamp(min=0), "encoder.backbone.2").clamp(min=0)
    mean, log_var = linear(h, "encoder.mean"), linear(h, "encoder.log_var")
    torch.manual_seed(3)
    z = mean + log_var.exp().sqrt() * torch.empty_like(mean).normal_()
    h = linear(linear(z, "decoder.backbone.0").clamp(min=0), "decoder.backbone.2").clamp(min=0)
    x_pred = 1 / (1 + torch.exp(-linear(h, "decoder.backbone.4")))
    reconstruction = -(x * x_pred.log() + (1 - x) * (1 - x_pred).log()).sum()
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum()
    (reconstruction + 10 * kl).backward()
    torch.testing.assert_close(losses, (reconstruction.detach(), kl.detach()), rtol=1e-4, atol=1e-3)
    for name, p in model.named_parameters():
        gradient = w[name].grad
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-3, msg=name)
        clear = gradient.abs() > 1e-2  # Adam's first step is the gradient's sign: rounding decides it near zero
        torch.testing.assert_close(p[clear], (w[name] - 1e-3 * gradient.sign())[clear], rtol=0, atol=1e-5)


def test_evaluate_gives_means_over_images_not_batches():
    model = vae.Autoencoder(vae.Encoder(12, 8, 4), vae.Decoder(4, 8, 12))
    x = torch.rand(10, 1, 3, 4)
    x_pred, mean, log_var = model(x.flatten(1))
    reconstruction = vae.reconstruction_loss(x_pred, x.flatten(1)).item() / 10
    kl = vae.kl_divergence(mean, log_var).item() / 10
    expected = pytest.approx((reconstruction, kl, reconstruction + 2 * kl))
    assert vae.evaluate(model, [x], beta=2.0) == expected
    pairs = [(part, torch.zeros(len(part))) for part in x.split(4)]  # as a DataLoader gives them, the last one smaller
    assert vae.evaluate(model, pairs, beta=2.0) == expected
    assert not model.training


def test_the_convolutional_vae_takes_flat_images_and_learns():
    torch.manual_seed(0)
    model = vae.VAE(vae.ConvEncoder((3, 32, 32), 64, 16), vae.ConvDecoder(16, 64, (3, 32, 32)))
    x = common.load_digits(32).train[:8].expand(8, 3, 32, 32).flatten(1) / 255
    x_pred, mean, log_var = model(x)
    assert (x_pred.shape, mean.shape, log_var.shape) == (x.shape, (8, 16), (8, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(50):
        vae.vae_step(model, optimizer, x, beta=0)
    assert F.mse_loss(model(x)[0], x) < 0.3 * x.var()


def test_the_autoencoder_samples_nothing():
    model, x = lab_vae(32, 8, vae.Autoencoder), torch.rand(6, 784)
    x_pred, mean, _ = model(x)
    torch.testing.assert_close(x_pred, model.decoder(mean))
    assert torch.equal(model(x)[0], x_pred)


# --- The DCGAN's mathematics ---


def test_fused_upsampling_gives_the_same_images_and_gradients():
    lab = dcgan.Generator(10, (3, 32, 32)).double()
    fused = dcgan.Generator(10, (3, 32, 32)).double()
    fused.load_state_dict(lab.state_dict())
    state = torch.get_rng_state()
    dcgan.fuse_upsampling(fused)
    assert torch.equal(state, torch.get_rng_state())  # the same seed trains the same run with it and without it
    assert sum(isinstance(layer, dcgan.UpsampleConv2d) for layer in fused.modules()) == 2
    assert same_weights(lab.state_dict(), fused.state_dict())
    z = torch.randn(4, 10, dtype=torch.double)
    torch.testing.assert_close(fused(z), lab(z))
    for network in (fused, lab):
        (network(z) ** 2).sum().backward()
    for (name, p), q in zip(fused.named_parameters(), lab.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_dcgans_networks_have_the_labs_shape():
    generator, discriminator = dcgan.Generator(100, (1, 32, 32)), dcgan.Discriminator((1, 32, 32))
    assert discriminator(generator(torch.randn(2, 100))).shape == (2, 1)
    assert sum(p.numel() for p in generator.parameters()) == 1_049_985
    assert sum(p.numel() for p in discriminator.parameters()) == 98_113
    blocks = {key.rsplit(".", 1)[0] for key in generator.state_dict()}
    assert blocks == {"l1.0", *(f"conv_blocks.{i}" for i in (0, 2, 3, 6, 7, 9))}
    blocks = {key.rsplit(".", 1)[0] for key in discriminator.state_dict()}
    assert blocks == {*(f"model.{i}" for i in (0, 3, 6, 7, 10, 11, 14)), "adv_layer.0"}


def slow_generator(weights, z):
    """The lab's generator in training mode, from a dict of tensors."""

    def conv(x, i):
        return F.conv2d(x, weights[f"conv_blocks.{i}.weight"], weights[f"conv_blocks.{i}.bias"], padding=1)

    def norm(x, i, eps):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        scale, shift = (weights[f"conv_blocks.{i}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        return (x - mean) / (var + eps).sqrt() * scale + shift

    def double(x):
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    x = (z @ weights["l1.0.weight"].T + weights["l1.0.bias"]).view(len(z), 128, 8, 8)
    x = conv(double(norm(x, 0, 1e-5)), 2)
    x = conv(double(F.leaky_relu(norm(x, 3, 0.8), 0.2)), 6)
    return torch.sigmoid(conv(F.leaky_relu(norm(x, 7, 0.8), 0.2), 9))


def test_a_gan_step_is_the_one_written_out_the_slow_way():
    torch.manual_seed(0)
    generator, discriminator = dcgan.Generator(10, (1, 32, 32)).double(), dcgan.Discriminator((1, 32, 32)).double()
    for layer in discriminator.model:
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
    images, z = torch.rand(6, 1, 32, 32, dtype=torch.double), torch.randn(6, 10, dtype=torch.double)
    passes = []
    discriminator.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0]))
    slow = {name: p.detach().clone().requires_grad_() for name, p in generator.named_parameters()}
    # with a learning rate of 0 nothing moves, and both losses can be recomputed
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.0) for network in (generator, discriminator)]
    g_loss, d_loss, real_acc, fake_acc = dcgan.gan_step(generator, discriminator, *optimizers, images, z)
    ours = [p.grad.clone() for p in discriminator.parameters()]

    assert len(passes) == 3 and torch.equal(passes[0], passes[2]) and torch.equal(passes[1], images)
    assert passes[0].requires_grad and not passes[2].requires_grad
    fakes = slow_generator(slow, z)
    expected = -discriminator(fakes).log().mean()
    expected.backward()
    torch.testing.assert_close(g_loss, expected.detach())
    for name, p in generator.named_parameters():
        torch.testing.assert_close(p.grad, slow[name].grad, msg=name)
    real_score, fake_score = discriminator(images), discriminator(fakes.detach())
    expected = -0.5 * (real_score.log().mean() + (1 - fake_score).log().mean())
    torch.testing.assert_close(d_loss, expected.detach())
    torch.testing.assert_close(ours, list(torch.autograd.grad(expected, list(discriminator.parameters()))))
    assert (real_acc, fake_acc) == ((real_score > 0.5).double().mean(), (fake_score <= 0.5).double().mean())


def test_each_update_leaves_the_other_network_alone():
    networks = (dcgan.Generator(10, (1, 32, 32)), dcgan.Discriminator((1, 32, 32)))
    for moving in (0, 1):
        before = [[p.clone() for p in network.parameters()] for network in networks]
        optimizers = [
            torch.optim.SGD(network.parameters(), lr=0.1 * (i == moving)) for i, network in enumerate(networks)
        ]
        dcgan.gan_step(*networks, *optimizers, torch.rand(4, 1, 32, 32), torch.randn(4, 10))
        for i, network in enumerate(networks):
            equal = [torch.equal(p, q) for p, q in zip(network.parameters(), before[i])]
            assert not all(equal) if i == moving else all(equal)
    with pytest.raises(ValueError, match=r"\(1, 28, 28\).*\(1, 32, 32\)"):
        dcgan.gan_step(*networks, *optimizers, torch.rand(4, 1, 28, 28), torch.randn(4, 10))


# --- Images ---


def write_mnist(root, images, labels):
    """The four files of MNIST, with the same images to train and to test on."""
    raw = Path(root, "MNIST", "raw")
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, len(images), *images.shape[-2:])
        Path(raw, f"{split}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = struct.pack(">2i", 0x801, len(labels))
        Path(raw, f"{split}-labels-idx1-ubyte").write_bytes(header + labels.byte().numpy().tobytes())
    return raw


def test_resizing_agrees_with_pil_to_one_gray_level():
    from torchvision import transforms

    write_mnist("data", common.load_digits(28).train[:40], torch.arange(40) % 10)
    ours = common.load_dataset("mnist", "data", size=32).train
    resize = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    originals = common.load_dataset("mnist", "data").train
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


def test_mnist_on_disk_is_used_and_a_damaged_file_is_said_to_be_damaged():
    raw = write_mnist("data", common.load_digits(28).train[:30], torch.arange(30) % 10)
    words = ["--epochs", "1", "--hidden-dim", "8", "--subset", "99999999", "--batch-size", "99999999"]
    vae.main(words)
    assert len(metrics("runs/vae-beta10")) == 1
    path = raw / "train-images-idx3-ubyte"
    for damaged in (path.read_bytes()[:-1], b"", bytes(99)):
        path.write_bytes(damaged)
        assert "data/MNIST is damaged: delete it" in error_of("vae", *words)


def test_without_network_the_default_falls_back_loudly_and_a_named_set_is_refused(capsys):
    vae.main(["--epochs", "1", "--hidden-dim", "8"])
    assert "WARNING: MNIST" in capsys.readouterr().err
    assert metrics("runs/vae-beta10-digits")
    for name in ("mnist", "cifar10"):
        line = error_of("vae", "--epochs", 1, "--dataset", name)
        assert name.upper() in line and "no network in the tests" in line and "--dataset digits" in line
    assert os.listdir("runs") == ["vae-beta10-digits"]


@pytest.mark.parametrize("script", ["vae", "dcgan"])
def test_cifar100_has_three_channels(script, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    folder = tmp_path / "data" / CIFAR100.base_folder
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (20, 3 * 32 * 32), dtype=np.uint8)
    entry = {"data": images, "fine_labels": list(range(20)), "fine_label_names": [f"class {i}" for i in range(100)]}
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(entry))
    data = common.load_dataset("cifar100", "data")
    assert torch.equal(data.train, torch.from_numpy(images).view(20, 3, 32, 32)) and data.classes[3] == "class 3"
    SCRIPTS[script].main(["--dataset", "cifar100", "--epochs", "1", "--out", "run"])
    assert Image.open("run/images/epoch_001_samples.png").size[0] == 10 * 34 + 2
    sample.main(["run", "--n", "3"])
    if script == "vae":
        tsne.main(["run", "--n", "12", "--perplexity", "3"])
        assert "(1, 32, 32)" in error_of("sample", "run", "--dataset", "digits")


# --- The scripts, as users run them ---


def test_the_vae_from_the_shell():
    words = [*VAE_RUN, "--beta", "1", "--arch", "conv"]
    done = python(HERE / "vae.py", *words, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and [line.split()[0] for line in lines[2:5]] == ["1/3", "2/3", "3/3"]
    run = Path("runs/vae-conv-beta1-digits")
    assert f"python sample.py {run}" in lines[-1]
    rows = metrics(run)
    assert float(rows[2]["val/loss"]) < float(rows[0]["val/loss"])
    for split in ("train", "val"):
        losses = [float(rows[2][f"{split}/{name}"]) for name in ("reconstruction_loss", "kl_loss", "loss")]
        assert losses[0] + 1 * losses[1] == pytest.approx(losses[2])
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    grids = {f"images/epoch_00{e}_{name}.png" for e in (1, 2, 3) for name in ("samples", "reconstructions")}
    assert files == {"checkpoint.pt", "config.json", "metrics.csv", "losses.png"} | grids
    vae.main(words)  # the same again: a folder of its own, the same numbers
    assert metrics(f"{run}-2") == rows and same_weights(run, f"{run}-2")


def test_a_dcgan_keeps_every_step_and_their_means(runs):
    assert max(map(len, Path(runs, "dcgan.txt").read_text().splitlines()[1:-2])) <= 80
    checkpoint, rows = saved(runs / "dcgan"), metrics(runs / "dcgan")
    assert (checkpoint["model"], checkpoint["epoch"], tuple(checkpoint["image_shape"])) == ("dcgan", 2, (1, 32, 32))
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"generator", "discriminator"}
    steps = checkpoint["steps"].view(2, 3, 4)  # epochs, steps, numbers; the third step has the last 2 of 12 images
    means = (steps * torch.tensor([5, 5, 2])[None, :, None]).sum(1) / 12
    for row, (g_loss, d_loss, real_acc, fake_acc) in zip(rows, means.tolist()):
        expected = [g_loss, d_loss, real_acc, fake_acc, (real_acc + fake_acc) / 2]
        assert [float(value) for value in row.values()][1:] == pytest.approx(expected)
    assert Image.open(runs / "dcgan/images/epoch_002_samples.png").size == (10 * 34 + 2, 5 * 34 + 2)


def test_the_pictured_reconstructions_are_of_a_sampled_z(runs):
    sample.main([str(runs / "vae"), "--out", "pictures"])
    model, _ = vae.load(runs / "vae")
    x = common.load_digits(28).test[:10] / 255
    mean, log_var = model.encoder(x.flatten(1))
    noise = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))[1, :10]
    first_row = torch.cat([x, model.decoder(mean + torch.exp(0.5 * log_var) * noise).view_as(x)]).detach()
    common.save_grid("expected.png", first_row)
    drawn, expected = pixels(runs / "vae/images/epoch_003_reconstructions.png"), pixels("expected.png")
    assert (drawn[: len(expected)] - expected).abs().max() <= 1.001 / 255
    assert (pixels("pictures/reconstructions.png")[32:60] - expected[32:60]).abs().max() > 0.01  # other noise


def test_bf16_is_for_matrix_products_alone(runs, monkeypatch):
    monkeypatch.setattr(common, "bf16_pays", lambda device: True)
    for script, words, column in (("vae", VAE_RUN, "val/loss"), ("dcgan", DCGAN_RUN, "generator/loss")):
        SCRIPTS[script].main([*words, "--out", script, "--bf16", "--epochs", "1"])
        losses = [float(metrics(run)[0][column]) for run in (script, runs / script)]
        assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)
    model = lab_vae(64, 8)
    vae.speed_up(model, torch.device("cpu"), bf16=True)
    assert {output.dtype for output in model(torch.rand(2, 784))} == {torch.float32}
    logits = model.decoder.backbone[-1]
    nn.init.zeros_(logits.weight), nn.init.constant_(logits.bias, 8.0)
    torch.testing.assert_close(model.decoder(torch.randn(2, 8)), torch.sigmoid(torch.full((2, 784), 8.0)))  # bf16: 1


def test_bf16_is_used_only_where_it_pays(runs, monkeypatch, capsys):
    seconds = [1, 2, 2, 1]  # in bfloat16, in float32; the same in the run
    monkeypatch.setattr("timeit.repeat", lambda *args, **kwargs: [seconds.pop(0)])
    assert common.bf16_pays(torch.device("cpu")) and not capsys.readouterr().out
    vae.main([*VAE_RUN, "--bf16", "--out", "run"])
    assert "training in float32" in capsys.readouterr().out
    assert saved("run")["config"]["bf16"] is False and same_weights("run", runs / "vae")


BAD = {
    "vae": ["--beta nan", "--beta -1", "--beta 1 --autoencoder", "--hidden-dim 0", "--arch gru"],
    "dcgan": ["--b1 1", "--latent-dim 1.5"],
    "vae dcgan": ["--epochs 0", "--subset 0", "--lr inf", "--seed -1", "--dataset x", "--out a --resume b"],
    "sample tsne": ["", "--n 0"],
}


@pytest.mark.parametrize("script,words", [(s, w) for k, v in BAD.items() for s in k.split() for w in v])
def test_a_bad_option_is_argparses(script, words, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(words.split())
    assert stop.value.code == 2 and f"{script}.py: error: " in capsys.readouterr().err
    assert not os.listdir(".")


def test_what_a_user_can_mend_is_one_line_and_status_1(runs, monkeypatch):
    done = python(HERE / "vae.py", "--resume", "nowhere")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("vae.py: error: ") and len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr
    Path("file").touch()
    assert ABSENT in error_of("dcgan", "--device", ABSENT)
    assert str(runs) in error_of("vae", *VAE_RUN, "--out", runs)
    for script in ("sample", "tsne"):
        assert "cannot write file/" in error_of(script, runs / "vae", "--out", "file")
    monkeypatch.setattr(Path, "mkdir", MagicMock(side_effect=OSError(122, "Disk quota exceeded")))
    assert "Disk quota exceeded" in error_of("vae", *VAE_RUN)


def test_tensorboard_is_optional_and_gets_losses_and_grids(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        vae.main([*VAE_RUN, "--tensorboard"])
    assert "pip install tensorboard" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for script, words in (("vae", VAE_RUN), ("dcgan", DCGAN_RUN)):
        board = MagicMock()
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", MagicMock(SummaryWriter=board))
        SCRIPTS[script].main([*words, "--tensorboard", "--out", script])
        scalars = {(call.args[0], call.args[2]): call.args[1] for call in board().add_scalar.call_args_list}
        grids = [(call.args[0], call.args[2]) for call in board().add_image.call_args_list]
        if script == "vae":
            last = {name: float(value) for name, value in metrics("vae")[-1].items()}
            assert {name: scalars[name, 3] for name in last} == pytest.approx(last)
            assert grids == [(name, epoch) for epoch in (1, 2, 3) for name in ("reconstructions", "samples")]
        else:  # every step
            steps = saved("dcgan")["steps"]
            assert [scalars["generator/loss", step] for step in range(1, 7)] == steps[:, 0].tolist()
            assert scalars["discriminator/overall_acc", 6] == pytest.approx(steps[5, 2:].mean().item())
            assert grids == [("samples", 3), ("samples", 6)]


def test_curves_show_every_step_and_a_single_epoch(monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    rows = [{"epoch": 1, "a": 2.0, "b": 3.0}]
    common.save_curves("one.png", rows, {"title": ["a", "b"], "again": ["b"]})
    assert all(line.get_marker() == "o" for line in figures[0].axes[0].lines)
    rows.append({"epoch": 2, "a": 1.0, "b": 4.0})
    common.save_curves("two.png", rows, {"title": ["a", "b"], "again": ["b"]}, {"a": torch.arange(6.0)})
    mean, steps, other = figures[1].axes[0].lines
    assert list(mean.get_ydata()) == [2.0, 1.0] and steps.get_ydata().tolist() == [0, 1, 2, 3, 4, 5]
    assert steps.get_zorder() < mean.get_zorder() and steps.get_alpha() < 1 and len(other.get_ydata()) == 2


# --- Pictures from a checkpoint ---


def test_pictures_have_their_tiles_and_equal_seeds_give_equal_bytes(runs, capsys):
    for out, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        sample.main([str(runs / "vae"), "--out", out, "--seed", seed])
    tiles = {"samples.png": (8, 3), "interpolation.png": (11, 1), "interpolation_digits.png": (13, 1)}
    tiles["reconstructions.png"] = (10, 10)
    assert capsys.readouterr().out.split() == [f"{out}/{name}" for out in "abc" for name in tiles]
    for name, (columns, rows) in tiles.items():
        assert Image.open(f"a/{name}").size == (columns * 30 + 2, rows * 30 + 2)
        assert Path(f"a/{name}").read_bytes() == Path(f"b/{name}").read_bytes()
    assert Path("a/samples.png").read_bytes() != Path("c/samples.png").read_bytes()
    sample.main([str(runs / "dcgan"), "--out", "g", "--n", "5", "--steps", "4", "--slerp"])
    assert sorted(os.listdir("g")) == ["interpolation.png", "samples.png"]
    assert "1500 training images" in error_of("sample", runs / "vae", "--images", 0, 1500, "--out", "d")


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
    row = pixels("p/interpolation_digits.png")
    for tile, image in ((0, originals[0, 0]), (1, ends[0]), (11, ends[1]), (12, originals[1, 0])):
        assert (row[2:30, 30 * tile + 2 : 30 * tile + 30] - image).abs().max() <= 1.001 / 255


def test_the_newest_run_is_the_default(runs, capsys):
    for age, kind in enumerate(("dcgan", "vae")):
        shutil.copytree(runs / kind, f"runs/{kind}")
        os.utime(f"runs/{kind}/checkpoint.pt", (time.time() - age, time.time() - age))
    sample.main([])
    assert "runs/dcgan/samples.png" in capsys.readouterr().out
    assert tsne.parse_options([]).run == Path("runs/vae/checkpoint.pt")
    assert "neither a run of vae.py" in error_of("tsne", "runs/dcgan")


def test_tsne_draws_a_map_and_says_what_the_codes_are_worth(runs, capsys):
    for codes in ("mean", "sample", "std", "pixels"):
        tsne.main([str(runs / "vae"), "--codes", codes, "--n", "60", "--perplexity", "5", "--out", "maps"])
        output = capsys.readouterr().out
        assert f"{codes}: 1-nearest-neighbour accuracy" in output and "of the 8 dimensions of z" in output
        assert Image.open(f"maps/tsne_{codes}.png").size == (1200, 900)
    codes, labels = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    distances = ((codes[:, None] - codes) ** 2).sum(-1) + np.diag(np.full(30, np.inf))  # to the other codes
    assert tsne.nearest_neighbour_accuracy(codes, labels) == (labels[distances.argmin(1)] == labels).mean()


def test_an_autoencoder_has_no_kl_and_no_variance(capsys):
    vae.main([*VAE_RUN, "--autoencoder", "--out", "run"])
    assert "kl" not in Path("run/metrics.csv").read_text() and "KL" not in capsys.readouterr().out
    assert not saved("run")["optimizers"][0]["state"].keys() & {6, 7}  # log_var's weight and bias are not trained
    assert "no variance" in error_of("tsne", "run", "--codes", "std")
    sample.main(["run"])
    with pytest.raises(SystemExit):
        vae.main(["--resume", "run", "--beta", "1"])


@pytest.mark.parametrize("kind", ["vae", "dcgan"])
def test_the_labs_checkpoints_and_bare_weights_open(kind, runs):
    weights = saved(runs / kind)["state_dict"]
    torch.save({"epoch": 149, "pytorch-lightning_version": "1.7.7", "state_dict": weights}, "lab.ckpt")
    torch.save(weights, "bare.pt")
    torch.save({"model": kind, "epoch": 3, "state_dict": weights}, "own.pt")
    for path in ("lab.ckpt", "bare.pt", "own.pt"):
        model, config = SCRIPTS[kind].load(path)
        assert same_weights(model.state_dict(), weights) and not model.training
        assert (config["latent_dim"], config["image_shape"]) == (8, (1, 28, 28) if kind == "vae" else (1, 32, 32))
    sample.main(["lab.ckpt", "--dataset", "digits", "--out", "pictures"])
    Path("lab").mkdir()
    shutil.copy("lab.ckpt", "lab/checkpoint.pt")
    assert f"not a run of {kind}.py" in error_of(kind, "--resume", "lab")


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_bad_checkpoint_is_refused_and_nothing_in_it_runs(runs):
    whole, good = (runs / "vae" / "checkpoint.pt").read_bytes(), saved(runs / "vae")
    middle = len(whole) // 2
    bit = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    bad = {"empty": b"", "cut": whole[:middle], "bit": bit, "text": b"epoch,seconds"}
    bad["code"] = {**good, "payload": Malicious()}
    bad["foreign"] = {"model": {"weight": torch.zeros(2)}}
    bad["alien"] = {**good, "state_dict": {"encoder.mean.weight": torch.zeros(2, 2)}}
    for run, content in bad.items():
        Path(run).mkdir()
        path = Path(run, "checkpoint.pt")
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    for run in [*bad, "missing"]:
        assert run in error_of("sample", run) and run in error_of("vae", "--resume", run, "--epochs", 9)
    assert "Unsupported global" in error_of("sample", "code") and not Path("executed").exists()
    assert "Missing key(s)" in error_of("tsne", "alien")
    assert "size mismatch for encoder.backbone.0.weight" in error_of("vae", "--resume", runs / "vae", "--hidden-dim", 9)
    assert "not a run of dcgan.py" in error_of("dcgan", "--resume", runs / "vae")
    with pytest.raises(SystemExit):
        vae.main(["--resume", str(runs / "vae"), "--autoencoder"])


# --- Nothing is lost ---


KILLED_WHILE_WRITING = """
import os, signal, sys
import common, {script}
write_bytes, written = common.Path.write_bytes, []
def write_half_of_the_third_checkpoint(path, data):
    written.append(path.name)
    if written.count("checkpoint.pt.tmp") == 3:
        write_bytes(path, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_bytes(path, data)
common.Path.write_bytes = write_half_of_the_third_checkpoint
common.SAVE_EVERY = 0
{script}.main(sys.argv[1:])
"""


def test_a_killed_run_resumes_bit_for_bit_from_its_checkpoint_alone():
    processes = {}
    for script, words in (("vae", VAE_RUN), ("dcgan", DCGAN_RUN)):
        code, words = KILLED_WHILE_WRITING.format(script=script), [*words, "--epochs", "4", "--out"]
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        processes[script] = subprocess.Popen([sys.executable, "-c", code, *words, script], env=environment)
        SCRIPTS[script].main([*words, f"{script}-whole"])
    for script, process in processes.items():
        assert process.wait(timeout=100) == -signal.SIGKILL and Path(script, "checkpoint.pt.tmp").exists()
        Path("moved", script).mkdir(parents=True)
        shutil.copy(f"{script}/checkpoint.pt", f"moved/{script}")
        assert saved(f"moved/{script}")["epoch"] == 2
        SCRIPTS[script].main(["--resume", f"moved/{script}"])
        assert metrics(f"moved/{script}") == metrics(f"{script}-whole")
        assert same_weights(f"moved/{script}", f"{script}-whole")
    assert torch.equal(saved("moved/dcgan")["steps"], saved("dcgan-whole")["steps"])


def test_resuming_lays_out_adams_moments_as_the_weights():
    vae.main([*VAE_RUN, "--arch", "conv", "--epochs", "1", "--out", "one"])
    shutil.copytree("one", "other")
    checkpoint = saved("one")
    for moments in checkpoint["optimizers"][0]["state"].values():  # as a GPU would have left them
        moments.update({name: moments[name].contiguous() for name in ("exp_avg", "exp_avg_sq")})
    torch.save(checkpoint, "other/checkpoint.pt")
    for run in ("one", "other"):
        vae.main(["--resume", run, "--epochs", "2"])
    assert same_weights("one", "other")


def test_what_is_given_beside_resume_changes_the_run(runs, monkeypatch):
    shutil.copytree(runs / "vae", "run")
    Path("run/losses.png").unlink()
    vae.main(["--resume", "run"])  # it is finished: the curves are drawn again
    assert Path("run/losses.png").exists() and same_weights("run", runs / "vae")
    shutil.copytree("run", "seeded")
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    vae.main(["--resume", "run", "--epochs", "4", "--lr", "0.5"])
    assert set(rates) == {0.5} and saved("run")["config"]["lr"] == 0.5 and len(metrics("run")) == 4
    vae.main(["--resume", "seeded", "--epochs", "4", "--lr", "0.5", "--seed", "1"])
    assert not same_weights("seeded", "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_way_back(number, runs, monkeypatch, capsys):
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "argv", ["vae.py", *VAE_RUN, "--out", "run"])
    save_checkpoint = common.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(common, "save_checkpoint", lambda *args: (save_checkpoint(*args), signal.raise_signal(number)))
        common.run_script(vae.main)
    for kind, handler in handlers.items():
        signal.signal(kind, handler)
    assert stop.value.code == 130 and saved("run")["epoch"] == 1 and Path("run/losses.png").exists()
    assert capsys.readouterr().err == "vae.py: interrupted; go on with: python vae.py --resume run\n"
    vae.main(["--resume", "run"])
    assert metrics("run") == metrics(runs / "vae") and same_weights("run", runs / "vae")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint(runs, monkeypatch):
    shutil.copytree(runs / "vae", "run")
    before, write_bytes = Path("run/checkpoint.pt").read_bytes(), Path.write_bytes

    def write_half_a_checkpoint(path, data):
        if path.name != "checkpoint.pt.tmp":
            return write_bytes(path, data)
        write_bytes(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half_a_checkpoint)
        line = error_of("vae", "--resume", "run", "--epochs", 4)
    assert line.startswith("cannot write run/checkpoint.pt: No space left on device")
    assert Path("run/checkpoint.pt").read_bytes() == before and not list(Path("run").glob("*.tmp"))
    vae.main(["--resume", "run", "--epochs", "4"])
    assert len(metrics("run")) == 4


def test_divergence_is_said_only_of_what_is_not_finite(runs, monkeypatch):
    for script, words in (("vae", VAE_RUN), ("dcgan", DCGAN_RUN)):
        for batch_size in (7, 200):  # the nan comes within the epoch, or after it
            line = error_of(script, *words, "--lr", 1e300, "--batch-size", batch_size)
            assert "weight is not finite" in line and "--lr" in line
    shutil.copytree(runs / "vae", "run")
    before = Path("run/checkpoint.pt").read_bytes()
    monkeypatch.setattr(vae, "evaluate", lambda *args: (1.0, float("inf"), float("inf")))
    assert "val/kl_loss is not finite" in error_of("vae", "--resume", "run", "--epochs", 5)
    assert Path("run/checkpoint.pt").read_bytes() == before and len(metrics("run")) == 3
    monkeypatch.setattr(torch, "sigmoid", lambda x: x)  # as a student who forgot it: the traceback says where
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        vae.main([*VAE_RUN, "--out", "other"])


# --- Copying into coursework ---


def upper_half(script):
    return (HERE / f"{script}.py").read_text(encoding="utf-8").split("# === Script")[0]


PASTED = """
import sys
for name in ("common", "matplotlib", "torchvision", "sklearn", "numpy", "tqdm"):
    if name not in sys.modules: sys.modules[name] = None  # importing it fails
import torch
state, spaces = torch.get_rng_state(), [{}, {}]
for path, space in zip(sys.argv[1:], spaces):
    exec(open(path).read().split("# === Script")[0], space)
assert torch.equal(state, torch.get_rng_state())
print(sorted(name for name in spaces[0].keys() & spaces[1].keys() if name[0] != "_"))
"""


def test_the_upper_halves_need_only_torch_and_share_no_name():
    done = python("-c", PASTED, HERE / "vae.py", HERE / "dcgan.py")
    assert done.stdout.strip() == "['F', 'nn', 'torch']", done.stderr


def readme_cells():
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_cells_run_in_one_notebook(capsys):
    from matplotlib import pyplot

    write_mnist("data", common.load_digits(28).train[:64], torch.arange(64) % 10)
    pyplot.switch_backend("agg")
    notebook = {}
    for script in ("dcgan", "vae"):
        exec(upper_half(script), notebook)
    for cell in readme_cells():
        if "torch.distributed" not in cell:
            exec(cell.replace("plt.show()", "plt.close()"), notebook)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-5]) for line in lines if "nats per test image" in line]
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0]
    assert sum("last step: G" in line for line in lines) == 10
    for path in ("vae.pt", "dcgan.pt"):
        sample.main([path, "--dataset", "digits", "--out", path.removesuffix(".pt")])
    assert len(os.listdir("vae")) == 4 and len(os.listdir("dcgan")) == 2


def test_the_readmes_script_runs_on_two_processes():
    write_mnist("data", common.load_digits(28).train[:64], torch.arange(64) % 10)
    (cell,) = [cell for cell in readme_cells() if "torch.distributed" in cell]
    Path("parallel.py").write_text(upper_half("vae") + cell, encoding="utf-8")
    done = python("-m", "torch.distributed.run", "--nproc_per_node", 2, "parallel.py", CUDA_VISIBLE_DEVICES="")
    losses = [float(line.split()[2]) for line in done.stdout.splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0], done.stderr
    assert losses[0] == pytest.approx(784 * np.log(2), rel=0.01)  # that of x_pred = 1/2, with which training begins
    assert vae.load("vae.pt")[1]["latent_dim"] == 128
