"""t-SNE (van der Maaten and Hinton, 2008) of a VAE's codes of the test images, coloured by class.

Codes of two dimensions are drawn as they are. Without a run it takes the newest runs/vae*. It also prints the accuracy
of the nearest neighbour (how often the closest other code is of the same class) and how many dimensions the VAE uses.

    python tsne.py                                       # the means, as in the lab
    python tsne.py runs/vae-beta1 --codes std            # the standard deviations instead
    python tsne.py runs/vae-beta1 --codes pixels         # the images themselves
"""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

import common
import vae


def dimensions_in_use(mean, log_var, threshold=0.01):
    """How many of the latent_dim columns have a mean KL divergence above the threshold, in nats per image."""
    kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).mean(0)
    return (kl > threshold).sum().item()


def nearest_neighbour_accuracy(codes, labels):
    """The share of codes (N, D) whose nearest other code has the same label (N,)."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=1).fit(codes).kneighbors(return_distance=False)[:, 0]
    return (labels[nearest] == labels).mean()


def draw(points, labels, classes, title):
    """A matplotlib figure of points (N, 2), with a colour for each class; labels (N,) index classes."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab10" if len(classes) <= 10 else "gist_rainbow"].resampled(len(classes))
    for label, name in enumerate(classes):
        axes.scatter(*points[labels == label].T, s=12, color=colours(label), label=name)
    axes.set(title=title, aspect="equal")
    columns = 1 + (len(classes) - 1) // 25
    figure.legend(loc="outside right upper", fontsize="small" if columns == 1 else 5, ncols=columns)
    return figure


def parse_options(argv):
    parser = ArgumentParser("tsne.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    codes = ["mean", "sample", "std", "pixels"]
    parser.add_argument("run", nargs="?", type=Path, help="run or file with weights (default: the newest runs/vae*)")
    parser.add_argument("--codes", choices=codes, default="mean", help="what to map of each image (default: mean)")
    parser.add_argument("--n", type=common.count, default=1000, help="test images on the map (default: 1000)")
    parser.add_argument("--perplexity", type=float, default=30.0, help="t-SNE's perplexity, below --n (default: 30)")
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="the images (default: the run's)")
    parser.add_argument("--data", help="folder of the data sets (default: the run's)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: auto, a GPU if any)")
    options = parser.parse_args(argv)
    if options.run is None:
        newest = max(Path("runs").glob("vae*/checkpoint.pt"), key=os.path.getmtime, default=None)
        if newest is None:
            raise common.Error("there is no VAE in runs/: train one first, or name one")
        options.run = newest.parent
    return options


@torch.inference_mode()
def main(argv=None):
    from sklearn.manifold import TSNE

    options = parse_options(argv)
    device = common.pick_device(options.device)
    model, config = vae.load(options.run, device)
    if config["autoencoder"] and options.codes in ("sample", "std"):
        raise common.Error(f"--codes {options.codes}: an autoencoder has no variance; use mean or pixels")
    name, root = options.dataset or config["dataset"], options.data or config["data"]
    data = common.load_dataset(name, root, size=config["image_shape"][-1])
    if data.test.shape[1:] != config["image_shape"]:
        shapes = f"{config['image_shape']}, those of {name} are {tuple(data.test.shape[1:])}"
        raise common.Error(f"{options.run} needs images of the shape {shapes}")

    # codes of all test images, and which of them are drawn
    torch.manual_seed(options.seed)
    chosen = torch.randperm(len(data.test))[: options.n]  # without replacement
    x = data.test.to(device).flatten(1) / 255
    mean, log_var = model.encoder(x)
    std = torch.exp(0.5 * log_var)
    z = vae.reparameterize(mean, std)
    codes = {"mean": mean, "sample": z, "std": std, "pixels": x}[options.codes]
    codes = codes.cpu()[chosen].numpy()
    labels = data.test_labels[chosen].numpy()
    if codes.shape[1] == 1:
        raise common.Error("codes of one dimension are not drawn: train with --latent-dim 2 or more")
    if (codes == codes[0]).all():
        raise common.Error(f"all codes are equal, there is nothing to map: has the encoder of {options.run} collapsed?")

    # the map: two dimensions as they are, more of them through t-SNE
    text = f"1-nearest-neighbour accuracy {nearest_neighbour_accuracy(codes, labels):.1%} of the codes"
    points = codes
    axes = {"xlabel": "dimension 1", "ylabel": "dimension 2"}
    if codes.shape[1] > 2:
        points = TSNE(2, perplexity=options.perplexity, random_state=options.seed).fit_transform(codes)
        text += f", {nearest_neighbour_accuracy(points, labels):.1%} on the map"
        axes = {"xticks": [], "yticks": []}  # they mean nothing, only which points are close
    figure = draw(points, labels, data.classes, f"{options.codes} of {len(codes)} test images\n{text}")
    figure.axes[0].set(**axes)

    folder = options.out or (options.run if options.run.is_dir() else options.run.parent)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tsne_{options.codes}.png"
    figure.savefig(path, dpi=150)
    print(f"{options.codes}: {text}")
    if not config["autoencoder"]:
        used = dimensions_in_use(mean, log_var)
        print(f"{used} of the {mean.shape[1]} dimensions of z carry more than 0.01 nats ({len(x):,} test images)")
    print(path)


if __name__ == "__main__":
    common.run_script(main)
