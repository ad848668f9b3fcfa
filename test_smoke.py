"""The tests: mathematics against an independent computation, the scripts as users run them, and failures."""

import ast
import csv
import os
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
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
RUNS = [("vae", VAE_RUN), ("dcgan", DCGAN_RUN)]
ABSENT = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
os.environ["MPLBACKEND"] = "agg"  # as run_script sets it


@pytest.fixture(autouse=True)
def in_an_empty_folder_without_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse = MagicMock(side_effect=OSError("no network in the tests"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)  # run_script sets its own


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A trained run of each kind; tests only read them."""
    folder = tmp_path_factory.mktemp("trained")
    for script, words in RUNS:
        SCRIPTS[script].main([*words, "--out", str(folder / script)])
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


# --- The VAE's mathematics ---


def test_kl_is_that_of_torch_distributions():
    mean, log_var = torch.randn(5, 7), torch.randn(5, 7)
    q = torch.distributions.Normal(mean, log_var.exp().sqrt())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))
    torch.testing.assert_close(vae.kl_divergence(mean, log_var), kl.sum())
    assert tsne.dimensions_in_use(mean, log_var, threshold=0.9) == (kl.mean(0) > 0.9).sum()


def test_a_vae_step_is_the_one_written_out_the_slow_way():
    model, x = vae.VAE(vae.Encoder(784, 512, 128), vae.Decoder(128, 512, 784)), torch.rand(16, 784)
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
    for kind, name, value in ((nn.BatchNorm2d, "eps", 0.8), (nn.Dropout2d, "p", 0.25)):
        assert {getattr(layer, name) for layer in discriminator.model if isinstance(layer, kind)} == {value}


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
        optimizers = [torch.optim.SGD(networks[i].parameters(), lr=0.1 * (i == moving)) for i in (0, 1)]
        dcgan.gan_step(*networks, *optimizers, torch.rand(4, 1, 32, 32), torch.randn(4, 10))
        for i in (0, 1):
            equal = [torch.equal(p, q) for p, q in zip(networks[i].parameters(), before[i])]
            assert not all(equal) if i == moving else all(equal)
    with pytest.raises(ValueError, match=r"\(1, 28, 28\).*\(1, 32, 32\)"):
        dcgan.gan_step(*networks, *optimizers, torch.rand(4, 1, 28, 28), torch.randn(4, 10))


# --- Images ---


def write_mnist(n):
    """MNIST's four files in data/, with the same n digits to train and to test on."""
    images, raw = common.load_digits(28).train[:n].numpy().tobytes(), Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        Path(raw, f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, n, 28, 28) + images)
        labels = bytes(i % 10 for i in range(n))
        Path(raw, f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, n) + labels)
    return raw


def test_resizing_agrees_with_pil_to_one_gray_level():
    from torchvision import transforms

    write_mnist(40)
    ours, originals = (common.load_dataset("mnist", "data", size).train for size in (32, None))
    resize = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    slow = torch.stack([resize(Image.fromarray(image[0].numpy())) for image in originals])
    assert ours.shape == (40, 1, 32, 32) and (ours / 255 - slow).abs().max() <= 1.001 / 255


def test_batches_use_every_image_once():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    in_order = list(common.batches(images, 4))
    assert [len(batch) for batch in in_order] == [4, 4, 2]
    torch.testing.assert_close(torch.cat(in_order), images / 255)
    shuffled = torch.cat(list(common.batches(images, 4, shuffle=True)))
    assert not torch.equal(shuffled, images / 255) and torch.equal(shuffled.sort(0).values, images / 255)


@pytest.mark.parametrize("line", ["vae --arch conv --beta 1", "dcgan"])
def test_mnist_on_disk_is_used_and_a_damaged_file_is_said_to_be_damaged(line, monkeypatch):
    script, *words = line.split()
    raw, batches = write_mnist(30), MagicMock(wraps=common.batches)
    monkeypatch.setattr(common, "batches", batches)
    SCRIPTS[script].main([*words, "--epochs", "1", "--subset", "20"])
    assert os.listdir("runs") == ["vae-conv-beta1" if script == "vae" else "dcgan"]
    data = common.load_dataset("mnist", "data", 28 if script == "vae" else 32)
    (images, batch_size), options = batches.call_args_list[0]
    assert torch.equal(images.cpu(), data.train[:20]) and options == {"shuffle": True}
    assert batch_size == (1024 if script == "vae" else 64)
    assert script == "dcgan" or torch.equal(batches.call_args.args[0].cpu(), data.test)  # whole, for the validation
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert "data/MNIST is damaged: delete it" in error_of(script)


def test_without_network_the_default_falls_back_loudly_and_a_named_set_is_refused(capsys):
    vae.main(["--epochs", "1", "--hidden-dim", "8"])
    assert "WARNING: MNIST" in capsys.readouterr().err
    for name in ("mnist", "cifar10"):
        line = error_of("vae", "--dataset", name)
        assert name.upper() in line and "no network in the tests" in line and "--dataset digits" in line
    assert os.listdir("runs") == ["vae-beta10-digits"]


def test_cifar100_has_three_channels(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    split = MagicMock(data=pixels, targets=list(range(20)), classes=[f"class {i}" for i in range(100)])
    monkeypatch.setattr("torchvision.datasets.CIFAR100", lambda root, train, download: split)
    assert torch.equal(common.load_dataset("cifar100", "data").train, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    for script in ("vae", "dcgan"):
        SCRIPTS[script].main(["--dataset", "cifar100", "--epochs", "1", "--out", script])
        sample.main([script, "--n", "3"])


# --- The scripts, as users run them ---


def test_the_vae_from_the_shell(runs):
    Path("runs/vae-beta10-digits").mkdir(parents=True)  # an earlier run, which stays as it is
    done = python(HERE / "vae.py", *VAE_RUN, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr
    run, lines = Path("runs/vae-beta10-digits-2"), done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and [line.split()[0] for line in lines[2:5]] == ["1/3", "2/3", "3/3"]
    assert f"python sample.py {run}" in lines[-1] and not os.listdir("runs/vae-beta10-digits")
    rows = metrics(run)
    assert rows == metrics(runs / "vae") and same_weights(run, runs / "vae")  # the same seed: the same numbers
    columns = [f"{split}/{name}" for split in ("train", "val") for name in ("reconstruction_loss", "kl_loss", "loss")]
    assert list(rows[0]) == ["epoch", *columns] and float(rows[2]["val/loss"]) < float(rows[0]["val/loss"])
    train, val = np.array([float(rows[2][column]) for column in columns]).reshape(2, 3)
    assert (train @ [1, 10, -1], val @ [1, 10, -1]) == pytest.approx((0, 0), abs=1e-3)
    assert train[0] == pytest.approx(val[0], rel=0.5)  # both are means over images
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    grids = {f"images/epoch_00{e}_{name}.png" for e in (1, 2, 3) for name in ("samples", "reconstructions")}
    assert files == {"checkpoint.pt", "config.json", "metrics.csv", "losses.png"} | grids


def test_a_dcgan_keeps_every_step_and_their_means(runs):
    checkpoint, rows = saved(runs / "dcgan"), metrics(runs / "dcgan")
    assert (checkpoint["model"], checkpoint["epoch"], tuple(checkpoint["image_shape"])) == ("dcgan", 2, (1, 32, 32))
    adams = [optimizer["param_groups"][0] for optimizer in checkpoint["optimizers"]]
    assert [(adam["lr"], adam["betas"]) for adam in adams] == 2 * [(2e-4, (0.5, 0.999))]
    steps = checkpoint["steps"].view(2, 3, 4)  # epochs, steps, numbers; the third step has the last 2 of 12 images
    means = (steps * torch.tensor([5, 5, 2])[None, :, None]).sum(1) / 12
    for row, (g_loss, d_loss, real_acc, fake_acc) in zip(rows, means.tolist()):
        expected = [g_loss, d_loss, real_acc, fake_acc, (real_acc + fake_acc) / 2]
        assert [float(value) for value in row.values()][1:] == pytest.approx(expected)
    # one pass of the generator at each of six steps in training mode, and none for the grids
    assert checkpoint["state_dict"]["generator.conv_blocks.0.num_batches_tracked"] == 6


def test_bf16_is_for_matrix_products_alone(runs, monkeypatch):
    monkeypatch.setattr(common, "bf16_pays", lambda device: True)
    networks = []
    for (script, words), name, column in zip(RUNS, ("vae_step", "gan_step"), ("val/loss", "generator/loss")):
        step = MagicMock(wraps=getattr(SCRIPTS[script], name))
        monkeypatch.setattr(SCRIPTS[script], name, step)
        SCRIPTS[script].main([*words, "--out", script, "--bf16", "--epochs", "1"])
        losses = [float(metrics(run)[0][column]) for run in (script, runs / script)]
        assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)
        networks += step.call_args.args[: 1 if script == "vae" else 2]
    model, generator, discriminator = networks
    assert {output.dtype for output in model(torch.rand(2, 784))} == {torch.float32}
    for network, logits, x in (
        (model.decoder, model.decoder.backbone[-1], torch.randn(2, 8)),
        (generator, generator.conv_blocks[-2], torch.randn(2, 8)),
        (discriminator, discriminator.adv_layer[0], torch.rand(2, 1, 32, 32)),
    ):
        nn.init.zeros_(logits.weight), nn.init.constant_(logits.bias, 8.0)
        output = network(x)  # in bfloat16 it would be 1
        torch.testing.assert_close(output, torch.sigmoid(torch.full(output.shape, 8.0)))


def test_bf16_is_used_only_where_it_pays(runs, monkeypatch, capsys):
    seconds = [[1], [2], [2], [1], RuntimeError("no bfloat16 here")]  # in bfloat16, in float32; again; to be had?
    monkeypatch.setattr("timeit.repeat", MagicMock(side_effect=seconds))
    assert common.bf16_pays(torch.device("cpu")) and not capsys.readouterr().out
    vae.main([*VAE_RUN, "--bf16", "--epochs", "1", "--out", "run"])
    assert "training in float32" in capsys.readouterr().out and metrics("run") == metrics(runs / "vae")[:1]
    assert not common.bf16_pays(torch.device("cpu"))


def test_the_defaults_are_the_labs_and_help_shows_them(capsys):
    options, _ = vae.parse_options([])
    assert vars(options).items() >= dict(beta=10, hidden_dim=512, latent_dim=128, lr=1e-3, epochs=150, seed=0).items()
    options, _ = dcgan.parse_options([])
    assert vars(options).items() >= dict(latent_dim=100, lr=2e-4, b1=0.5, b2=0.999, epochs=150, seed=0).items()
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit):
            script.main(["--help"])
        text = capsys.readouterr().out.split("-h, --help")[1]
        assert text.count("(default:") == len(re.findall(r"\n  --", text)) > 5


BAD = ["vae --beta nan", "vae --beta 1 --autoencoder", "vae --out a --resume b", "dcgan --out a --resume b"]


@pytest.mark.parametrize("line", [*BAD, "dcgan --b1 1", "dcgan --epochs 0", "sample", "tsne --n 2"])
def test_a_bad_option_is_argparses(line, capsys):
    script, *words = line.split()
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(words)
    assert stop.value.code == 2 and f"{script}.py: error: " in capsys.readouterr().err and not os.listdir(".")


def test_what_a_user_can_mend_is_one_line_and_status_1(runs, monkeypatch):
    for line in ("vae.py --resume nowhere", "dcgan.py --resume nowhere", "sample.py nowhere", "tsne.py nowhere"):
        script = line.split()[0]
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(HERE / script), run_name="__main__")
        assert re.fullmatch(rf"{script}: error: .*nowhere.*", stop.value.code)  # a text: Python prints it, status 1
    with pytest.raises(ZeroDivisionError):  # anything else keeps its traceback
        common.run_script(lambda: 1 / 0)
    assert ABSENT in error_of("dcgan", "--device", ABSENT)
    assert str(runs) in error_of("vae", *VAE_RUN, "--out", runs)


@pytest.mark.parametrize("script,words", RUNS)
def test_tensorboard_gets_losses_and_grids(script, words, monkeypatch, capsys):
    module = MagicMock()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    SCRIPTS[script].main([*words, "--tensorboard", "--out", "run"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    if script == "vae":
        name, losses = "val/loss", [float(row["val/loss"]) for row in metrics("run")]
        grids = [(picture, epoch) for epoch in (1, 2, 3) for picture in ("reconstructions", "samples")]
    else:  # every step
        name, losses = "generator/loss", saved("run")["steps"][:, 0].tolist()
        grids = [("samples", 3), ("samples", 6)]
    board = module.SummaryWriter()
    logged = {call.args[2]: call.args[1] for call in board.add_scalar.call_args_list if call.args[0] == name}
    assert logged == pytest.approx(dict(enumerate(losses, start=1)))
    assert [call.args[::2] for call in board.add_image.call_args_list] == grids


def test_curves_show_every_step_and_a_single_epoch(monkeypatch):
    figures, panels = [], {"title": ["a", "b"], "again": ["b"]}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *args, **kwargs: figures.append(self))
    rows = [{"epoch": 1, "a": 2.0, "b": 3.0}, {"epoch": 2, "a": 1.0, "b": 4.0}]
    common.save_curves("one.png", rows[:1], panels)
    assert [line.get_marker() for line in figures[0].axes[0].lines] == ["o", "o"]
    common.save_curves("two.png", rows, panels, {"a": torch.arange(6.0)})
    mean, steps, other = figures[1].axes[0].lines
    assert (list(mean.get_ydata()), list(other.get_ydata())) == ([2.0, 1.0], [3.0, 4.0])
    assert list(steps.get_ydata()) == [0, 1, 2, 3, 4, 5]
    assert steps.get_zorder() < mean.get_zorder() and steps.get_alpha() < 1


# --- Pictures from a checkpoint ---


def test_every_picture_shows_what_it_is_called(runs):
    words = ["--out", "p", "--n", "16", "--steps", "8", "--images", "3", "7", "--seed", "5", "--device", "cpu"]
    sample.main([str(runs / "vae"), *words])
    model, data = vae.load(runs / "vae")[0], common.load_digits(28)
    run_noise, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(5)
    fixed_z, fixed_epsilon = torch.randn(2, 50, 8, generator=run_noise)
    z, epsilon = torch.randn(2 + 16, 8, generator=noise), torch.randn(50, 8, generator=noise)
    x, ends, alpha = data.test[:10] / 255, data.train[[3, 7]] / 255, torch.linspace(0, 1, 8)[:, None]
    (mean, log_var), (end_means, _) = model.encoder(x.flatten(1)), model.encoder(ends.flatten(1))

    def decode(z):
        return model.decoder(z).view(-1, 1, 28, 28)

    def reconstructions(epsilon):  # from a sampled z, the first of the rows
        return torch.cat([x, decode(mean + torch.exp(0.5 * log_var) * epsilon[:10])])

    path = decode((1 - alpha) * end_means[0] + alpha * end_means[1])
    validation_z = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for picture, images, columns in (
        (runs / "vae/images/epoch_003_samples.png", decode(fixed_z), 10),
        (runs / "vae/images/epoch_003_reconstructions.png", reconstructions(fixed_epsilon), 10),
        (runs / "dcgan/images/epoch_002_samples.png", dcgan.load(runs / "dcgan")[0]["generator"](validation_z), 10),
        ("p/samples.png", decode(z[2:]), 8),
        ("p/interpolation.png", decode((1 - alpha) * z[0] + alpha * z[1]), 8),
        ("p/interpolation_digits.png", torch.cat([ends[:1], path, ends[1:]]), 10),
        ("p/reconstructions.png", reconstructions(epsilon), 10),
    ):
        common.save_grid("expected.png", images.detach(), columns)
        drawn, expected = (np.asarray(Image.open(path)).astype(int) for path in (picture, "expected.png"))
        assert abs(drawn[: len(expected)] - expected).max() <= 1, picture


def test_an_interpolation_ends_in_the_two_codes():
    z1, z2 = torch.randn(2, 50)
    for path in (sample.interpolate, sample.slerp):
        torch.testing.assert_close(path(z1, z2, 11)[[0, -1]], torch.stack([z1, z2]))
    on_sphere = sample.slerp(F.normalize(z1, dim=0), F.normalize(z2, dim=0), 11)
    torch.testing.assert_close(on_sphere.norm(dim=1), torch.ones(11))
    assert torch.isfinite(sample.slerp(z1, z1, 3)).all()


def test_the_newest_run_is_the_default(runs):
    for age, kind in enumerate(("vae", "dcgan")):
        shutil.copytree(runs / kind, f"runs/{kind}")
        os.utime(f"runs/{kind}/checkpoint.pt", (age, age))
    assert sample.parse_options([]).run == Path("runs/dcgan/checkpoint.pt")
    assert tsne.parse_options([]).run == Path("runs/vae/checkpoint.pt")


def test_tsne_maps_the_codes_that_it_names(runs, capsys, monkeypatch):
    fitted = []
    monkeypatch.setattr("sklearn.manifold.TSNE.fit_transform", lambda self, x: (fitted.append(x), x[:, :2])[1])
    model, data, noise = vae.load(runs / "vae")[0], common.load_digits(28), torch.Generator().manual_seed(0)
    chosen = torch.randperm(297, generator=noise)[:60]  # without replacement
    x, labels = data.test.flatten(1) / 255, data.test_labels[chosen].numpy()
    mean, log_var = model.encoder(x)
    std = torch.exp(0.5 * log_var)
    sampled = mean + std * torch.randn(mean.shape, generator=noise)
    for name, codes in {"mean": mean, "sample": sampled, "std": std, "pixels": x}.items():
        tsne.main([str(runs / "vae"), "--codes", name, "--n", "60", "--out", "maps", "--device", "cpu"])
        codes = codes[chosen].detach().numpy()
        np.testing.assert_allclose(fitted[-1], codes, rtol=1e-4, atol=1e-6)
        distances = ((codes[:, None] - codes) ** 2).sum(-1) + np.diag(np.full(60, np.inf))  # to the other codes
        accuracy = (labels[distances.argmin(1)] == labels).mean()
        assert f"{name}: 1-nearest-neighbour accuracy {accuracy:.1%} of the codes" in capsys.readouterr().out
        assert Image.open(f"maps/tsne_{name}.png").size == (1200, 900)


def test_an_autoencoder_samples_nothing_and_has_no_kl(capsys):
    vae.main([*VAE_RUN, "--autoencoder", "--epochs", "1"])
    run, x = "runs/vae-autoencoder-digits", torch.rand(6, 784)
    model, _ = vae.load(run)
    x_pred, mean, _ = model(x)
    assert torch.equal(x_pred, model.decoder(mean))
    assert "kl" not in Path(run, "metrics.csv").read_text() and "KL" not in capsys.readouterr().out
    assert not saved(run)["optimizers"][0]["state"].keys() & {6, 7}  # log_var's weight and bias are not trained
    assert "no variance" in error_of("tsne", run, "--codes", "std")


@pytest.mark.parametrize("kind,image_shape", [("vae", (1, 28, 28)), ("dcgan", (1, 32, 32))])
def test_the_labs_checkpoints_and_bare_weights_open(kind, image_shape, runs):
    weights = saved(runs / kind)["state_dict"]
    torch.save({"epoch": 149, "pytorch-lightning_version": "1.7.7", "state_dict": weights}, "lab.ckpt")
    torch.save(weights, "bare.pt")
    for path in ("lab.ckpt", "bare.pt"):
        model, config = SCRIPTS[kind].load(path)
        assert same_weights(model.state_dict(), weights) and not model.training
        assert (config["latent_dim"], config["image_shape"]) == (8, image_shape)
    sample.main(["lab.ckpt", "--dataset", "digits", "--out", "pictures"])


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_bad_checkpoint_is_refused_and_nothing_in_it_runs(runs):
    whole, good = (runs / "vae" / "checkpoint.pt").read_bytes(), saved(runs / "vae")
    i = whole.index(good["state_dict"]["encoder.mean.bias"].numpy().tobytes())
    Path("cut.pt").write_bytes(whole[:i])
    Path("bit.pt").write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
    torch.save({**good, "payload": Malicious()}, "code.pt")
    torch.save({**good, "state_dict": {"encoder.mean.weight": torch.zeros(2, 2)}}, "alien.pt")
    reasons = {"cut.pt": "not a zip file", "bit.pt": "checksum", "code.pt": "Unsupported global"}
    for path, reason in {**reasons, "alien.pt": "Missing key(s)"}.items():
        line = error_of("sample", path)
        assert path in line and reason in line
    assert not Path("executed").exists()
    assert "size mismatch for encoder.backbone.0.weight" in error_of("vae", "--resume", runs / "vae", "--hidden-dim", 9)
    assert "not a run of dcgan.py" in error_of("dcgan", "--resume", runs / "vae")


# --- Nothing is lost ---


@pytest.mark.parametrize("script,words", RUNS)
def test_a_killed_run_resumes_bit_for_bit_from_its_checkpoint_alone(script, words, monkeypatch):
    write_bytes, written = Path.write_bytes, []

    def write(path, data):
        written.append(path.name)
        if path.name == "checkpoint.pt.tmp" and written.count(path.name) == 3:
            write_bytes(path, data[: len(data) // 2])
            shutil.copytree("whole", "killed")  # the disk, as a kill at this moment leaves it
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        patch.setattr(common, "SAVE_EVERY", 0)
        SCRIPTS[script].main([*words, "--epochs", "4", "--out", "whole"])
    assert {f"{path.name}.tmp" for path in Path("whole").rglob("*.*")} == set(written)  # each beside its place first
    Path("alone").mkdir()
    shutil.copy("killed/checkpoint.pt", "alone")
    assert saved("alone")["epoch"] == 2 and Path("killed/checkpoint.pt.tmp").exists()
    for run in ("killed", "alone"):
        SCRIPTS[script].main(["--resume", run])
        assert metrics(run) == metrics("whole") and same_weights(run, "whole")
        assert script == "vae" or torch.equal(saved(run)["steps"], saved("whole")["steps"])


def test_restored_moments_are_laid_out_as_the_weights():
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    network(torch.rand(1, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    state, expected = optimizer.state_dict(), optimizer.state[network.weight]["exp_avg"].clone()
    state["state"][0]["exp_avg"] = expected.contiguous()  # as a GPU would have left it
    common.restore("run", {"state_dict": network.state_dict(), "optimizers": [state]}, network, [optimizer])
    restored = optimizer.state[network.weight]["exp_avg"]
    assert torch.equal(restored, expected) and restored.stride() == network.weight.stride()


def test_what_is_given_beside_resume_changes_the_run(runs, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    for run, words in (("run", []), ("seeded", ["--seed", "1"])):
        shutil.copytree(runs / "vae", run)
        vae.main(["--resume", run, "--epochs", "4", "--lr", "0.5", *words])
    config = {**saved(runs / "vae")["config"], "resume": "run", "epochs": 4, "lr": 0.5}
    assert set(rates) == {0.5} and saved("run")["config"] == config and len(metrics("run")) == 4
    assert not same_weights("seeded", "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_way_back(number, runs, monkeypatch, capsys):
    def interrupted_step(*args):
        if step.call_count == 6:  # in the middle of the second epoch
            signal.raise_signal(number)
        return vae_step(*args)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    vae_step, step = vae.vae_step, MagicMock(side_effect=interrupted_step)
    monkeypatch.setattr(sys, "argv", ["vae.py", *VAE_RUN, "--out", "run"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(vae, "vae_step", step)
        common.run_script(vae.main)
    assert stop.value.code == 130 and saved("run")["epoch"] == 1 and Path("run/losses.png").exists()
    assert capsys.readouterr().err == "vae.py: interrupted; go on with: python vae.py --resume run\n"
    vae.main(["--resume", "run"])
    assert metrics("run") == metrics(runs / "vae") and same_weights("run", runs / "vae")


def test_a_full_disk_is_one_line_and_leaves_the_old_file(monkeypatch):
    write_bytes = Path.write_bytes

    def write_half(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    common.save_checkpoint("run/checkpoint.pt", {"epoch": 1})
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(common.Error, match="^cannot write run/checkpoint.pt: No space left on device.*$"):
        common.save_checkpoint("run/checkpoint.pt", {"epoch": 2})
    assert saved("run") == {"epoch": 1} and os.listdir("run") == ["checkpoint.pt"]


def test_divergence_is_said_only_of_what_is_not_finite(runs, monkeypatch):
    for script, words in RUNS:
        line = error_of(script, *words, "--lr", 1e300, "--batch-size", 7)
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


def test_the_upper_halves_need_only_torch_and_share_no_name():
    halves = [ast.parse(upper_half(script)).body[1:] for script in ("vae", "dcgan")]  # after the docstrings
    for half in halves:
        imports = [ast.unparse(node) for node in half[:3]]
        assert imports == ["import torch", "import torch.nn.functional as F", "from torch import nn"]
        assert all(isinstance(node, (ast.ClassDef, ast.FunctionDef)) for node in half[3:])
    names = [node.name for half in halves for node in half[3:]]
    assert len(names) == len(set(names))


def readme_cells():
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_cells_run_in_one_notebook(capsys):
    write_mnist(64)
    notebook = {}
    exec(upper_half("dcgan") + upper_half("vae"), notebook)
    for cell in readme_cells():
        if "torch.distributed" not in cell:
            exec(cell.replace("plt.show()", "plt.close()").replace("epoch in range(10)", "epoch in range(3)"), notebook)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-5]) for line in lines if "nats per test image" in line]
    assert len(losses) == 3 and losses[-1] < losses[0] and sum("last step: G" in line for line in lines) == 3
    vae.load("vae.pt"), dcgan.load("dcgan.pt")


def test_the_readmes_script_runs_on_two_processes():
    write_mnist(64)
    (cell,) = [cell for cell in readme_cells() if "torch.distributed" in cell]
    Path("parallel.py").write_text(upper_half("vae") + cell, encoding="utf-8")
    done = python("-m", "torch.distributed.run", "--nproc_per_node", 2, "parallel.py", CUDA_VISIBLE_DEVICES="")
    losses = [float(line.split()[2]) for line in done.stdout.splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0], done.stderr
    assert losses[0] == pytest.approx(784 * np.log(2), rel=0.01)  # that of x_pred = 1/2, with which training begins
    assert vae.load("vae.pt")[1]["latent_dim"] == 128
