"""The tests: mathematics against an independent computation, the scripts as users run them, and what they promise."""

import ast
import copy
import csv
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
DIGITS = ["--dataset", "digits", "--device", "cpu"]
SMALL = [*DIGITS, "--subset", "200", "--latent-dim", "8", "--epochs", "3"]
TRAINED = {  # run: its command, as a user types it
    "vae-beta10-digits-z8": ["vae.py", *SMALL, "--hidden-dim", "32"],
    "vae-conv-beta1-digits-z2": ["vae.py", *SMALL, "--latent-dim", "2", "--arch", "conv", "--beta", "1"],
    "vae-autoencoder-digits-z8": ["vae.py", *SMALL, "--autoencoder"],
    "dcgan-digits-z8": ["dcgan.py", *SMALL, "--subset", "24", "--batch-size", "10"],
}
VAE, CONV, AUTOENCODER, DCGAN = TRAINED


def start(*words, **environment):
    """Start Python in the current folder, with its output buffered, as it is for a user."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **environment}
    words, pipe = [sys.executable, *map(str, words)], subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with runs/, trained from the shell and all at the same time, and what they printed; only read it."""
    folder, printed = tmp_path_factory.mktemp("trained"), {}
    os.chdir(folder)
    processes = {run: start(HERE / script, *words) for run, (script, *words) in TRAINED.items()}
    for run, process in processes.items():
        printed[run], errors = process.communicate(timeout=100)
        assert (process.returncode, errors) == (0, "")
    return SimpleNamespace(runs=folder / "runs", printed=printed)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error_of(script, *words):
    """The one line with which a script refuses what it is given."""
    with pytest.raises(common.Error) as error:
        SCRIPTS[script].main([str(word) for word in words])
    assert "\n" not in str(error.value)
    return str(error.value)


def metrics(run):
    """The rows of metrics.csv as numbers, without their times."""
    with Path(run, "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [{name: row[name] for name in row if name not in ("seconds", "images_per_second")} for row in rows]


def saved(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def assert_same(one, other):
    """Two runs have the same weights, moments, steps and metrics, to the last bit."""
    assert metrics(one) == metrics(other)
    one, other = saved(one), saved(other)
    for key in ("state_dict", "steps"):
        torch.testing.assert_close(one.get(key, 0), other.get(key, 0), rtol=0, atol=0)
    for key in ("optimizer", "optimizer_g", "optimizer_d"):
        torch.testing.assert_close(one.get(key, {}).get("state"), other.get(key, {}).get("state"), rtol=0, atol=0)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def grid(images, columns=10):
    """The pixels of images that are written as a grid."""
    common.save_grid(Path("expected.png"), images.detach(), columns)
    return pixels("expected.png")


# --- The VAE's mathematics ---


def test_kl_is_that_of_torch_distributions():
    mean, log_var = torch.randn(5, 7), torch.randn(5, 7)
    q = torch.distributions.Normal(mean, log_var.exp().sqrt())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))
    torch.testing.assert_close(vae.kl_divergence(mean, log_var), kl.sum())
    assert tsne.dimensions_in_use(mean, log_var, threshold=0.9) == (kl.mean(0) > 0.9).sum()


def test_a_vae_step_is_the_two_formulas():
    model, x = vae.VAE(vae.Encoder(784, 512, 128), vae.Decoder(128, 512, 784)), torch.rand(16, 784)
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    losses = vae.vae_step(model, torch.optim.SGD(model.parameters(), lr=0.5), x, beta=10)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    h = linear(linear(x, "encoder.backbone.0").clamp(min=0), "encoder.backbone.2").clamp(min=0)
    mean, log_var = linear(h, "encoder.mean"), linear(h, "encoder.log_var")
    torch.manual_seed(3)
    z = mean + log_var.exp().sqrt() * torch.randn(16, 128)
    h = linear(linear(z, "decoder.backbone.0").clamp(min=0), "decoder.backbone.2").clamp(min=0)
    x_pred = 1 / (1 + torch.exp(-linear(h, "decoder.backbone.4")))
    reconstruction = -(x * x_pred.log() + (1 - x) * (1 - x_pred).log()).sum()
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum()
    (reconstruction + 10 * kl).backward()
    torch.testing.assert_close(losses, (reconstruction.detach(), kl.detach()), rtol=1e-4, atol=1e-3)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-3, atol=1e-3, msg=name)
        torch.testing.assert_close(p, w[name] - 0.5 * w[name].grad, rtol=1e-3, atol=1e-3, msg=name)


def test_evaluate_gives_means_over_images_not_batches():
    model, x = vae.VAE(vae.Encoder(12, 8, 4), vae.Decoder(4, 8, 12)), torch.rand(10, 1, 3, 4)
    nn.init.zeros_(model.encoder.log_var.weight), nn.init.constant_(model.encoder.log_var.bias, -50)  # no noise
    x_pred, mean, log_var = model(x.flatten(1))
    reconstruction = F.binary_cross_entropy(x_pred, x.flatten(1)).item() * 12
    kl = vae.kl_divergence(mean, log_var).item() / 10
    pairs = [(part, torch.zeros(len(part))) for part in x.split(4)]  # as a DataLoader gives them, the last one smaller
    for batches in ([x], pairs):
        assert vae.evaluate(model, batches, beta=2.0) == pytest.approx((reconstruction, kl, reconstruction + 2 * kl))
    assert not model.training


# --- The DCGAN's mathematics ---


def test_the_networks_have_the_labs_sizes_and_names():
    generator, discriminator = dcgan.Generator(100, (1, 32, 32)), dcgan.Discriminator((1, 32, 32))
    assert discriminator(generator(torch.randn(2, 100))).shape == (2, 1)
    for network, parameters, layers in (
        (vae.Encoder(784, 512, 128), 795_904, "backbone.0 backbone.2 mean log_var"),
        (vae.Decoder(128, 512, 784), 730_896, "backbone.0 backbone.2 backbone.4"),
        (generator, 1_049_985, "l1.0 " + " ".join(f"conv_blocks.{i}" for i in (0, 2, 3, 6, 7, 9))),
        (discriminator, 98_113, "adv_layer.0 " + " ".join(f"model.{i}" for i in (0, 3, 6, 7, 10, 11, 14))),
    ):
        assert sum(p.numel() for p in network.parameters()) == parameters
        assert {name.rsplit(".", 1)[0] for name in network.state_dict()} == set(layers.split())
    norms = [layer.eps for layer in discriminator.modules() if isinstance(layer, nn.BatchNorm2d)]
    dropouts = [layer.p for layer in discriminator.modules() if isinstance(layer, nn.Dropout2d)]
    assert (norms, dropouts) == ([0.8] * 3, [0.25] * 4)


def test_fused_upsampling_gives_the_same_images_and_gradients():
    lab, fused = (dcgan.Generator(10, (3, 32, 32)).double() for _ in range(2))
    fused.load_state_dict(lab.state_dict())
    dcgan.fuse_upsampling(fused)
    assert sum(isinstance(layer, dcgan.UpsampleConv2d) for layer in fused.modules()) == 2
    torch.testing.assert_close(fused.state_dict(), lab.state_dict(), rtol=0, atol=0)
    z = torch.randn(4, 10, dtype=torch.double)
    torch.testing.assert_close(fused(z), lab(z))
    for network in (fused, lab):
        (network(z) ** 2).sum().backward()
    for (name, p), q in zip(fused.named_parameters(), lab.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_a_gan_step_is_the_two_losses_in_the_labs_order():
    torch.manual_seed(0)
    generator, discriminator = dcgan.Generator(10, (1, 32, 32)).double(), dcgan.Discriminator((1, 32, 32)).double()
    for layer in discriminator.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
    old_g, old_d = copy.deepcopy(generator), copy.deepcopy(discriminator)
    images, z = torch.rand(6, 1, 32, 32, dtype=torch.double), torch.randn(6, 10, dtype=torch.double)
    passes = []
    discriminator.register_forward_pre_hook(lambda network, inputs: passes.append(inputs[0]))
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (generator, discriminator)]
    losses_and_accuracies = dcgan.gan_step(generator, discriminator, *optimizers, images, z)

    # both losses are of the networks as they were before: G moves first, but D sees the images made before that
    fakes = old_g(z)
    fake_score, real_score = old_d(fakes), old_d(images)
    g_loss = -fake_score.log().mean()
    d_loss = -0.5 * (real_score.log().mean() + (1 - fake_score).log().mean())
    accuracies = [(real_score > 0.5).float().mean(), (fake_score <= 0.5).float().mean()]
    torch.testing.assert_close(list(losses_and_accuracies), [g_loss.detach(), d_loss.detach(), *accuracies])
    for new, old, loss in ((generator, old_g, g_loss), (discriminator, old_d, d_loss)):
        gradients = torch.autograd.grad(loss, list(old.parameters()), retain_graph=True)
        for p, q, gradient in zip(new.parameters(), old.parameters(), gradients):
            torch.testing.assert_close(p, q - 0.1 * gradient)
    assert len(passes) == 3 and torch.equal(passes[1], images) and torch.equal(passes[0], passes[2])
    assert passes[0].requires_grad and not passes[2].requires_grad
    with pytest.raises(ValueError, match=r"\(1, 28, 28\).*\(1, 32, 32\)"):
        dcgan.gan_step(generator, discriminator, *optimizers, images[:, :, :28, :28], z)


# --- Images ---


def write_mnist():
    """MNIST's four files in data/, with the same 64 digits to train and to test on."""
    images, raw = common.load_digits(28).train[:64].numpy().tobytes(), Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        Path(raw, f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 64, 28, 28) + images)
        labels = bytes(i % 10 for i in range(64))
        Path(raw, f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 64) + labels)
    return raw


def test_mnist_on_disk_is_resized_as_pil_does_and_trained_on(monkeypatch):
    from torchvision import transforms

    raw = write_mnist()
    ours, originals = (common.load_dataset("mnist", "data", size).train for size in (32, None))
    resize = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    slow = torch.stack([resize(Image.fromarray(image[0].numpy())) for image in originals])
    assert ours.shape == (64, 1, 32, 32) and (ours / 255 - slow).abs().max() <= 1.001 / 255

    passes, batches = [], common.batches

    def recorded(images, batch_size, shuffle=False):
        passes.append((tuple(images.shape), batch_size, shuffle))
        return batches(images, batch_size, shuffle)

    monkeypatch.setattr(common, "batches", recorded)
    vae.main(["--epochs", "1", "--subset", "20"])
    dcgan.main(["--epochs", "1", "--subset", "20"])
    assert sorted(os.listdir("runs")) == ["dcgan", "vae-beta10"]
    assert passes == [((20, 1, 28, 28), 1024, True), ((64, 1, 28, 28), 1024, False), ((20, 1, 32, 32), 64, True)]
    os.truncate(raw / "train-images-idx3-ubyte", 1000)
    assert "MNIST is not available in data/ (" in error_of("vae", "--dataset", "mnist")


def test_without_mnist_the_default_is_digits_and_a_named_set_is_an_error():
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    default = start(HERE / "vae.py", "--epochs", 1, "--hidden-dim", 8, "--data", "nowhere", no_proxy="", **proxies)
    named = start(HERE / "dcgan.py", "--dataset", "mnist", "--data", "nowhere", no_proxy="", **proxies)
    (_, warning), (_, error) = default.communicate(timeout=100), named.communicate(timeout=100)
    assert (default.returncode, named.returncode, os.listdir("runs")) == (0, 1, ["vae-beta10-digits"])
    assert "WARNING: MNIST is not available in nowhere/" in warning and "DIGITS" in warning
    assert re.fullmatch(r"dcgan.py: error: MNIST is not available in nowhere/ \(\w+: .*refused.*\)\n", error)


def test_cifar_has_three_channels(monkeypatch):
    array = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    split = SimpleNamespace(data=array, targets=list(range(50)), classes=[f"class {i}" for i in range(100)])
    monkeypatch.setattr("torchvision.datasets.CIFAR100", lambda root, train, download: split)
    assert torch.equal(common.load_dataset("cifar100", "data").train, torch.from_numpy(array).permute(0, 3, 1, 2))
    vae.main(["--arch", "conv", "--dataset", "cifar100", "--epochs", "1"])
    dcgan.main(["--dataset", "cifar100", "--epochs", "1"])
    sample.main(["runs/vae-conv-beta10-cifar100", "runs/dcgan-cifar100"])
    tsne.main(["--n", "40"])


def test_batches_use_every_image_once():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    assert [len(batch) for batch in common.batches(images, 4)] == [4, 4, 2]
    torch.testing.assert_close(torch.cat(list(common.batches(images, 4))), images / 255)
    shuffled = torch.cat(list(common.batches(images, 4, shuffle=True)))
    assert not torch.equal(shuffled, images / 255) and torch.equal(shuffled.sort(0).values, images / 255)


# --- The scripts, as users run them ---


@pytest.mark.parametrize("run", TRAINED)
def test_a_training_from_the_shell(run, trained):
    folder, rows, lines = trained.runs / run, metrics(trained.runs / run), trained.printed[run].splitlines()
    kinds = ["samples"] if run == DCGAN else ["samples", "reconstructions"]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    grids = {f"images/epoch_00{epoch}_{kind}.png" for epoch in (1, 2, 3) for kind in kinds}
    assert files == {"checkpoint.pt", "metrics.csv", "losses.png"} | grids
    assert saved(folder)["config"]["batch_size"] == (10 if run == DCGAN else 64)  # the default for so few images
    assert saved(folder)["epoch"] == len(rows) == 3 and np.isfinite([list(row.values()) for row in rows]).all()
    assert max(map(len, lines)) <= 80 and [line.split()[0] for line in lines[4:7]] == ["1/3", "2/3", "3/3"]
    assert lines[0] == f"runs/{run}: 0 of 3 epochs are done" and "parameters on cpu, in float32" in lines[1]
    assert lines[2] == f"if interrupted: python {TRAINED[run][0]} --resume runs/{run}"


@pytest.mark.parametrize("run", [VAE, CONV, AUTOENCODER])
def test_the_losses_of_a_vae_add_up_and_fall(run, trained):
    rows, names = metrics(trained.runs / run), ["loss", "reconstruction_loss", "kl_loss"]
    for row, line in zip(rows, trained.printed[run].splitlines()[4:]):
        loss, reconstruction, beta, kl = map(float, re.search(r"(\S+) = (\S+) \+ (\S+) \* (\S+)$", line).groups())
        assert [loss, reconstruction, kl] == pytest.approx([row[f"val/{name}"] for name in names], abs=0.006)
        for split in ("train", "val"):
            total, *parts = (row[f"{split}/{name}"] for name in names)
            assert total == pytest.approx(parts[0] + beta * parts[1])
        assert (row["val/kl_loss"] == 0) == (run == AUTOENCODER)  # it samples nothing
    assert rows[2]["val/loss"] < rows[0]["val/loss"]
    assert rows[2]["train/loss"] == pytest.approx(rows[2]["val/loss"], rel=0.5)  # both are means over images


def test_an_autoencoder_samples_nothing(trained):
    model, x = vae.load(trained.runs / AUTOENCODER)[0], torch.rand(6, 784)
    assert torch.equal(model(x)[0], model.decoder(model.encoder(x)[0]))


def test_a_dcgan_keeps_every_step_and_their_means(trained):
    checkpoint, rows = saved(trained.runs / DCGAN), metrics(trained.runs / DCGAN)
    for name in ("optimizer_g", "optimizer_d"):
        adam = checkpoint[name]["param_groups"][0]
        assert (adam["lr"], adam["betas"]) == (2e-4, (0.5, 0.999))
    means = checkpoint["steps"].view(3, 3, 4).mean(1)  # epochs, steps of 10, 10 and 4 images, numbers
    for row, (g_loss, d_loss, real_acc, fake_acc) in zip(rows, means.tolist()):
        expected = [row["epoch"], g_loss, d_loss, real_acc, fake_acc, (real_acc + fake_acc) / 2]
        assert list(row.values()) == pytest.approx(expected)
    # one pass of the generator at each of nine steps in training mode, and none for the grids
    assert checkpoint["state_dict"]["generator.conv_blocks.0.num_batches_tracked"] == 9


def test_bf16_leaves_the_sigmoids_in_float32():
    model = vae.VAE(vae.Encoder(784, 32, 8), vae.Decoder(8, 32, 784))
    discriminator = dcgan.Discriminator((1, 32, 32))
    common.use_bf16(model, [model.encoder.mean, model.encoder.log_var, model.decoder.backbone])
    common.use_bf16(discriminator, [discriminator.adv_layer[0]])
    for logits in (model.decoder.backbone[-1], discriminator.adv_layer[0]):
        nn.init.zeros_(logits.weight), nn.init.constant_(logits.bias, 8.0)
    for output in (*model(torch.rand(2, 784)), discriminator(torch.rand(2, 1, 32, 32))):
        assert output.dtype == torch.float32
        if output.shape[1] != 8:  # not mean and log_var: the sigmoid, which in bfloat16 would be 1
            torch.testing.assert_close(output, torch.sigmoid(torch.full(output.shape, 8.0)))


@pytest.mark.parametrize("run", [VAE, DCGAN])
def test_bf16_is_close_to_float32(run, trained):
    script, *words = TRAINED[run]
    SCRIPTS[script[:-3]].main([*words, "--bf16", "--epochs", "1"])
    (row,), full = metrics(f"runs/{run}"), metrics(trained.runs / run)[0]
    assert row != full and row == pytest.approx(full, rel=0.02)


def test_tensorboard_gets_each_epoch(monkeypatch):
    logged, board = {}, SimpleNamespace(flush=lambda: None)
    board.add_scalar = board.add_image = lambda name, value, epoch: logged.update({(name, epoch): value})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda *_, **__: board))
    dcgan.main([*SMALL, "--subset", "5", "--epochs", "2", "--tensorboard", "--out", "run"])
    assert [logged["generator/loss", epoch] for epoch in (1, 2)] == [row["generator/loss"] for row in metrics("run")]
    assert logged["samples", 2].shape == (3, 172, 342)


def test_the_defaults_are_the_labs_and_help_shows_them(capsys):
    options = vars(vae.parse_options([])[0])
    lab = {"beta": 10, "arch": "fc", "hidden_dim": 512, "latent_dim": 128, "lr": 1e-3, "epochs": 150, "seed": 0}
    assert options.items() >= lab.items() and not options["autoencoder"] and not options["bf16"]
    options = vars(dcgan.parse_options([])[0])
    lab = {"latent_dim": 100, "lr": 2e-4, "b1": 0.5, "b2": 0.999, "batch_size": 64, "epochs": 150, "seed": 0}
    assert options.items() >= lab.items() and not options["bf16"]
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit):
            script.main(["--help"])
        text = capsys.readouterr().out.split("-h, --help")[1]
        assert text.count("(default:") == len(re.findall(r"\n  --", text)) > 5


BAD = ["vae --beta nan", "vae --beta -1", "vae --epochs 0", "vae --resume RUN --out b", "dcgan --subset 0"]


@pytest.mark.parametrize("line", BAD)
def test_a_bad_option_is_argparses(line, trained, capsys):
    script, *words = line.replace("RUN", str(trained.runs / VAE)).split()
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(words)
    assert stop.value.code == 2 and f"{script}.py: error: " in capsys.readouterr().err and not os.listdir(".")


# --- What a run promises ---


def test_no_run_takes_the_folder_of_another():
    Path("taken").mkdir()
    assert "'taken' exists" in error_of("vae", *SMALL, "--out", "taken") and not os.listdir("taken")
    words = ["-c", "import common; print(common.new_folder(None, 'vae').as_posix())"]
    processes = [start(*words, PYTHONPATH=str(HERE)) for _ in range(2)]
    folders = {process.communicate(timeout=100)[0].strip() for process in processes}
    assert folders == {"runs/vae", "runs/vae-2"}
    assert common.new_folder("deep/er", "vae").is_dir()


@pytest.mark.parametrize("run", [VAE, DCGAN])
def test_a_killed_run_resumes_to_the_same_bits(run, trained, monkeypatch):
    script, *words = TRAINED[run]
    main, save = SCRIPTS[script[:-3]].main, torch.save

    def save_half(checkpoint, path):
        assert str(os.getpid()) in path.name  # two processes that resume one run do not share it
        save(checkpoint, path)
        if checkpoint["epoch"] == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(torch, "save", save_half)
        main([*words, "--out", "killed"])
    assert saved("killed")["epoch"] == 1 and len(list(Path("killed").glob("checkpoint*"))) == 1
    Path("alone").mkdir()
    shutil.copy("killed/checkpoint.pt", "alone")
    main(["--resume", "killed"])
    main(["--resume", "alone/checkpoint.pt"])
    assert_same("killed", trained.runs / run)
    assert_same("alone", trained.runs / run)
    assert sorted(os.listdir("killed")) == sorted(os.listdir(trained.runs / run))
    for path in (trained.runs / run).glob("images/*"):
        assert path.read_bytes() == Path("killed/images", path.name).read_bytes()


def test_what_is_given_beside_resume_changes_the_run(trained, capsys):
    for run in ("slow", "fast", "seeded"):
        shutil.copytree(trained.runs / VAE, run)
    vae.main(["--resume", "slow", "--epochs", "4"])
    assert "if interrupted: run this command again" in capsys.readouterr().out  # with its options
    vae.main(["--resume", "fast", "--epochs", "4", "--lr", "0.02"])
    vae.main(["--resume", "seeded", "--epochs", "4", "--seed", "1"])
    assert {**saved("slow")["config"], "lr": 0.02, "resume": "fast"} == saved("fast")["config"]
    assert saved("fast")["optimizer"]["param_groups"][0]["lr"] == 0.02
    assert metrics("slow")[:3] == metrics("fast")[:3] == metrics(trained.runs / VAE)
    assert metrics("fast")[3] != metrics("slow")[3]
    assert metrics("seeded")[3] != metrics("slow")[3]


def test_what_cannot_be_resumed_is_one_line_and_harms_nothing(trained):
    shutil.copytree(trained.runs / VAE, "run")
    shutil.copy("run/checkpoint.pt", "run/older.pt")
    before = Path("run/checkpoint.pt").read_bytes()
    for name in ("", "nowhere", "run/older.pt"):
        assert "not a run" in error_of("vae", "--resume", name)
    assert "not a run of dcgan.py" in error_of("dcgan", "--resume", "run")
    assert "size mismatch for encoder.backbone.0.weight" in error_of("vae", "--resume", "run", "--hidden-dim", 9)
    assert Path("run/checkpoint.pt").read_bytes() == before


def test_a_file_that_cannot_be_written_costs_a_warning(trained, capsys):
    shutil.copytree(trained.runs / VAE, "run")
    blocked = ["metrics.csv", "losses.png", "images/epoch_004_samples.png"]
    for name in blocked:
        Path("run", name).unlink(missing_ok=True)
        Path("run", name).mkdir()
    vae.main(["--resume", "run", "--epochs", "4"])
    warnings = capsys.readouterr().err.splitlines()
    assert sorted(line.split()[1] for line in warnings) == sorted(f"run/{name}" for name in blocked)
    assert saved("run")["epoch"] == 4 and Path("run/images/epoch_004_reconstructions.png").is_file()


def test_ctrl_c_is_one_line_and_keeps_what_is_done():
    words = [HERE / "dcgan.py", *DIGITS, "--epochs", 1000]
    processes = {
        "first": start(*words, "--out", "first", "--batch-size", 1),  # a long epoch
        "later": start(*words, "--out", "later", "--batch-size", 2, "--subset", 4),
    }
    for process in processes.values():
        for _ in range(4):  # the header comes at once, through a pipe too
            process.stdout.readline()
    assert "1/1000" in processes["later"].stdout.readline()
    for process in processes.values():
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
        assert (process.returncode, errors) == (130, "dcgan.py: interrupted\n")
    assert os.listdir(".") == ["later"] and {"checkpoint.pt", "losses.png"} < set(os.listdir("later"))


def test_a_run_that_diverged_stops_before_it_writes(trained):
    words = ["--lr", "1e6", "--subset", "10", "--batch-size", "10"]
    assert "samples is not finite" in error_of("dcgan", *SMALL, *words)
    assert os.listdir("runs") == []  # the next run gets the name
    shutil.copytree(trained.runs / DCGAN, "run")
    assert "samples is not finite" in error_of("dcgan", "--resume", "run", "--epochs", 4, *words)
    assert_same("run", trained.runs / DCGAN)
    assert not Path("run/images/epoch_004_samples.png").exists()
    with pytest.raises(common.Error, match="val/loss is not finite"):
        common.check_finite({"train/loss": 1.0, "val/loss": float("inf")})


def test_restored_moments_lie_in_memory_as_their_weights():
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    network(torch.rand(1, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    state, expected = optimizer.state_dict(), optimizer.state[network.weight]["exp_avg"].clone()
    state["state"][0]["exp_avg"] = expected.contiguous()  # as a run on a GPU leaves it
    common.load_adam(optimizer, state)
    restored = optimizer.state[network.weight]["exp_avg"]
    assert torch.equal(restored, expected) and restored.stride() == network.weight.stride()


# --- Pictures, and files from elsewhere ---


def test_every_picture_shows_what_it_is_called(trained):
    words = ["--out", "p", "--n", "16", "--steps", "8", "--images", "3", "7", "--seed", "5", "--device", "cpu"]
    sample.main([str(trained.runs / VAE), *words])
    model, data = vae.load(trained.runs / VAE)[0], common.load_digits(28)
    torch.manual_seed(5)
    z = torch.randn(2 + 16, 8)
    x, ends, alpha = data.test[:50] / 255, data.train[[3, 7]] / 255, torch.linspace(0, 1, 8)[:, None]
    x_pred, end_means = model(x.flatten(1))[0].view_as(x), model.encoder(ends.flatten(1))[0]

    def decode(z):
        return model.decoder(z).view(-1, 1, 28, 28)

    between = decode((1 - alpha) * end_means[0] + alpha * end_means[1])
    for picture, expected in {
        "samples.png": grid(decode(z[2:]), 8),
        "interpolation.png": grid(decode((1 - alpha) * z[0] + alpha * z[1]), 8),
        "interpolation_digits.png": grid(torch.cat([ends[:1], between, ends[1:]])),
        "reconstructions.png": grid(torch.cat([x[:10], x_pred[:10], x[10:20], x_pred[10:20]])),
    }.items():
        assert abs(pixels(f"p/{picture}")[: len(expected)] - expected).max() <= 1, picture
    animation = Image.open("p/training.gif")
    for i in range(3):
        animation.seek(i)
        shown = np.asarray(animation.convert("RGB")).astype(int)
        assert abs(shown - pixels(trained.runs / VAE / f"images/epoch_00{i + 1}_samples.png")).mean() < 3
    assert (animation.n_frames, animation.info["duration"]) == (3, 2000)


def test_a_run_draws_the_same_codes_after_every_epoch(trained):
    generator, model = dcgan.load(trained.runs / DCGAN)[0]["generator"], vae.load(trained.runs / VAE)[0]
    torch.manual_seed(0)
    dcgan.build((1, 32, 32), 8)  # the codes are drawn after the first weights
    drawn = pixels(trained.runs / DCGAN / "images/epoch_003_samples.png")
    assert abs(grid(generator(torch.randn(50, 8))) - drawn).max() <= 1
    torch.manual_seed(0)
    vae.build((1, 28, 28), saved(trained.runs / VAE)["config"])
    samples = model.decoder(torch.randn(50, 8)).view(50, 1, 28, 28)
    assert abs(grid(samples) - pixels(trained.runs / VAE / "images/epoch_003_samples.png")).max() <= 1


def test_a_manifold_is_of_quantiles_z1_to_the_right_and_z2_upwards(trained):
    levels = torch.distributions.Normal(0, 1).cdf(sample.manifold().view(20, 20, 2))
    expected = (torch.arange(20) + 0.5) / 20
    torch.testing.assert_close(levels[:, :, 0], expected.expand(20, 20))
    torch.testing.assert_close(levels[:, :, 1], expected.flip(0)[:, None].expand(20, 20))
    sample.main([str(trained.runs / CONV), "--out", "two"])
    sample.main([str(trained.runs / VAE), "--out", "eight"])
    assert pixels("two/manifold.png").shape == (602, 602, 3) and "manifold.png" not in os.listdir("eight")


def test_a_comparison_has_a_row_for_each_run(trained):
    runs = [str(trained.runs / run) for run in (VAE, CONV, DCGAN)]
    sample.main([*runs, "--out", "p"])
    assert os.listdir("p") == ["comparison.png"]
    axes = sample.compare(runs, torch.device("cpu"), seed=1).axes
    assert [ax.get_title() for ax in axes] == runs
    generator = dcgan.load(runs[2])[0]["generator"]
    torch.manual_seed(1)
    samples = generator(torch.randn(8, 8))
    assert abs(axes[2].images[0].get_array() * 255 - grid(samples, 8)).max() < 1


def test_an_arc_lies_on_the_sphere_and_ends_in_the_two_codes():
    z1, z2 = torch.randn(2, 50)
    torch.testing.assert_close(sample.slerp(z1, z2, 11)[[0, -1]], torch.stack([z1, z2]))
    on_sphere = sample.slerp(F.normalize(z1, dim=0), F.normalize(z2, dim=0), 11)
    torch.testing.assert_close(on_sphere.norm(dim=1), torch.ones(11))
    assert torch.isfinite(sample.slerp(z1, z1, 3)).all()


@pytest.mark.parametrize("codes", ["mean", "std", "sample", "pixels"])
def test_tsne_maps_the_codes_that_it_names(codes, trained, capsys):
    tsne.main([str(trained.runs / VAE), "--codes", codes, "--n", "60", "--out", "maps", "--device", "cpu"])
    model, data = vae.load(trained.runs / VAE)[0], common.load_digits(28)
    torch.manual_seed(0)
    chosen, x = torch.randperm(297)[:60], data.test.flatten(1) / 255
    mean, log_var = model.encoder(x)
    std = log_var.exp().sqrt()
    of = {"mean": mean, "std": std, "pixels": x, "sample": mean + std * torch.randn(mean.shape)}[codes][chosen].detach()
    distances = (of[:, None] - of).square().sum(-1).fill_diagonal_(float("inf"))
    accuracy = (data.test_labels[chosen][distances.argmin(1)] == data.test_labels[chosen]).float().mean()
    assert f"{codes}: 1-nearest-neighbour accuracy {accuracy:.1%} of the codes" in capsys.readouterr().out
    assert Image.open(f"maps/tsne_{codes}.png").size == (1200, 900)


def test_codes_of_two_dimensions_are_drawn_as_they_are_and_some_codes_not_at_all(trained, capsys):
    tsne.main([str(trained.runs / CONV), "--out", "."])
    assert "on the map" not in capsys.readouterr().out and Path("tsne_mean.png").exists()
    points, labels = torch.randn(30, 2).numpy(), torch.arange(30).numpy() % 3
    for label, drawn in enumerate(tsne.draw(points, labels, ["a", "b", "c"], "title").axes[0].collections):
        assert drawn.get_label() == "abc"[label] and np.array_equal(drawn.get_offsets(), points[labels == label])
    collapsed = vae.VAE(vae.Encoder(784, 8, 4), vae.Decoder(4, 8, 784))
    nn.init.zeros_(collapsed.encoder.mean.weight)
    torch.save(collapsed.state_dict(), "collapsed.pt")
    torch.save(vae.VAE(vae.Encoder(784, 8, 1), vae.Decoder(1, 8, 784)).state_dict(), "one.pt")
    assert "collapsed" in error_of("tsne", "collapsed.pt", "--dataset", "digits")
    assert "equal" in error_of("tsne", trained.runs / VAE, "--n", "1")
    assert "one dimension" in error_of("tsne", "one.pt", "--dataset", "digits")
    assert "no variance" in error_of("tsne", trained.runs / AUTOENCODER, "--codes", "std")


def test_what_students_save_opens(trained):
    weights, networks = saved(trained.runs / VAE)["state_dict"], saved(trained.runs / DCGAN)["state_dict"]
    renamed = {f"module._orig_mod.{name}": x for name, x in weights.items()}
    for content in (weights, {"epoch": 149, "state_dict": weights}, {"model_state_dict": weights}, {"net": renamed}):
        torch.save(content, "vae.pt", _use_new_zipfile_serialization="net" in content)  # the old format too
        model, config = vae.load("vae.pt")
        torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
        assert (config["latent_dim"], config["image_shape"], model.training) == (8, (1, 28, 28), False)

    parts = {name: network.state_dict() for name, network in dcgan.load(trained.runs / DCGAN)[0].items()}
    lab = {"state_dict": {**networks, "validation_z": torch.ones(50, 8)}}
    for content in (networks, lab, parts, parts["generator"]):
        torch.save(content, "dcgan.pt")
        model, config = dcgan.load("dcgan.pt")
        torch.testing.assert_close(model["generator"].state_dict(), parts["generator"], rtol=0, atol=0)
        assert ("discriminator" in model) == (content is not parts["generator"])
        assert (config["latent_dim"], config["image_shape"], model.training) == (8, (1, 32, 32), False)
    sample.main(["vae.pt", "--dataset", "digits"])
    sample.main(["vae.pt", "dcgan.pt"])
    tsne.main(["vae.pt", "--dataset", "digits"])


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_what_sample_refuses_is_one_line_and_earlier_pictures_stay(trained):
    shutil.copytree(trained.runs / VAE, "runs/run")
    sample.main([])  # the newest run
    before = {path: path.read_bytes() for path in Path("runs/run").iterdir() if path.is_file()}
    assert "1500 training images" in error_of("sample", "--images", 0, 1500, "--seed", 1)
    assert "there is no file nowhere" in error_of("sample", "nowhere")
    assert all(path.read_bytes() == content for path, content in before.items())

    model, weights = vae.load(trained.runs / CONV)[0], saved(trained.runs / CONV)["state_dict"]
    alien = {"encoder.mean.weight": torch.ones(2, 3), "encoder.backbone.0.weight": torch.ones(3, 4)}
    for content, reason in (
        (model, "save model.state_dict()"),
        ({"state_dict": weights, "loss": np.mean([1.0, 2.0])}, "save model.state_dict()"),
        ({**weights, "payload": Malicious()}, "save model.state_dict()"),
        ([1, 2], "holds a list, not a dict"),
        ({"model_state_dict": weights}, "model_state_dict.encoder.backbone.1.weight"),
        (alien, "Missing key"),
    ):
        torch.save(content, "saved.pt")
        assert reason in error_of("sample", "saved.pt")
    os.truncate("saved.pt", 1000)
    assert "saved.pt cannot be opened" in error_of("sample", "saved.pt")
    assert not Path("executed").exists()


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


@pytest.mark.parametrize("order", [("vae", "dcgan"), ("dcgan", "vae")])
def test_the_readmes_cells_run_in_one_notebook(order, trained, capsys):
    write_mnist()
    for beta in (1, 2, 5, 10):
        shutil.copytree(trained.runs / VAE, f"runs/vae-beta{beta}")
    notebook, swap = {}, order[0] == "dcgan"  # in the second order with an autoencoder for the VAE, as for question 1
    exec("".join(map(upper_half, order)), notebook)
    for cell in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        cell = cell.replace("plt.show()", "plt.close()").replace("range(10)", "range(3)")
        if swap:
            cell = cell.replace("= VAE(", "= Autoencoder(").replace("beta = 1", "beta = 0")
        exec(cell, notebook)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-5]) for line in lines if "nats per test image" in line]
    assert len(losses) == 3 and losses[-1] < losses[0] and sum("last step: G" in line for line in lines) == 3
    vae.load("vae.pt"), dcgan.load("dcgan.pt")


def test_two_processes_train_one_vae():
    write_mnist()
    words = ["--nproc_per_node", 2, "-m", "docs.parallel"]
    process = start("-m", "torch.distributed.run", *words, PYTHONPATH=str(HERE), CUDA_VISIBLE_DEVICES="")
    printed, errors = process.communicate(timeout=100)
    losses = [float(line.split()[2]) for line in printed.splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0], errors
    assert losses[0] == pytest.approx(784 * np.log(2), rel=0.01)  # that of x_pred = 1/2, with which training begins
    assert vae.load("vae-parallel.pt")[1]["latent_dim"] == 128
