"""The tests: mathematics against an independent computation, the scripts as users run them, and what they promise."""

import ast
import copy
import csv
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # processes that run side by side do not wait for each other's threads

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn
from torchvision.utils import save_image

import common
import dcgan
import sample
import tsne
import vae
from docs import student_version

HERE = Path(__file__).parent
SCRIPTS = {"vae": vae, "dcgan": dcgan, "sample": sample, "tsne": tsne}
DIGITS = ["--dataset", "digits", "--device", "cpu"]
SMALL = [*DIGITS, "--subset", "200", "--epochs", "3"]
TRAINED = {  # run: the script and the options of its command
    "vae-beta10-digits-z8-subset200": ["vae", *SMALL, "--latent-dim", "8", "--hidden-dim", "32"],
    "vae-conv-beta1-digits-z2-subset200": ["vae", *SMALL, "--latent-dim", "2", "--arch", "conv", "--beta", "1"],
    "vae-autoencoder-digits-subset200": ["vae", *SMALL, "--autoencoder"],
    "dcgan-digits-z8-subset24": ["dcgan", *SMALL, "--latent-dim", "8", "--subset", "24", "--batch-size", "10"],
}
VAE, CONV, AUTOENCODER, DCGAN = TRAINED


@pytest.fixture(scope="session", autouse=True)
def trainings(request, tmp_path_factory):
    """A folder, and the processes of TRAINED in it, started before the first test if any test needs them."""
    folder = tmp_path_factory.mktemp("trained")
    environment = {**os.environ, "MPLBACKEND": "not_installed"}  # as a notebook's shell may have it
    options = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = {}
    if any("trained" in test.fixturenames for test in request.session.items):
        for run, (script, *words) in TRAINED.items():
            processes[run] = subprocess.Popen([sys.executable, HERE / f"{script}.py", *words], **options)
    return folder, processes


@pytest.fixture(scope="session")
def trained(trainings):
    """The folder with the finished runs of TRAINED, and RUN.txt, what each printed; only read it."""
    folder, processes = trainings
    for run, process in processes.items():
        printed, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
        Path(folder, "runs", f"{run}.txt").write_text(printed)
    return folder / "runs"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error_of(command):
    """The one line with which a script refuses what it is given."""
    script, *words = command.split()
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(words)
    assert "\n" not in stop.value.code
    return stop.value.code


def metrics(run):
    """The rows of metrics.csv as numbers, without their times."""
    with Path(run, "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if name != "seconds"} for row in rows]


def saved(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def assert_same(one, other):
    """Two runs have the same weights, moments, steps and metrics, to the last bit."""
    assert metrics(one) == metrics(other)
    one, other = saved(one), saved(other)
    for key in one.keys() & {"state_dict", "optimizer", "optimizer_g", "optimizer_d", "steps"}:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def grid(images, columns=10):
    """The pixels of images that are written as a grid."""
    save_image(images.detach(), "expected.png", nrow=columns)
    return pixels("expected.png")


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Mathematics ---


def test_formula_of_kl_divergence():
    mean, log_var = torch.randn(2, 5, 7)
    q = torch.distributions.Normal(mean, log_var.exp().sqrt())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))
    torch.testing.assert_close(vae.kl_divergence(mean, log_var), kl.sum())
    assert tsne.dimensions_in_use(mean, log_var, threshold=0.9) == (kl.mean(0) > 0.9).sum()


def test_formula_of_reconstruction_loss():
    x_pred, x = torch.rand(2, 5, 12)
    expected = -(x * x_pred.log() + (1 - x) * (1 - x_pred).log()).sum()
    torch.testing.assert_close(vae.reconstruction_loss(x_pred, x), expected)


def test_formula_of_reparameterize():
    mean, std = torch.rand(2, 5, 3)
    torch.manual_seed(3)
    z = vae.reparameterize(mean, std)
    torch.manual_seed(3)
    torch.testing.assert_close(z, mean + std * torch.randn(5, 3))


def test_formula_of_an_epoch_of_train_vae():
    model = vae.VAE(vae.Encoder(784, 512, 128), vae.Decoder(128, 512, 784)).eval()
    expected = copy.deepcopy(model)
    batches = torch.rand(24, 784).split(16)  # the last one is smaller
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(3)
    losses = vae.train_vae(model, optimizer, [(x.view(-1, 1, 28, 28), None) for x in batches], beta=10)

    optimizer = torch.optim.SGD(expected.parameters(), lr=1e-3)
    sums = torch.zeros(3)
    torch.manual_seed(3)
    for x in batches:
        h = expected.encoder.backbone(x)
        mean, log_var = expected.encoder.mean(h), expected.encoder.log_var(h)
        z = mean + log_var.exp().sqrt() * torch.randn(len(x), 128)
        x_pred = 1 / (1 + torch.exp(-expected.decoder.backbone(z)))
        reconstruction = -(x * x_pred.log() + (1 - x) * (1 - x_pred).log()).sum()
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum()
        loss = reconstruction + 10 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums += torch.stack([reconstruction, kl, loss]).detach()
    assert losses == pytest.approx((sums / 24).tolist(), rel=1e-4)
    assert model.training
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


def test_formula_of_the_gan_losses():
    real_score, fake_score = torch.rand(2, 6, 1)
    torch.testing.assert_close(dcgan.generator_loss(fake_score), -fake_score.log().mean())
    d_loss = -0.5 * (real_score.log().mean() + (1 - fake_score).log().mean())
    torch.testing.assert_close(dcgan.discriminator_loss(real_score, fake_score), d_loss)


def test_formula_of_an_epoch_of_train_dcgan():
    networks = nn.ModuleList([dcgan.Generator(10, (1, 32, 32)), dcgan.Discriminator((1, 32, 32))])
    expected = copy.deepcopy(networks)
    batches = torch.rand(10, 1, 32, 32).split(6)
    optimizers = [torch.optim.SGD(network.parameters(), lr=10) for network in networks]
    torch.manual_seed(5)
    steps = dcgan.train_dcgan(*networks.eval(), *optimizers, [(x, None) for x in batches], latent_dim=10)

    # both losses are of the networks before the step: G moves first, but D sees the images that were made before
    generator, discriminator = expected
    optimizer = torch.optim.SGD(expected.parameters(), lr=10)
    torch.manual_seed(5)  # dropout draws the same numbers in the same order of passes
    for x, step in zip(batches, steps, strict=True):
        fakes = generator(torch.randn(len(x), 10))
        g_loss = -discriminator(fakes).log().mean()
        real_score = discriminator(x)
        fake_score = discriminator(fakes.detach())
        d_loss = -0.5 * (real_score.log().mean() + (1 - fake_score).log().mean())
        accuracies = [(real_score > 0.5).float().mean(), (fake_score <= 0.5).float().mean()]
        torch.testing.assert_close(step, torch.stack([g_loss, d_loss, *accuracies]).detach())
        optimizer.zero_grad()
        g_loss.backward(inputs=list(generator.parameters()))
        d_loss.backward(inputs=list(discriminator.parameters()))
        optimizer.step()
    torch.testing.assert_close(networks.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


def test_the_networks_are_the_labs():
    encoder, decoder = vae.Encoder(784, 512, 128), vae.Decoder(128, 512, 784)
    generator, discriminator = dcgan.Generator(100, (1, 32, 32)), dcgan.Discriminator((1, 32, 32))
    networks = nn.ModuleList([encoder, decoder, generator, discriminator])
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes == [795_904, 730_896, 1_049_985, 98_113]
    assert [type(layer) for layer in encoder.backbone] == [nn.Linear, nn.ReLU] * 2
    assert [type(layer) for layer in decoder.backbone] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    norms = [layer.eps for layer in networks.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms == [1e-5, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert [layer.p for layer in discriminator.modules() if isinstance(layer, nn.Dropout2d)] == [0.25] * 4
    assert {"model.0.weight", "model.14.running_var", "adv_layer.0.weight"} < discriminator.state_dict().keys()
    with pytest.raises(ValueError, match=r"\(1, 28, 28\).*\(1, 32, 32\)"):
        discriminator(torch.rand(2, 1, 28, 28))


def test_the_fast_generator_gives_the_same_images_and_gradients():
    lab, fast = dcgan.Generator(10, (3, 32, 32)).double(), dcgan.FastGenerator(10, (3, 32, 32)).double()
    fast.load_state_dict(lab.state_dict())
    z = torch.randn(4, 10, dtype=torch.double)
    torch.testing.assert_close(fast(z), lab(z))
    for network in (fast, lab):
        (network(z) ** 2).sum().backward()
    for (name, p), q in zip(fast.named_parameters(), lab.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


# --- Images ---


def write_mnist():
    """MNIST's four files, with the same 64 digits to train and to test on; returns their folder."""
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    digits = common.load_digits(28)
    images = digits.train[:64].numpy().tobytes()
    labels = digits.train_labels[:64].byte().numpy().tobytes()
    for split in ("train", "t10k"):
        Path(raw, f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 64, 28, 28) + images)
        Path(raw, f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 64) + labels)
    return raw


def test_mnist_on_disk_is_resized_as_pil_does_and_trained_on():
    raw = write_mnist()
    data, digits = common.load_dataset("mnist", "data", 32), common.load_digits(28)
    images = [Image.fromarray(image).resize((32, 32), Image.BILINEAR) for image in digits.train[:64, 0].numpy()]
    for resized, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert abs(resized[:, 0].int().numpy() - np.stack(images)).max() <= 1
        assert torch.equal(labels, digits.train_labels[:64])
    vae.main(["--epochs", "1"])
    dcgan.main(["--epochs", "1", "--subset", "20"])
    assert sorted(os.listdir("runs")) == ["dcgan-subset20", "vae-beta10"]

    for labels in (bytes(63), bytes([10] * 64)):  # too few, and no class
        Path(raw, "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(labels)) + labels)
        assert "MNIST in data/MNIST/raw: images and labels do not belong" in error_of("vae")


def test_without_mnist_the_default_is_digits_and_a_named_set_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing answers
    vae.main(["--epochs", "1", "--data", "nowhere"])
    warning = capsys.readouterr().err
    assert re.search(r"WARNING: MNIST is not available \(.*refused.*\); its files belong in nowhere/MNIST/raw", warning)
    assert "MNIST is not available (" in error_of("dcgan --dataset mnist --data nowhere --epochs 1")
    assert os.listdir("runs") == ["vae-beta10-digits"]


def test_cifar_has_three_channels(monkeypatch):
    array = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    split = Mock(data=array, targets=list(range(50)), classes=[f"class {i}" for i in range(100)])
    monkeypatch.setattr("torchvision.datasets.CIFAR100", lambda root, train, download: split)
    assert torch.equal(common.load_dataset("cifar100", "data").train, torch.from_numpy(array).permute(0, 3, 1, 2))
    vae.main(["--arch", "conv", "--dataset", "cifar100", "--epochs", "1"])
    dcgan.main(["--dataset", "cifar100", "--epochs", "1"])
    sample.main(["runs/vae-conv-beta10-cifar100", "runs/dcgan-cifar100"])
    tsne.main(["--n", "40"])  # of the newest VAE
    assert "takes images of shape (3, 32, 32)" in error_of("tsne --dataset digits")


def test_batches_use_every_image_once_with_its_label():
    images, labels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10) + 100
    assert [len(x) for x, _ in common.batches(images, labels, 4)] == [4, 4, 2]
    x, y = map(torch.cat, zip(*common.batches(images, labels, 4, shuffle=True)))
    assert not torch.equal(y, labels) and torch.equal(y.sort().values, labels)
    torch.testing.assert_close(x.flatten() * 255, y - 100.0)


# --- Copying into coursework ---


def code_cells():
    notebook = json.loads((HERE / "docs/lab.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_upper_halves_need_only_torch_and_stand_in_the_notebook_word_for_word():
    names = []
    for script in ("vae", "dcgan"):
        source = (HERE / f"{script}.py").read_text(encoding="utf-8").split("# === Script")[0]
        nodes = ast.parse(source).body[1:]  # after the docstring
        imports = [ast.unparse(node) for node in nodes[:3]]
        assert imports == ["import torch", "import torch.nn.functional as F", "from torch import nn"]
        for node in nodes[3:]:
            names.append(node.name)
            if node.name not in student_version.EXERCISES:
                definition = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
                assert any(cell.endswith(definition) for cell in code_cells()), node.name
    assert len(names) == len(set(names)) == 16


def test_the_notebook_runs_from_top_to_bottom(monkeypatch, capsys):
    monkeypatch.setattr(plt, "show", plt.close)
    write_mnist()
    notebook = {}
    for cell in code_cells():
        exec(re.sub(r"^(NUM_EPOCHS\w*) = \d+", r"\1 = 1", cell, flags=re.MULTILINE), notebook)
    checks = re.findall(r"yours (\S+), right ([\d.]+\d)", capsys.readouterr().out)
    assert len(checks) == 6 and all(yours == right for yours, right in checks)
    torch.testing.assert_close(vae.load("my_vae.pt")[0].state_dict(), notebook["vae"].state_dict())
    torch.testing.assert_close(dcgan.load("my_dcgan.pt")[0].state_dict(), notebook["generator"].state_dict())


def test_a_student_fills_in_the_student_version(monkeypatch):
    student_version.main(Path("class"))
    assert len(os.listdir("class")) == 7
    assert "Question 6" in Path("class/lab.ipynb").read_text(encoding="utf-8")
    for answer in ("log_var.exp()", "binary_cross_entropy(", "image/png"):
        assert not any(answer in path.read_text(encoding="utf-8") for path in Path("class").iterdir())
    for name in ("vae", "dcgan"):
        student = load_script(Path(f"class/{name}.py"))
        monkeypatch.setitem(globals(), name, student)  # vae and dcgan are now the student's
    assert not hasattr(vae, "Autoencoder")

    formulas = [test for name, test in globals().items() if name.startswith("test_formula")]
    assert len(formulas) == 6
    for test in formulas:
        with pytest.raises(NotImplementedError):
            test()
    for name, module in (("vae", vae), ("dcgan", dcgan)):
        for function in student_version.TO_WRITE & vars(module).keys():
            setattr(module, function, getattr(SCRIPTS[name], function))
    for test in formulas:
        test()


# --- The scripts, as users run them ---


@pytest.mark.parametrize("run", TRAINED)
def test_a_training_from_the_shell(run, trained):
    kinds = ["samples"] if run == DCGAN else ["samples", "reconstructions"]
    grids = {f"images/epoch_00{epoch}_{kind}.png" for epoch in (1, 2, 3) for kind in kinds}
    files = {path.relative_to(trained / run).as_posix() for path in Path(trained, run).rglob("*") if path.is_file()}
    assert files == {"checkpoint.pt", "metrics.csv", "losses.png"} | grids
    assert saved(trained / run)["epoch"] == len(metrics(trained / run)) == 3
    assert saved(trained / run)["config"]["batch_size"] == (10 if run == DCGAN else 64)  # the default for few images
    first, *epochs, last = Path(trained, f"{run}.txt").read_text().splitlines()
    assert first.startswith(f"runs/{run}: {24 if run == DCGAN else 200} images of digits, ")
    assert [line.split(":")[0].strip() for line in epochs] == ["1/3", "2/3", "3/3"]
    assert last == f"next: python sample.py runs/{run}"


@pytest.mark.parametrize("run", [VAE, CONV, AUTOENCODER])
def test_the_losses_of_a_vae_add_up_and_fall(run, trained):
    rows = metrics(trained / run)
    printed = Path(trained, f"{run}.txt").read_text()
    equations = re.findall(r"(\S+) = (\S+) \+ (\S+) \* (\S+),", printed)
    for row, equation in zip(rows, equations, strict=True):
        loss, reconstruction, beta, kl = map(float, equation)
        expected = [row["val/loss"], row["val/reconstruction_loss"], row["val/kl_loss"]]
        assert [loss, reconstruction, kl] == pytest.approx(expected, abs=0.006)
        for split in ("train", "val"):
            total = row[f"{split}/reconstruction_loss"] + beta * row[f"{split}/kl_loss"]
            assert row[f"{split}/loss"] == pytest.approx(total)
    assert rows[2]["val/loss"] < rows[0]["val/loss"]

    model, _ = vae.load(trained / run)
    x = common.load_digits(28).test.flatten(1) / 255  # in training in batches of 64, the last one is smaller
    x_pred, mean, log_var = model(x)
    assert rows[2]["val/kl_loss"] == pytest.approx(vae.kl_divergence(mean, log_var).item() / 297, rel=1e-4)
    expected = vae.reconstruction_loss(x_pred, x).item() / 297
    assert rows[2]["val/reconstruction_loss"] == pytest.approx(expected, rel=0.02)  # of other noise
    samples_nothing = torch.equal(x_pred, model.decoder(model.encoder(x)[0]))
    assert samples_nothing == (run == AUTOENCODER)
    if run == CONV:  # four steps in each of three epochs were in training mode, and no other pass
        assert model.encoder.backbone[2].num_batches_tracked == 12


def test_a_dcgan_keeps_the_last_epochs_steps_and_the_means_of_all(trained):
    steps, row = saved(trained / DCGAN)["steps"], metrics(trained / DCGAN)[2]
    assert steps.shape == (3, 4)  # of 10, 10 and 4 images
    g_loss, d_loss, real_acc, fake_acc = steps.mean(0).tolist()
    assert list(row.values()) == pytest.approx([3, g_loss, d_loss, real_acc, fake_acc, (real_acc + fake_acc) / 2])


@pytest.mark.parametrize("script", ["vae", "dcgan"])
def test_bf16_is_close_to_float32_and_the_sigmoids_stay_in_it(script, monkeypatch):
    words = [*DIGITS, "--subset", "2", "--epochs", "1"]
    SCRIPTS[script].main([*words, "--out", "full"])
    sigmoid = Mock(wraps=torch.sigmoid)
    monkeypatch.setattr(torch, "sigmoid", sigmoid)
    SCRIPTS[script].main([*words, "--out", "half", "--bf16"])
    full, half = metrics("full")[0], metrics("half")[0]
    assert half != full and half == pytest.approx(full, rel=0.02)
    assert {call.args[0].dtype for call in sigmoid.call_args_list} == {torch.float32}


def test_the_defaults_are_the_labs():
    options = vars(vae.parse_options([])[0])
    lab = {"beta": 10, "arch": "fc", "hidden_dim": 512, "latent_dim": 128, "lr": 1e-3, "epochs": 150, "seed": 0}
    assert options.items() >= {**lab, "autoencoder": False, "bf16": False}.items()
    options = vars(dcgan.parse_options([])[0])
    lab = {"latent_dim": 100, "lr": 2e-4, "b1": 0.5, "b2": 0.999, "batch_size": 64, "epochs": 150, "seed": 0}
    assert options.items() >= {**lab, "bf16": False}.items()


# --- What a run promises ---


def test_simultaneous_runs_get_two_folders():
    with ThreadPoolExecutor() as pool:
        folders = {folder.as_posix() for folder in pool.map(lambda _: common.new_folder(None, "vae"), range(3))}
    assert folders == {"runs/vae", "runs/vae-2", "runs/vae-3"}


@pytest.mark.parametrize("run", [VAE, DCGAN])
def test_a_killed_run_resumes_to_the_same_bits(run, trained, monkeypatch):
    script, *words = TRAINED[run]
    main, save = SCRIPTS[script].main, torch.save

    def save_half(checkpoint, path):
        assert str(os.getpid()) in path.name  # two processes that resume one run do not share it
        save(checkpoint, path)
        if checkpoint["epoch"] == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(torch, "save", save_half)
        main([*words, "--out", "killed"])
    assert saved("killed")["epoch"] == 1
    shutil.copytree("killed", "copy")
    main(["--resume", "killed"])
    main(["--resume", "copy/checkpoint.pt"])
    assert_same("killed", trained / run)
    assert_same("copy", trained / run)


def test_what_is_given_beside_resume_changes_the_run(trained):
    for run, words in {"slow": [], "fast": ["--lr", "0.02"], "seeded": ["--seed", "1"]}.items():
        shutil.copytree(trained / VAE, run)
        vae.main(["--resume", run, "--epochs", "4", *words])
        assert metrics(run)[:3] == metrics(trained / VAE)
    assert {**saved("slow")["config"], "lr": 0.02, "resume": "fast"} == saved("fast")["config"]
    assert saved("fast")["optimizer"]["param_groups"][0]["lr"] == 0.02
    assert metrics("slow")[3] not in (metrics("fast")[3], metrics("seeded")[3])


def test_a_copy_of_a_script_has_runs_of_its_own(capsys):
    shutil.copy(HERE / "vae.py", "my_vae.py")
    load_script(Path("my_vae.py")).main([*DIGITS, "--subset", "20", "--epochs", "1"])
    run = "runs/my_vae-beta10-digits-subset20"
    assert error_of(f"vae --resume {run}") == f"{run} is not a run of vae.py but of my_vae.py"
    sample.main([])  # of the newest run
    assert f"{run} is of my_vae.py, opened with the layers of vae.py" in capsys.readouterr().err


def test_what_a_script_refuses_is_one_line_and_harms_nothing(trained, capsys):
    shutil.copytree(trained, "runs")
    shutil.copy(f"runs/{VAE}/checkpoint.pt", f"runs/{VAE}/older.pt")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for command, message in {
        "vae --out runs --dataset digits": "'runs' exists",
        "vae --resume=": "'' is not a run",
        "vae --resume nowhere": "'nowhere' is not a run",
        f"vae --resume runs/{VAE}/older.pt": "is not a run",
        f"dcgan --resume runs/{VAE}": f"runs/{VAE} is not a run of dcgan.py but of vae.py",
        f"vae --resume runs/{DCGAN}": f"runs/{DCGAN} is not a run of vae.py but of dcgan.py",
        f"sample runs/{VAE} --images 0 1500": "digits has 1500 training images",
        f"tsne runs/{DCGAN}": "holds a DCGAN, not a VAE, whose codes tsne.py maps",
        f"tsne runs/{AUTOENCODER} --codes std": "no variance",
    }.items():
        assert message in error_of(command)
    with pytest.raises(SystemExit):
        vae.main(["--resume", f"runs/{VAE}", "--out", "other"])
    assert "argument --out: not allowed with argument --resume" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_ctrl_c_is_one_line_and_keeps_what_is_done(trained, monkeypatch):
    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    monkeypatch.setattr(vae, "train_vae", Mock(side_effect=KeyboardInterrupt))
    shutil.copytree(trained / VAE, "run")
    os.remove("run/losses.png")
    assert error_of("vae --resume run --epochs 4") == "interrupted; to continue: python vae.py --resume run"
    assert_same("run", trained / VAE)
    assert Path("run/losses.png").exists()
    assert error_of("vae --dataset digits --out first") == "interrupted before the first epoch was saved"
    for function in at_exit:
        function()
    assert os.listdir(".") == ["run"]  # the folders of TRAINED outlived their processes


def test_a_run_that_diverged_stops_before_it_writes(trained):
    shutil.copytree(trained / DCGAN, "run")
    assert "samples is not finite" in error_of("dcgan --resume run --epochs 4 --lr 1e6 --subset 10")
    with pytest.raises(SystemExit, match="epoch 4: val/loss is not finite: the training diverged"):
        common.save_epoch(Path("run"), [{"epoch": 4, "val/loss": float("nan")}], {}, None, {})
    assert_same("run", trained / DCGAN)
    assert len(os.listdir("run/images")) == 3


def test_restored_moments_lie_in_memory_as_their_weights():
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    network(torch.rand(1, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    expected = optimizer.state[network.weight]["exp_avg"].clone()
    state["state"][0]["exp_avg"] = expected.contiguous()  # as a run on a GPU leaves it
    common.load_adam(optimizer, state)
    restored = optimizer.state[network.weight]["exp_avg"]
    assert torch.equal(restored, expected) and restored.stride() == network.weight.stride()


# --- Pictures, and files from elsewhere ---


def test_every_picture_shows_what_it_is_called(trained):
    words = ["--out", "p", "--n", "16", "--columns", "4", "--steps", "8", "--images", "3", "7", "--seed", "5"]
    sample.main([str(trained / VAE), *words, "--device", "cpu"])
    model, data = vae.load(trained / VAE)[0], common.load_digits(28)
    torch.manual_seed(5)
    z = torch.randn(2 + 16, 8)
    x, ends = data.test[:50] / 255, data.train[[3, 7]] / 255
    x_pred = model(x.flatten(1))[0].view_as(x)
    end_means, _ = model.encoder(ends.flatten(1))
    alpha = torch.linspace(0, 1, 8)[:, None]

    def decode(z):
        return model.decoder(z).view(-1, 1, 28, 28)

    between = decode((1 - alpha) * end_means[0] + alpha * end_means[1])
    for picture, expected in {
        "samples.png": grid(decode(z[2:]), 4),
        "interpolation.png": grid(decode((1 - alpha) * z[0] + alpha * z[1]), 8),
        "interpolation_digits.png": grid(torch.cat([ends[:1], between, ends[1:]])),
        "reconstructions.png": grid(torch.cat([x[:10], x_pred[:10], x[10:20], x_pred[10:20]])),
    }.items():
        assert abs(pixels(f"p/{picture}")[: len(expected)] - expected).max() <= 1, picture
    assert Image.open("p/training.gif").n_frames == 3
    assert abs(pixels("p/training.gif") - pixels(trained / VAE / "images/epoch_001_samples.png")).mean() < 3


@pytest.mark.parametrize("run, panel, curves", [
    (VAE, 0, {"training": "train/reconstruction_loss", "test": "val/reconstruction_loss"}),
    (VAE, 1, {"training": "train/kl_loss", "test": "val/kl_loss"}),
    (VAE, 2, {"training": "train/loss", "test": "val/loss"}),
    (DCGAN, 0, {"generator": "generator/loss", "discriminator": "discriminator/loss"}),
    (DCGAN, 1, {"real": "discriminator/real_acc", "fake": "discriminator/fake_acc"}),
    (DCGAN, 2, {"generator": 0, "discriminator": 1}),  # columns of the steps
])
def test_every_curve_shows_what_its_legend_says(run, panel, curves, trained, monkeypatch):
    figures = []
    monkeypatch.setattr(common.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    shutil.copytree(trained / run, "run")
    SCRIPTS[TRAINED[run][0]].main(["--resume", "run"])
    rows = saved("run")["steps"].tolist() if (run, panel) == (DCGAN, 2) else metrics("run")
    lines = [line for line in figures[0].axes[panel].lines if line.get_linestyle() == "-"]
    shown = {line.get_label(): list(line.get_ydata()) for line in lines}
    assert shown == {legend: [row[column] for row in rows] for legend, column in curves.items()}


def test_a_run_draws_the_same_codes_after_every_epoch(trained):
    torch.manual_seed(0)
    generator = dcgan.Generator(8, (1, 32, 32)).eval()  # the lab's, not the fast one
    dcgan.Discriminator((1, 32, 32))  # the codes are drawn after the weights of both
    z = torch.randn(50, 8)
    generator.load_state_dict(dcgan.load(trained / DCGAN)[0].state_dict())
    assert abs(grid(generator(z)) - pixels(trained / DCGAN / "images/epoch_003_samples.png")).max() <= 1
    model, config = vae.load(trained / VAE)
    torch.manual_seed(0)
    vae.build(config)
    samples = model.decoder(torch.randn(50, 8)).view(50, 1, 28, 28)
    assert abs(grid(samples) - pixels(trained / VAE / "images/epoch_003_samples.png")).max() <= 1


def test_a_comparison_has_a_row_for_each_run(trained):
    runs = [str(trained / run) for run in (VAE, CONV, DCGAN)]
    axes = sample.compare(runs, torch.device("cpu"), seed=1).axes
    assert [ax.get_title() for ax in axes] == [f"{run}, epoch 3" for run in runs]
    generator, _ = dcgan.load(runs[2])
    torch.manual_seed(1)
    assert abs(axes[2].images[0].get_array() * 255 - grid(generator(torch.randn(8, 8)), 8)).max() < 1


def test_an_arc_lies_on_the_sphere_and_a_manifold_at_the_quantiles():
    z1, z2 = F.normalize(torch.randn(2, 50))
    arc = sample.slerp(z1, z2, 11)
    torch.testing.assert_close(arc[[0, -1]], torch.stack([z1, z2]))
    torch.testing.assert_close(arc.norm(dim=1), torch.ones(11))
    assert torch.isfinite(sample.slerp(z1, z1, 3)).all()
    levels = torch.distributions.Normal(0, 1).cdf(sample.manifold().view(20, 20, 2))
    quantiles = (torch.arange(20) + 0.5) / 20
    torch.testing.assert_close(levels[:, :, 0], quantiles.expand(20, 20))  # z1 to the right
    torch.testing.assert_close(levels[:, :, 1], quantiles.flip(0)[:, None].expand(20, 20))  # z2 upwards


@pytest.mark.parametrize("codes", ["mean", "std", "sample", "pixels"])
def test_tsne_maps_the_codes_that_it_names(codes, trained, capsys):
    tsne.main([str(trained / VAE), "--codes", codes, "--n", "60", "--out", "maps", "--device", "cpu"])
    model, data = vae.load(trained / VAE)[0], common.load_digits(28)
    torch.manual_seed(0)
    chosen = torch.randperm(297)[:60]
    x = data.test.flatten(1) / 255
    mean, log_var = model.encoder(x)
    std = log_var.exp().sqrt()
    of = {"mean": mean, "std": std, "pixels": x, "sample": mean + std * torch.randn(mean.shape)}
    points, labels = of[codes][chosen].detach(), data.test_labels[chosen]
    distances = (points[:, None] - points).square().sum(-1).fill_diagonal_(float("inf"))
    accuracy = (labels[distances.argmin(1)] == labels).float().mean()
    assert f"{codes}: 1-nearest-neighbor accuracy {accuracy:.1%} of the codes" in capsys.readouterr().out
    assert os.listdir("maps") == [f"tsne_{codes}.png"]


def test_codes_of_two_dimensions_are_drawn_as_they_are(trained):
    sample.main([str(trained / CONV), "--out", "."])
    tsne.main([str(trained / CONV), "--out", "."])
    assert {"manifold.png", "tsne_mean.png"} < set(os.listdir("."))
    points, labels = torch.randn(30, 2).numpy(), torch.arange(30).numpy() % 3
    axes = tsne.draw(points, labels, ["a", "b", "c"], "title").axes[0]
    for label, (drawn, text) in enumerate(zip(axes.collections, axes.texts, strict=True)):
        assert np.array_equal(drawn.get_offsets(), points[labels == label])
        assert text.get_text() == "abc"[label]


@pytest.mark.parametrize("run", [VAE, DCGAN])
def test_what_students_save_opens(run, trained):
    load = SCRIPTS[TRAINED[run][0]].load
    model, config = load(trained / run)
    weights = model.state_dict()
    renamed = {f"module._orig_mod.{name}": x for name, x in weights.items()}
    half = {name: x.half() for name, x in weights.items()}
    for content in (weights, {"epoch": 149, "state_dict": weights}, {"my": {"net": renamed}}, {"model": half}):
        torch.save(content, "weights.pt")
        opened, read = load("weights.pt")
        torch.testing.assert_close(opened.state_dict(), weights, rtol=1e-3, atol=1e-3)
        assert (read["latent_dim"], read["image_shape"]) == (config["latent_dim"], config["image_shape"])
        assert not opened.training


@pytest.mark.parametrize("name", ["vae-beta1", "dcgan"])
def test_the_weights_in_docs_draw_digits(name):
    sample.main([str(HERE / f"docs/{name}.pt"), "--out", ".", "--dataset", "digits"])
    assert 20 < pixels("samples.png").mean() < 80  # neither black nor gray


def test_a_file_without_plain_weights_is_one_line_and_no_code_runs(trained):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (Path("executed"),))

    weights = saved(trained / CONV)["state_dict"]
    for content, reason in (
        ({**weights, "payload": Malicious()}, "save(model.state_dict(), ...)"),
        ({"model_state_dict": weights}, "other layers than vae.Encoder"),
        ({"layer.weight": torch.ones(2)}, "layer.weight"),
    ):
        torch.save(content, "saved.pt")
        assert reason in error_of("sample saved.pt")
    Path("saved.pt").write_text("<html>not found</html>")
    assert "saved.pt cannot be read" in error_of("sample saved.pt")
    assert not Path("executed").exists()
