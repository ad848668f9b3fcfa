"""The tests: mathematics against an independent computation, the scripts as users run them, and what they promise."""

import ast
import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # threads of trainings that run side by side would wait for each other

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

import common
import dcgan
import sample
import tsne
import vae
from docs import explorer, hidden_tests, student_version

HERE = Path(__file__).parent
SCRIPTS = {"vae": vae, "dcgan": dcgan, "sample": sample, "tsne": tsne, "explorer": explorer}
DIGITS = ["--dataset", "digits", "--device", "cpu"]
SMALL = [*DIGITS, "--subset", "200", "--epochs", "3"]
TRAINED = {  # run: the script and the options of its command
    "vae-beta10-digits-z8-subset200": ["vae", *SMALL, "--latent-dim", "8", "--hidden-dim", "32"],
    "vae-conv-beta1-digits-z2-subset200": ["vae", *SMALL, "--latent-dim", "2", "--arch", "conv", "--beta", "1"],
    "vae-autoencoder-digits-subset200": ["vae", *SMALL, "--autoencoder"],
    "dcgan-digits-z8-subset24": ["dcgan", *SMALL, "--latent-dim", "8", "--batch-size", "10", "--subset", "24"],
    "my_vae-beta10-digits-z8-subset200-seed1": ["my_vae", *SMALL, "--latent-dim", "8", "--seed", "1"],
}
VAE, CONV, AUTOENCODER, DCGAN, COPY = TRAINED


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder with the runs of TRAINED, made from the shell, and RUN.txt, what each printed; do not write in it.

    my_vae.py beside it is a copy of vae.py whose decoder draws black on white.
    """
    folder = tmp_path_factory.mktemp("trained")
    for script in HERE.glob("*.py"):
        shutil.copy(script, folder)
    source = (HERE / "vae.py").read_text(encoding="utf-8")
    changed = source.replace("torch.sigmoid(self.backbone(z))", "1 - torch.sigmoid(self.backbone(z))")
    (folder / "my_vae.py").write_text(changed, encoding="utf-8")

    def train(run):
        script, *arguments = TRAINED[run]
        command = [sys.executable, f"{script}.py", *arguments]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert (process.returncode, process.stderr) == (0, "")  # no bar, no warning
        Path(folder, "runs", f"{run}.txt").write_text(process.stdout)

    with ThreadPoolExecutor() as pool:
        list(pool.map(train, TRAINED))
    return folder / "runs"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def float64():
    """Compute in double precision, so that two ways to the same number agree with any seed."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def error_of(command):
    """The one line with which a script refuses what it is given."""
    script, *arguments = command.split()
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(arguments)
    assert "\n" not in stop.value.code
    return stop.value.code


def metrics(run):
    """The rows of metrics.csv as numbers, without their times."""
    rows = csv.DictReader(Path(run, "metrics.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items() if name != "seconds"} for row in rows]


def saved(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def assert_same(run, other_run):
    """Two runs have the same weights, moments, steps and metrics, to the last bit."""
    assert metrics(run) == metrics(other_run)
    one = saved(run)
    other = saved(other_run)
    for key in one.keys() - {"script", "config", "metrics"}:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def assert_shows(path, images, columns=10, enlarged=1):
    """The file begins with these images in a grid, each pixel enlarged, up to one gray value."""
    save_image(images.detach(), "expected.png", nrow=columns)
    expected = pixels("expected.png").repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    assert abs(pixels(path)[: len(expected)] - expected).max() <= 1


# --- Mathematics ---


@pytest.mark.parametrize("name", student_version.TASKS)
def test_our_functions_pass_the_tests_of_the_students(name):
    getattr(hidden_tests, f"test_{name}")()


def loader_of(images, batch_size):
    """A DataLoader of images and labels, which draws its seeds from a generator of its own."""
    dataset = TensorDataset(images, torch.arange(len(images)))
    return DataLoader(dataset, batch_size, generator=torch.Generator())


def test_an_evaluation_is_an_epoch_without_updates():
    model = vae.VAE(vae.Encoder(784, 32, 8), vae.Decoder(8, 32, 784))
    loader = loader_of(torch.rand(24, 1, 28, 28), batch_size=16)  # the last batch is smaller
    torch.manual_seed(3)
    losses = vae.train_vae(model, torch.optim.SGD(model.parameters(), lr=0), loader, beta=10)
    torch.manual_seed(3)
    assert vae.evaluate_vae(model, loader, beta=10) == pytest.approx(losses)
    assert not model.training


def test_an_epoch_of_train_dcgan_is_this_formula(float64):
    networks = nn.ModuleList([dcgan.Generator(10, (1, 32, 32)), dcgan.Discriminator((1, 32, 32))])
    expected = copy.deepcopy(networks)
    images = torch.rand(10, 1, 32, 32)
    loader = loader_of(images, batch_size=6)
    optimizers = [torch.optim.SGD(network.parameters(), lr=10) for network in networks]
    torch.manual_seed(5)
    steps = dcgan.train_dcgan(*networks.eval(), *optimizers, loader, latent_dim=10)

    # both losses can be computed before either update: G moves first, but D scores the fakes made before that
    generator, discriminator = expected
    optimizer = torch.optim.SGD(expected.parameters(), lr=10)
    torch.manual_seed(5)  # the passes come in the same order, so dropout draws the same numbers
    for x, step in zip(images.split(6), steps, strict=True):
        fakes = generator(torch.randn(len(x), 10))
        g_loss = -discriminator(fakes).log().mean()
        real_score = discriminator(x)
        fake_score = discriminator(fakes.detach())
        d_loss = -0.5 * (real_score.log().mean() + (1 - fake_score).log().mean())
        real_acc = (real_score > 0.5).double().mean()
        fake_acc = (fake_score <= 0.5).double().mean()
        torch.testing.assert_close(step, torch.stack([g_loss, d_loss, real_acc, fake_acc]).detach())
        optimizer.zero_grad()
        g_loss.backward(inputs=list(generator.parameters()))
        d_loss.backward(inputs=list(discriminator.parameters()))
        optimizer.step()
    torch.testing.assert_close(networks.state_dict(), expected.state_dict())


def test_the_networks_are_the_labs():
    encoder = vae.Encoder(784, 512, 128)
    decoder = vae.Decoder(128, 512, 784)
    discriminator = dcgan.Discriminator((1, 32, 32))
    networks = nn.ModuleList([encoder, decoder, dcgan.Generator(100, (1, 32, 32)), discriminator])
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes == [795_904, 730_896, 1_049_985, 98_113]
    norms = [layer.eps for layer in networks.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms == [1e-5, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert {"model.0.weight", "model.14.running_var", "adv_layer.0.weight"} < discriminator.state_dict().keys()
    with pytest.raises(ValueError, match=r"\(1, 28, 28\).*\(1, 32, 32\)"):
        discriminator(torch.rand(2, 1, 28, 28))
    x = torch.rand(2, 784)
    mean, _ = encoder(x)
    x_pred, *zeros = vae.Autoencoder(encoder, decoder)(x)  # samples nothing
    torch.testing.assert_close([x_pred, *zeros], [decoder(mean), 0 * mean, 0 * mean])


def test_the_fast_generator_gives_the_same_images_and_gradients(float64):
    lab = dcgan.Generator(10, (3, 32, 32))
    fast = dcgan.FastGenerator(10, (3, 32, 32))
    fast.load_state_dict(lab.state_dict())
    z = torch.randn(4, 10)
    torch.testing.assert_close(fast(z), lab(z))
    for network in (fast, lab):
        (network(z) ** 2).sum().backward()
    for (name, p), q in zip(fast.named_parameters(), lab.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    fast.conv_blocks[6] = lab.conv_blocks[6] = nn.Conv2d(128, 64, 3, padding=2, dilation=2)  # a changed copy's
    torch.testing.assert_close(fast(z), lab(z))


def test_a_copy_of_a_network_in_bf16_computes_with_its_own_weights():
    generator = dcgan.FastGenerator(10, (1, 32, 32)).eval()
    common.use_bf16(generator, [generator.conv_blocks[-2]])
    average = copy.deepcopy(generator)
    average(torch.randn(4, 10)).sum().backward()
    assert average.l1[0].bias.grad is not None
    assert generator.l1[0].bias.grad is None


# --- Images ---


def write_mnist():
    """MNIST's four files, with the same 64 digits to train and to test on; returns their folder."""
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    digits = common.load_digits(28)
    images = (digits.train[:64] * 255).byte().numpy().tobytes()
    labels = digits.train_labels[:64].byte().numpy().tobytes()
    for split in ("train", "t10k"):
        header = np.array([0x803, 64, 28, 28], ">i4").tobytes()
        Path(raw, f"{split}-images-idx3-ubyte").write_bytes(header + images)
        Path(raw, f"{split}-labels-idx1-ubyte").write_bytes(np.array([0x801, 64], ">i4").tobytes() + labels)
    return raw


def test_mnist_on_disk_is_resized_as_pil_does_and_trained_on(capsys):
    raw = write_mnist()
    digits = common.load_digits(28)
    originals = [Image.fromarray((image[0] * 255).byte().numpy()) for image in digits.train[:64]]
    expected = np.stack([image.resize((32, 32), Image.BILINEAR) for image in originals])
    data = common.load_images("mnist", "data", 32)
    for images, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert abs(images[:, 0].numpy() * 255 - expected).max() < 1.01
        assert torch.equal(labels, digits.train_labels[:64])
    vae.main(["--epochs", "1"])
    dcgan.main(["--epochs", "1", "--subset", "20"])
    assert sorted(os.listdir("runs")) == ["dcgan-subset20", "vae-beta10"]
    assert saved("runs/vae-beta10")["config"]["batch_size"] == 1024
    assert re.findall("([0-9,]+) parameters", capsys.readouterr().out) == ["1,526,800", "1,148,098"]

    header = np.array([0x801, 63], ">i4").tobytes()
    Path(raw, "t10k-labels-idx1-ubyte").write_bytes(header + bytes(63))
    assert "MNIST in data/MNIST/raw: images and labels do not belong together" in error_of("vae --out other")


def test_without_mnist_the_default_is_digits_and_a_named_set_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["file:///nowhere/"])
    vae.main(["--epochs", "1", "--data", "nowhere"])
    warning = capsys.readouterr().err
    assert re.search(r"WARNING: MNIST is not available \(Error .*\); its files belong in nowhere/MNIST/raw", warning)
    assert "MNIST is not available (" in error_of("dcgan --dataset mnist --data nowhere --epochs 1")
    assert os.listdir("runs") == ["vae-beta10-digits"]
    assert "MNIST is not available (" in error_of("sample runs/vae-beta10-digits --dataset mnist --data nowhere")
    assert Path("runs/vae-beta10-digits/samples.png").exists()  # what needs no images is drawn first


def test_cifar_has_three_channels(monkeypatch):
    array = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    split = Mock(data=array, targets=list(range(50)), classes=[f"class {i}" for i in range(100)])
    monkeypatch.setattr("torchvision.datasets.CIFAR100", lambda root, train, download: split)
    expected = torch.from_numpy(array).permute(0, 3, 1, 2) / 255
    assert torch.equal(common.load_images("cifar100", "data").train, expected)
    vae.main(["--arch", "conv", "--latent-dim", "2", "--dataset", "cifar100", "--epochs", "1"])
    dcgan.main(["--dataset", "cifar100", "--epochs", "1"])
    run = "runs/vae-conv-beta10-cifar100-z2"
    sample.main([run])
    tsne.main([run])  # codes of two dimensions
    assert {"manifold.png", "tsne_mean.png"} < set(os.listdir(run))
    assert "takes images of shape (3, 32, 32)" in error_of(f"tsne {run} --dataset digits")


def test_batches_use_every_image_once_with_its_label():
    images = torch.arange(10.0)
    batches = list(common.batches(images, images + 100, 4, shuffle=True))
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert all(torch.equal(labels, x + 100) for x, labels in batches)
    shuffled = torch.cat([x for x, _ in batches])
    assert not torch.equal(shuffled, images)
    assert torch.equal(shuffled.sort().values, images)


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
            if node.name not in ("ConvEncoder", "ConvDecoder", "Autoencoder"):  # exercises
                definition = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
                assert any(cell.endswith(definition) for cell in code_cells()), node.name
    assert len(names) == len(set(names)) == 16


def test_the_notebook_runs_twice_and_goes_on_where_it_was(monkeypatch, capsys):
    monkeypatch.setattr("matplotlib.pyplot.show", Mock())
    write_mnist()
    for epochs in (1, 2):
        notebook = {"display": Mock()}
        for cell in code_cells():
            code = re.sub(r"^(NUM_EPOCHS\w*) = \d+", rf"\1 = {epochs}", cell, flags=re.MULTILINE)
            exec(code, notebook)
        assert len(notebook["vae_losses"][10]) == len(notebook["gan_steps"]) == epochs
    printed = capsys.readouterr().out
    assert printed.count("right: ") == 2 * 7
    assert printed.count("epoch 1: ") == 3  # of three models, and not again in the second run


def test_what_students_and_the_lab_saved_opens_as_the_readme_says():
    section = (HERE / "README.md").read_text(encoding="utf-8").split("## Your own weights")[1]
    code = re.search("```python\n(.*?)```", section, re.DOTALL)[1]
    load, load_lab = re.findall(r"torch\.load\([^)]*\)(?:\[.*?])?", section)
    weights = vae.VAE(vae.Encoder(784, 512, 128), vae.Decoder(128, 512, 784)).state_dict()
    torch.save(weights, "my.pt")
    torch.save({"epoch": 149, "state_dict": weights}, "lab.ckpt")
    for script in (code, code.replace(load, load_lab)):
        notebook = {}
        exec(script, notebook)
        torch.testing.assert_close(notebook["model"].state_dict(), weights)


@pytest.mark.parametrize("failing, old, new", [
    ([], "", ""),
    (["reparameterize"], "return mean + std * epsilon", "return torch.normal(mean, std)"),
    (["kl_divergence"], "return -0.5 * torch", "return -0.5 / len(mean) * torch"),
    (["train_vae"], "loss = reconstruction + beta * kl", "loss = reconstruction + 10 * kl"),
    (["train_dcgan"], "optimizer_d.zero_grad()", "pass"),
])  # fmt: skip
def test_a_mistake_costs_the_points_of_its_function_alone(failing, old, new, monkeypatch):
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # the test cells redirect it
    student_version.main(Path("class"))
    notebook = {}
    failed = []
    for cell in json.loads(Path("class/source/lab/lab.ipynb").read_text(encoding="utf-8"))["cells"]:
        nbgrader = cell["metadata"].get("nbgrader")
        if cell["cell_type"] == "code" and nbgrader:
            code = "".join(cell["source"])
            try:
                exec(code.replace(old, new) if nbgrader["solution"] else code, notebook)
            except (AssertionError, RuntimeError):
                failed.append(nbgrader["grade_id"].removeprefix("test_"))
    assert failed == failing


def test_students_get_no_answers_also_of_a_changed_notebook(tmp_path, monkeypatch):
    shutil.copytree(HERE / "docs", "docs", ignore=shutil.ignore_patterns("*.pt", "images"))
    monkeypatch.setattr(student_version, "DOCS", tmp_path / "docs")
    notebook = json.loads(Path("docs/lab.ipynb").read_text(encoding="utf-8"))
    lines = ["%%time\n", "%pip install notebook\n", "if True:\n", "    !ls\n", "torch.nn?"]
    notebook["cells"].insert(1, {**notebook["cells"][-1], "cell_type": "code", "source": lines})
    Path("docs/lab.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    student_version.main(Path("class"))
    students = Path("class/lab.ipynb").read_text(encoding="utf-8")
    assert students.count("raise NotImplementedError") == 7 + 1  # the first cell says so
    for answer in ("SOLUTION", "HIDDEN", "log_var.exp()", "binary_cross_entropy(", "images.detach()", "loss.backward"):
        assert answer not in students

    Path("docs/lab.ipynb").write_text(json.dumps(notebook).replace("def kl_divergence(", "def kl("), encoding="utf-8")
    with pytest.raises(SystemExit, match="kl_divergence"):
        student_version.main(Path("another"))
    assert not Path("another").exists()


# --- The scripts, as users run them ---


@pytest.mark.parametrize("run", TRAINED)
def test_a_training_from_the_shell(run, trained):
    kinds = ["samples"] if run == DCGAN else ["reconstructions", "samples"]
    grids = [f"epoch_00{epoch}_{kind}.png" for epoch in (1, 2, 3) for kind in kinds]
    assert sorted(os.listdir(trained / run)) == ["checkpoint.pt", "images", "losses.png", "metrics.csv"]
    assert sorted(os.listdir(trained / run / "images")) == grids
    assert saved(trained / run)["epoch"] == len(metrics(trained / run)) == 3
    first, *epochs, last = Path(trained, f"{run}.txt").read_text().splitlines()
    assert re.match(f"runs/{run}: (24|200) images of digits, ", first)
    assert [line[:5] for line in epochs] == ["  1/3", "  2/3", "  3/3"]
    assert max(map(len, epochs)) < 80
    assert last == f"next: python sample.py runs/{run}"


def test_a_run_of_vae_is_this_loop(trained):
    data = common.load_digits(28)
    x = data.test[:50]
    torch.manual_seed(0)
    model = vae.VAE(vae.Encoder(784, 32, 8), vae.Decoder(8, 32, 784))
    fixed_z = torch.randn(50, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch, row in enumerate(metrics(trained / VAE), start=1):
        torch.manual_seed(epoch)
        train_batches = common.batches(data.train[:200], data.train_labels, 64, shuffle=True)
        train_losses = vae.train_vae(model, optimizer, train_batches, beta=10)
        test_losses = vae.evaluate_vae(model, common.batches(data.test, data.test_labels, 64), beta=10)
        assert list(row.values()) == pytest.approx([epoch, *train_losses, *test_losses], rel=1e-4)
        x_pred = model(x.flatten(1))[0].view_as(x)
        grid = f"{trained / VAE}/images/epoch_00{epoch}"
        assert_shows(f"{grid}_samples.png", model.decoder(fixed_z).view_as(x))
        assert_shows(f"{grid}_reconstructions.png", torch.cat([x[:10], x_pred[:10], x[10:20], x_pred[10:20]]))
        equation = "{test/loss:.2f} = {test/reconstruction_loss:.2f} + 10 * {test/kl_loss:.3f}, ".format(**row)
        assert f"train {row['train/loss']:.2f}, test {equation}" in Path(trained, f"{VAE}.txt").read_text()


def test_a_run_of_dcgan_is_this_loop(trained):
    data = common.load_digits(32)
    torch.manual_seed(0)
    networks = [dcgan.FastGenerator(8, (1, 32, 32)), dcgan.Discriminator((1, 32, 32))]
    fixed_z = torch.randn(50, 8)
    optimizers = [torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999)) for network in networks]
    for epoch, row in enumerate(metrics(trained / DCGAN), start=1):
        torch.manual_seed(epoch)
        batches = common.batches(data.train[:24], data.train_labels, 10, shuffle=True)
        steps = dcgan.train_dcgan(*networks, *optimizers, batches, latent_dim=8)
        g_loss, d_loss, real_acc, fake_acc = steps.mean(0).tolist()
        expected = [epoch, g_loss, d_loss, real_acc, fake_acc, (real_acc + fake_acc) / 2]
        assert list(row.values()) == pytest.approx(expected, rel=1e-4)
        assert_shows(trained / DCGAN / f"images/epoch_00{epoch}_samples.png", networks[0].eval()(fixed_z))
        line = f"G {g_loss:.3f}, D {d_loss:.3f}, real {real_acc:.1%}, fake {fake_acc:.1%}, "
        assert line in Path(trained, f"{DCGAN}.txt").read_text()
    torch.testing.assert_close(saved(trained / DCGAN)["steps"], steps)  # of the last epoch


@pytest.mark.parametrize("script", ["vae", "dcgan"])
def test_bf16_is_close_to_float32_and_the_sigmoids_stay_in_it(script, monkeypatch):
    arguments = [*DIGITS, "--subset", "2", "--epochs", "1"]
    SCRIPTS[script].main([*arguments, "--out", "full"])
    sigmoid = Mock(wraps=torch.sigmoid)
    monkeypatch.setattr(torch, "sigmoid", sigmoid)
    SCRIPTS[script].main([*arguments, "--out", "half", "--bf16"])
    full = metrics("full")[0]
    half = metrics("half")[0]
    assert half != full
    assert half == pytest.approx(full, rel=0.02)
    assert {call.args[0].dtype for call in sigmoid.call_args_list} == {torch.float32}


def test_a_copy_of_a_script_is_drawn_with_its_own_layers(trained):
    checkpoint = saved(trained / COPY)
    _, decode, config = vae.load(checkpoint, "cpu")
    command = [sys.executable, "sample.py", f"runs/{COPY}/checkpoint.pt", "--seed", "5", "--out", Path.cwd()]
    subprocess.run(command, cwd=trained.parent, check=True)
    torch.manual_seed(5)
    z = torch.randn(26, 8)
    assert_shows("samples.png", 1 - decode(z[2:]), columns=8, enlarged=3)
    assert error_of(f"vae --resume {trained / COPY}") == f"{trained / COPY} was trained by my_vae.py, not by vae.py"
    assert "trained by my_vae.py, which is not in" in error_of(f"sample {trained / COPY}")


# --- What a run promises ---


@pytest.mark.parametrize("run", [CONV, DCGAN])
def test_a_killed_run_resumes_to_the_same_bits(run, trained, monkeypatch):
    script, *arguments = TRAINED[run]
    main = SCRIPTS[script].main
    save = torch.save

    def save_and_be_killed(checkpoint, path):
        save(checkpoint, path)
        if checkpoint["epoch"] == 2:
            os.truncate(path, 1000)
            raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(torch, "save", save_and_be_killed)
        main([*arguments, "--out", "run"])
    checkpoint = saved("run")
    assert checkpoint["epoch"] == 1
    if run == CONV:
        for state in checkpoint["optimizer"]["state"].values():
            state["exp_avg"] = state["exp_avg"].contiguous()  # as a GPU leaves it
        torch.save(checkpoint, "run/checkpoint.pt")
    main(["--resume", "run"])
    assert_same("run", trained / run)


def test_more_epochs_and_another_lr_may_be_given_beside_resume(trained):
    shutil.copytree(trained / VAE, "run")
    vae.main(["--resume", "run", "--epochs", "4", "--lr", "0.02"])
    *rows, _ = metrics("run")
    assert rows == metrics(trained / VAE)
    assert saved("run")["optimizer"]["param_groups"][0]["lr"] == 0.02
    changed = {"epochs": 4, "lr": 0.02, "resume": "run"}
    assert saved("run")["config"] == {**saved(trained / VAE)["config"], **changed}


def test_what_a_script_refuses_is_one_line_and_harms_nothing(trained, capsys):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (Path("executed"),))

    shutil.copytree(trained, "runs")
    weights = saved(trained / AUTOENCODER)["state_dict"]
    torch.save({**weights, "payload": Malicious()}, "malicious.pt")
    torch.save(weights, "my.pt")
    Path("page.pt").write_text("<html>not found</html>")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for command, message in {
        f"vae --out runs/{VAE} --dataset digits": f"go on with --resume runs/{VAE}, or name another folder with --out",
        "vae --resume runs/vae_beta10": "there is no file runs/vae_beta10/checkpoint.pt",
        f"vae --resume runs/{VAE}": "has all its 3 epochs; to train longer, give a larger --epochs",
        f"vae --resume runs/{VAE} --epochs 9 --beta 1": f"--beta cannot change: runs/{VAE} was trained with 10.0",
        f"dcgan --resume runs/{DCGAN} --latent-dim 9": f"--latent-dim cannot change: runs/{DCGAN} was trained with 8",
        f"dcgan --resume runs/{VAE}": f"runs/{VAE} was trained by vae.py, not by dcgan.py",
        f"sample runs/{VAE} --images 0 1500 --out pictures": "digits has 1500 training images",
        f"tsne runs/{DCGAN}": "has no encoder",
        f"tsne runs/{AUTOENCODER} --codes std": "no variance",
        f"explorer runs/{CONV}": "needs vae.py's fully connected VAE with --latent-dim 2",
        "sample runs/vae_beta10": "there is no file runs/vae_beta10",
        "sample malicious.pt": "malicious.pt cannot be read (UnpicklingError)",
        "sample page.pt": "page.pt cannot be read",
        "tsne my.pt": 'my.pt was not saved by these scripts: see "Your own weights" in README.md',
    }.items():
        assert message in error_of(command)
    shutil.rmtree("pictures")  # what needs no images was drawn
    for options in (f"--resume runs/{VAE} --out x", "--epochs 0", "--subset -5", "--batch-size 0"):
        with pytest.raises(SystemExit, match="2"):
            vae.main(options.split())
        assert re.search("argument --(out: not allowed|.*: invalid positive value)", capsys.readouterr().err)
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_a_runs_that_is_no_folder_is_pythons_own_error():
    os.symlink("/nowhere/runs", "runs")  # an unplugged disk
    with pytest.raises(FileExistsError):
        vae.main(DIGITS)
    with pytest.raises(FileExistsError):
        vae.main([*DIGITS, "--out", "runs/a"])


def test_ctrl_c_is_one_line_and_keeps_what_is_there(trained, monkeypatch):
    monkeypatch.setattr(vae, "train_vae", Mock(side_effect=KeyboardInterrupt))
    shutil.copytree(trained / VAE, "run")
    os.remove("run/losses.png")
    assert error_of("vae --resume run --epochs 4") == "interrupted; to continue: python vae.py --resume run"
    assert_same("run", trained / VAE)
    assert Path("run/losses.png").exists()
    os.mkdir("first")
    Path("first/note.txt").touch()
    assert error_of("vae --dataset digits --out first") == "interrupted; nothing is saved yet"
    assert os.listdir("first") == ["note.txt"]


def test_a_run_that_diverged_stops_before_it_writes():
    dcgan.main([*DIGITS, "--subset", "10", "--epochs", "1", "--out", "run"])
    assert "samples is not finite" in error_of("dcgan --resume run --epochs 2 --lr 1e30")
    assert saved("run")["epoch"] == len(metrics("run")) == len(os.listdir("run/images")) == 1


# --- Pictures ---


def test_every_picture_shows_what_it_is_called(trained):
    arguments = "--n 16 --interpolation 8 --images 3 7 --seed 5 --out . --device cpu"
    sample.main([str(trained / VAE), *arguments.split()])
    model, decode, _ = common.open_run(trained / VAE, "cpu")
    data = common.load_digits(28)
    torch.manual_seed(5)
    z = torch.randn(2 + 16, 8)
    x = data.test[:50]
    x_pred = model(x.flatten(1))[0].view_as(x)
    ends = data.train[[3, 7]]
    mean, _ = model.encoder(ends.flatten(1))
    alpha = torch.linspace(0, 1, 8)[:, None]
    between = decode((1 - alpha) * mean[0] + alpha * mean[1])
    rows = torch.cat([x[:10], x_pred[:10], x[10:20], x_pred[10:20]])
    assert_shows("samples.png", decode(z[2:]), columns=8, enlarged=3)
    assert_shows("reconstructions.png", rows, enlarged=3)
    assert_shows("interpolation.png", decode((1 - alpha) * z[0] + alpha * z[1]), columns=8, enlarged=3)
    assert_shows("interpolation_digits.png", torch.cat([ends[:1], between, ends[1:]]), columns=10, enlarged=3)
    first, last = [pixels(trained / VAE / f"images/epoch_00{epoch}_samples.png") for epoch in (1, 3)]
    first_frame = pixels("training.gif")
    assert abs(first_frame - first).mean() < abs(first_frame - last).mean()
    assert Image.open("training.gif").n_frames == 3


def test_the_models_in_docs_draw_digits_and_are_compared(trained):
    for name in ("vae-beta1", "dcgan"):
        shutil.copy(HERE / f"docs/{name}.pt", ".")
        sample.main([f"{name}.pt", "--dataset", "digits"])
        assert 20 < pixels(f"{name}/samples.png").mean() < 80  # black is 0, an untrained network's gray about 127
    shutil.copytree(trained / CONV, "a$_$c")  # not a formula
    sample.main(["vae-beta1.pt", "dcgan.pt", "a$_$c"])
    rows = sample.compare(["vae-beta1.pt", "a$_$c"], torch.device("cpu"), seed=0).axes
    assert [row.get_title() for row in rows] == ["vae-beta1.pt, epoch 150", "a$_$c, epoch 3"]
    assert rows[0].images[0].get_array().shape == (32, 242, 3)  # eight images


def test_a_manifold_lies_at_the_quantiles():
    levels = torch.distributions.Normal(0, 1).cdf(sample.manifold().view(20, 20, 2))
    quantiles = (torch.arange(20) + 0.5) / 20
    torch.testing.assert_close(levels[:, :, 0], quantiles.expand(20, 20))  # z1 to the right
    torch.testing.assert_close(levels[:, :, 1], quantiles.flip(0)[:, None].expand(20, 20))  # z2 upwards


def test_curves_are_what_their_legends_say(trained, monkeypatch):
    figures = []
    monkeypatch.setattr(common.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = metrics(trained / DCGAN)
    common.save_curves("losses.png", rows, dcgan.CURVES, {"generator": list(range(300))}, dcgan.LEVELS)
    axes = figures[0].axes
    assert [ax.get_title() for ax in axes[:2]] == list(dcgan.CURVES)
    panels = [{line.get_label(): list(line.get_ydata()) for line in ax.lines} for ax in axes]
    losses, accuracies, steps = panels
    assert losses["generator"] == [row["generator/loss"] for row in rows]
    assert accuracies["fake"] == [row["discriminator/fake_acc"] for row in rows]
    assert steps["generator"] == list(range(100, 300))
    assert [panel["D cannot tell"][0] for panel in panels] == pytest.approx([0.6931, 0.5, 0.6931], abs=1e-4)
    for title, columns in vae.CURVES.items():
        loss = {"r": "reconstruction_loss", "K": "kl_loss", "l": "loss"}[title[0]]
        assert columns == {"training": f"train/{loss}", "test": f"test/{loss}"}


def test_a_map_has_a_name_for_each_class():
    points = np.random.randn(30, 2)
    labels = np.arange(30) % 3
    ax = tsne.draw(points, labels, ["0 - zero", "1 - one", "2 - two"], "title").axes[0]
    for label, drawn in enumerate(ax.collections):
        assert np.array_equal(drawn.get_offsets(), points[labels == label])
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2"]


@pytest.mark.parametrize("codes", ["mean", "std", "sample", "pixels"])
def test_tsne_maps_the_codes_that_it_names(codes, trained, monkeypatch, capsys):
    kl_by_rows = Mock(side_effect=lambda mean, log_var: 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(dim=1).sum())
    monkeypatch.setattr(vae, "kl_divergence", kl_by_rows)  # a student's own
    tsne.main([str(trained / VAE), "--codes", codes, "--n", "200", "--out", "maps", "--device", "cpu"])
    model, _, _ = common.open_run(trained / VAE, "cpu")
    data = common.load_digits(28)
    torch.manual_seed(0)
    chosen = torch.randperm(297)[:200]
    x = data.test.flatten(1)
    mean, log_var = model.encoder(x)
    std = log_var.exp().sqrt()
    sampled = mean + std * torch.randn(mean.shape)
    points = {"mean": mean, "std": std, "sample": sampled, "pixels": x}[codes][chosen].detach()
    labels = data.test_labels[chosen]
    distances = (points[:, None] - points).square().sum(-1).fill_diagonal_(float("inf"))
    accuracy = (labels[distances.argmin(1)] == labels).float().mean()
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(0, 1))
    printed = capsys.readouterr().out
    assert f"{codes}: 1-nearest-neighbor accuracy {accuracy:.1%} of the codes" in printed
    assert f"{(kl.mean(0) > 0.01).sum()} of the 8 dimensions of z carry more than 0.01 nats" in printed
    assert os.listdir("maps") == [f"tsne_{codes}.png"]


# --- The page of one's own model ---

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRAW_A_ONE = """
  const box = element("drawing").getBoundingClientRect();
  for (let v = 0.2; v < 0.8; v += 0.06) {
    const place = { clientX: box.left + 0.5 * box.width, clientY: box.top + v * box.height, buttons: 1 };
    element("drawing").dispatchEvent(new PointerEvent(v == 0.2 ? "pointerdown" : "pointermove", place));
  }
  document.body.dataset.drawn = Array.from(x).join(" ");
</script>"""


def page_in_browser(address):
    """The numbers in a page after its scripts: {attribute: its numbers}, and "output": mean, std and z, (6,)."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir=browser", "--dump-dom"]
    page = subprocess.run([*command, address], capture_output=True, text=True, timeout=60, check=True).stdout
    texts = dict(re.findall('data-(pixels|drawn)="(.*?)"', page))
    texts["output"] = re.sub("[a-z]", "", re.search("<output.*?>(.*?)</output>", page, re.DOTALL)[1])
    return {name: torch.tensor([float(number) for number in text.split()]) for name, text in texts.items()}


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_computes_what_the_model_does():
    vae.main([*SMALL, "--latent-dim", "2", "--hidden-dim", "32", "--beta", "1", "--out", "run"])
    explorer.main(["run"])
    model, decode, _ = common.open_run("run", "cpu")
    assert explorer.is_known(model, 32)
    page = Path("run/explorer.html").resolve()
    shown = page_in_browser(f"{page.as_uri()}#1.0,-0.5")
    torch.testing.assert_close(shown["pixels"], decode(torch.tensor([[1.0, -0.5]])).flatten(), rtol=0, atol=0.001)
    assert shown["output"].tolist() == [0, 0, 1, 1, 1, -0.5]  # mean and std of N(0, 1): nothing is drawn

    page.write_text(page.read_text(encoding="utf-8").replace("</script>", DRAW_A_ONE), encoding="utf-8")
    shown = page_in_browser(page.as_uri())
    assert 30 < shown["drawn"].sum() < 200
    mean, log_var = model.encoder(shown["drawn"][None])
    expected = torch.cat([mean, torch.exp(0.5 * log_var), mean]).flatten()
    torch.testing.assert_close(shown["output"], expected, rtol=0, atol=0.006)  # two decimals
    torch.testing.assert_close(shown["pixels"], decode(mean).flatten(), rtol=0, atol=0.001)

    model.decoder.forward = lambda z: 1 - torch.sigmoid(model.decoder.backbone(z))  # a changed copy's
    assert not explorer.is_known(model, 32)
